from __future__ import annotations

import pytest

from spectra import naming
from spectra.errors import SelectionError

ROLES = {
    "model.layers.3.self_attn.q_proj.weight": ("q_proj", 3),
    "encoder.layer.5.attention.self.value.weight": ("v_proj", 5),
    "encoder.layer.5.attention.output.dense.weight": ("o_proj", 5),
    "encoder.layer.5.intermediate.dense.weight": ("up_proj", 5),
    "encoder.layer.5.output.dense.weight": ("down_proj", 5),
    "transformer.h.0.attn.c_attn.weight[k]": ("k_proj", 0),
    "transformer.h.0.attn.c_attn.weight": ("qkv_proj", 0),
    "transformer.h.0.attn.c_proj.weight": ("o_proj", 0),
    "transformer.h.0.mlp.c_proj.weight": ("down_proj", 0),
    "gpt_neox.layers.2.attention.query_key_value.weight[v]": ("v_proj", 2),
    "gpt_neox.layers.2.attention.dense.weight": ("o_proj", 2),
    "gpt_neox.layers.2.mlp.dense_4h_to_h.weight": ("down_proj", 2),
    "model.layers.1.block_sparse_moe.experts.7.w1.weight": ("gate_proj", 1),
    "model.layers.1.block_sparse_moe.experts.7.w2.weight": ("down_proj", 1),
    "transformer.h.3.mlp.w1.weight": ("up_proj", 3),
    "transformer.h.3.mlp.w2.weight": ("gate_proj", 3),
    "encoder.block.4.layer.0.SelfAttention.q.weight": ("q_proj", 4),
    "encoder.block.4.layer.1.DenseReluDense.wo.weight": ("down_proj", 4),
    "transformer.wte.weight": ("embed_tokens", None),
    "lm_head.weight": ("lm_head", None),
    "model.decoder.layers.1.fc1.weight": ("up_proj", 1),
    "classifier.weight": ("classifier", None),
}


@pytest.mark.parametrize("name", ROLES)
def test_roles_and_layers_across_architectures(name):
    assert (naming.role_of(name), naming.layer_of(name)) == ROLES[name]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("v_proj", 3),
        ("value", 1),
        ("self_attn", 3),
        ("layers.1", 2),
        ("layers.1.*", 2),
        ("*_proj", 5),
        ("re:layers\\.(1|11)\\.", 3),
        ("model.layers.11.self_attn.v_proj.weight", 1),
        ("lm_head", 1),
        ("proj", 0),
        ("layers.*.v_proj", 0),
        ("v_proj,q_proj", 4),
        ("lm_head, up_proj", 2),
        ("1", 3),
        ("0-1", 4),
        ("1-11", 4),
        ("0-1.attn", 3),
        ("0-1.v_proj,lm_head", 3),
        ("12-99", 0),
        ("attn", 4),
        ("mlp", 1),
        ("[q,v]_proj", 4),
        ("re:[qv]_proj,?", 3),
        ("*v_proj*", 3),
    ],
)
def test_what_a_pattern_means(pattern, count):
    names = [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.11.self_attn.v_proj.weight",
        "encoder.layer.1.attention.self.value.weight",
        "lm_head.weight",
    ]
    if count:
        assert len(naming.select(pattern, names)) == count
    else:
        with pytest.raises(SelectionError, match=r"matches none of the 6 matrices.*v_proj \(3\)"):
            naming.select(pattern, names)


def test_every_pattern_must_match_and_the_order_is_the_inputs():
    assert naming.select(["b", "a"], ["a.weight", "b.weight", "c.weight"]) == ["a.weight", "b.weight"]
    with pytest.raises(SelectionError, match="'typo' matches none"):
        naming.select(["a", "typo"], ["a.weight"])
    with pytest.raises(SelectionError, match="not a regular expression"):
        naming.select("re:(", ["a.weight"])


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("q_prj", "did you mean q_proj"),
        ("query", r"did you mean q_proj\?"),
        ("up", r"did you mean up_proj\?"),
        ("7-9", r"layers 0 to 1\. Example"),
        ("q_proj,w_proj", "'w_proj' matches none of the 4 matrices"),
        ("slef_attn", r"did you mean self_attn\?"),
        ("atn", r"did you mean attn\?"),
        ("attnetion", r"did you mean attention\?"),
        ("1-0", r"did you mean 0-1\?"),
        ("1-0.up_proj", r"did you mean 0-1\.up_proj\?"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_what_is_near(pattern, told):
    names = [f"model.layers.{i}.{module}.weight" for i in range(2) for module in ("mlp.up_proj", "self_attn.q_proj")]
    with pytest.raises(SelectionError, match=told):
        naming.select(pattern, names)


def test_roles_stand_in_the_models_order():
    roles = ["lm_head", "down_proj", "router", "o_proj", "q_proj", "embed_tokens", "up_proj", "gate_proj", "k_proj"]
    assert naming.in_model_order([*roles, "v_proj", "other", "q_proj"]) == [
        *("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "router", "gate_proj", "up_proj", "down_proj"),
        *("other", "lm_head"),
    ]


@pytest.mark.parametrize(
    "part",
    [
        "lora_A",
        "xlora_B",
        "lora",
        "hada_w1_a",
        "lokr_w2",
        "lokr_w1_b",
        "to_q_lora",
        "weight",
        "lora2",
        "hada_w",
        "flora",
    ],
)
def test_a_quick_look_for_factors_is_the_pattern(part):
    for name in (part, f"layers.0.{part}", f"layers.0.{part}.weight", f"x{part}.weight"):
        assert naming.is_factor(name) == (naming._FACTOR.search(name) is not None)
