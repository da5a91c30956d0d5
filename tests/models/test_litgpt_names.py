"""LitGPT's full weights against transformers' names and layouts, both ways, and its older order of rows."""

from __future__ import annotations

import json

import pytest
import torch
from support.checkpoints import nudged, write_adapter, write_checkpoint
from support.litgpt import PARAMS, weights, write_model

import spectra
from spectra.errors import SourceError
from spectra.models import litgpt_names
from spectra.models.opening import open_model

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}


def as_llama(tensors):
    """What convert_lit_checkpoint.py makes of a LLaMA: q, k and v apart."""
    names = {"attn.proj": "self_attn.o_proj", "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
    names |= {"mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
    outside = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module in outside:
            found[f"{outside[module]}.weight"] = tensor
            continue
        _, _, layer, inner = module.split(".", 3)
        if inner == "attn.qkv":
            for part, rows in zip("qkv", tensor.split([16, 8, 8]), strict=True):
                found[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = rows.clone()
        else:
            found[f"model.layers.{layer}.{names[inner]}.weight"] = tensor
    return found


def as_phi3(tensors):
    found = {}
    for name, tensor in as_llama(tensors).items():
        if name.endswith(".q_proj.weight"):
            stem = name.removesuffix("q_proj.weight")
            layer = name.split(".")[2]
            found[f"{stem}qkv_proj.weight"] = tensors[f"transformer.h.{layer}.attn.qkv.weight"]
            gate, up = (tensors[f"transformer.h.{layer}.mlp.fc_{number}.weight"] for number in (1, 2))
            found[f"model.layers.{layer}.mlp.gate_up_proj.weight"] = torch.cat([gate, up])
        elif not name.endswith(("k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            found[name] = tensor
    return found


def grouped(joint):
    """Group by group: two query heads, a key head, a value head, of width 4."""
    q, k, v = joint.split([16, 8, 8])
    rows = [torch.cat([q[8 * g : 8 * g + 8], k[4 * g : 4 * g + 4], v[4 * g : 4 * g + 4]]) for g in range(2)]
    return torch.cat(rows)


def as_falcon(tensors):
    names = {"attn.proj": "self_attention.dense", "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"}
    found = {"transformer.word_embeddings.weight": tensors["transformer.wte.weight"]}
    for name, tensor in tensors.items():
        if ".h." in name:
            _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
            joint = inner == "attn.qkv"
            new = "self_attention.query_key_value" if joint else names[inner]
            found[f"transformer.h.{layer}.{new}.weight"] = grouped(tensor) if joint else tensor
    return found | {"lm_head.weight": tensors["lm_head.weight"]}


def of_falcon(seed):
    kept = {name: tensor for name, tensor in weights(seed=seed).items() if "fc_2" not in name and tensor.ndim == 2}
    return {name.replace("fc_1", "fc"): tensor for name, tensor in kept.items()}


def check(source, tuned, base):
    matrices = {name for name in base if base[name].ndim == 2}
    assert {delta.name.partition("[")[0] for delta in source} == matrices
    for name in matrices:
        assert torch.equal(source[name].read().to_dense(), tuned[name].double() - base[name].double()), name


@pytest.mark.parametrize("side", ["tuned", "base"])
@pytest.mark.parametrize(
    ("made", "layout", "config"),
    [
        (lambda seed: weights(seed=seed), as_llama, {"model_type": "llama"}),
        (lambda seed: weights(seed=seed), as_phi3, {"model_type": "phi3"}),
        (of_falcon, as_falcon, {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2}),
    ],
)
def test_a_pair_of_which_one_is_litgpts(made, layout, config, side, tmp_path):
    base, tuned = made(0), made(1)
    folders = {}
    for name, tensors in (("base", base), ("tuned", tuned)):
        path = tmp_path / name
        folders[name] = (
            write_model(path, tensors)
            if name == side
            else write_checkpoint(path, layout(tensors), config=config | HEADS)
        )
    source = spectra.open_source(folders["tuned"], folders["base"], split=False)
    check(source, layout(tuned), layout(base))
    assert not source.coverage.warnings
    assert not source.coverage.tuned_only
    assert not source.coverage.base_only


def test_two_of_litgpts_are_compared_as_they_are(tmp_path):
    base, tuned = weights(seed=0), weights(seed=1)
    folders = write_model(tmp_path / "tuned", tuned), write_model(tmp_path / "base", base)
    check(spectra.open_source(*folders, split=False), tuned, base)
    apart = spectra.open_source(*folders)["transformer.h.0.attn.qkv.weight[k]"].read().to_dense()
    change = tuned["transformer.h.0.attn.qkv.weight"].double() - base["transformer.h.0.attn.qkv.weight"].double()
    assert torch.equal(apart, change[16:24])


def test_the_order_before_qkv_is_todays_once_opened(tmp_path):
    base, tuned = weights(seed=0), weights(seed=1)
    old = {
        name.replace("attn.qkv", "attn.attn"): grouped(tensor) if "attn.qkv" in name else tensor
        for name, tensor in tuned.items()
    }
    folders = write_model(tmp_path / "tuned", old), write_model(tmp_path / "base", base)
    check(spectra.open_source(*folders, split=False), tuned, base)
    lost = open_model(write_model(tmp_path / "lost", old, None))
    assert "put it back" in lost.broken["transformer.h.0.attn.qkv.weight"]
    assert "transformer.h.0.mlp.proj.weight" in lost.tensors


def test_a_peft_adapter_of_the_transformers_model_on_litgpts_base(tmp_path):
    base = weights()
    A, B = torch.randn(2, 16), torch.randn(8, 2)
    prefix = "base_model.model.model.layers.1.self_attn.v_proj"
    adapter = write_adapter(
        tmp_path / "a",
        {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B},
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2},
    )
    (found,) = spectra.open_source(adapter, write_model(tmp_path / "base", base))
    assert found.name == "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(found.base.read(), base["transformer.h.1.attn.qkv.weight"][24:].double())


def test_without_heads_on_either_side_the_joint_matrix_is_not_cut(tmp_path):
    tuned = write_model(tmp_path / "tuned", weights(seed=1), None)
    base = write_checkpoint(tmp_path / "base", as_llama(weights()), config={"model_type": "llama"})
    with pytest.raises(
        SourceError, match=r"which rows of transformer\.h\.0\.attn\.qkv\.weight are q, k and v is not known"
    ):
        spectra.open_source(tuned, base)


def test_a_fused_matrix_of_which_a_part_is_lost_is_refused_alone(tmp_path):
    tensors = {name: tensor for name, tensor in weights(seed=1).items() if name != "transformer.h.0.mlp.fc_2.weight"}
    base = write_checkpoint(tmp_path / "base", as_phi3(weights()), config={"model_type": "phi3"} | HEADS)
    source = spectra.open_source(write_model(tmp_path / "tuned", tensors), base)
    assert "its part up is not there" in source["model.layers.0.mlp.gate_up_proj.weight"].reason
    assert source["model.layers.1.mlp.gate_up_proj.weight[up]"].status == "ok"


def test_sizes_that_differ_are_said(tmp_path):
    base = as_llama(weights())
    config = {"model_type": "llama", "num_hidden_layers": 3} | HEADS
    tuned = write_model(tmp_path / "tuned", nudged(weights()))
    source = spectra.open_source(tuned, write_checkpoint(tmp_path / "base", base, config=config))
    assert any("the base has 3 layers, the tuned model has 2" in warning for warning in source.coverage.warnings)


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (litgpt_names.config(PARAMS), litgpt_names.Heads(4, 2, 4)),
        ({"num_attention_heads": 4, "hidden_size": 16}, litgpt_names.Heads(4, 4, 4)),
        ({"text_config": {"model_type": "x", **HEADS}}, litgpt_names.Heads(4, 2, 4)),
        ({"num_attention_heads": 4, "num_key_value_heads": 3, "hidden_size": 16}, None),
        ({"num_attention_heads": True, "hidden_size": 16}, None),
        ({}, None),
    ],
)
def test_heads_are_taken_from_either_kind_of_config(config, heads):
    assert litgpt_names.heads_of(json.loads(json.dumps(config))) == heads
