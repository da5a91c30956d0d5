"""LitGPT's LoRA: whose rows are whose, where s is, bases in every layout, and what is refused."""

from __future__ import annotations

import pickle

import pytest
import torch
import yaml
from support.checkpoints import write_checkpoint
from support.litgpt import (
    HYPERPARAMETERS,
    PARAMS,
    ROWS,
    STARTS,
    joint_factors,
    joint_updates,
    weights,
    write_lora,
    write_model,
)

import spectra
from spectra.errors import SourceError

JOINT, UP = "transformer.h.0.attn.qkv", "transformer.h.0.mlp.fc_2"
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}


def close(found, expected):
    assert found.status == "ok", found.reason
    assert torch.allclose(found.read().to_dense(), expected, rtol=0, atol=1e-12 * float(expected.norm()))


def said(**options):
    return HYPERPARAMETERS | options


def switches(trained):
    return said(lora_query="q" in trained, lora_key="k" in trained, lora_value="v" in trained)


@pytest.mark.parametrize("trained", ["q", "k", "v", "qk", "kv", "qv", "qkv"])
def test_every_choice_of_q_k_and_v_against_a_llama_of_transformers(trained, tmp_path):
    tensors = joint_factors(JOINT, trained)
    names = {part: f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"}
    base = write_checkpoint(
        tmp_path / "base",
        {names[part]: torch.randn(rows, 16) for part, rows in ROWS.items()},
        config={"model_type": "llama", **HEADS},
    )
    source = spectra.open_source(write_lora(tmp_path / "a", tensors, switches(trained)), base)
    assert {delta.name for delta in source} == {names[part] for part in trained}
    for part, update in joint_updates(tensors, trained).items():
        close(source[names[part]], update)
        assert source[names[part]].base is not None


def by_group(rows):
    """Each group's two query heads, its key head, its value head, as GPT-NeoX and Falcon keep the joint matrix."""
    order = []
    for group in range(2):
        order += [*range(8 * group, 8 * group + 8), *range(16 + 4 * group, 20 + 4 * group)]
        order += range(24 + 4 * group, 28 + 4 * group)
    return rows[order]


FUSED = {
    "phi3": ("model.layers.0.self_attn.qkv_proj", list),
    "falcon": ("transformer.h.0.self_attention.query_key_value", by_group),
    "gpt_neox": ("gpt_neox.layers.0.attention.query_key_value", by_group),
    "unheard of": ("model.layers.0.self_attn.qkv_proj", list),
}


@pytest.mark.parametrize("kind", FUSED)
def test_bases_that_fuse_them(kind, tmp_path):
    """In the parts that a pair of checkpoints has: none for GPT-NeoX with groups, which it knows not, and strangers."""
    (fused, order), tensors = FUSED[kind], joint_factors(JOINT)
    config = {"model_type": kind, "new_decoder_architecture": True, "num_kv_heads": 2, **HEADS}
    weight, moved = (f"{fused}.weight", torch.zeros(32, 16, dtype=torch.float64))
    base = write_checkpoint(tmp_path / "base", {weight: torch.randn(32, 16)}, config=config)
    adapter = write_lora(tmp_path / "a", tensors)
    for part, update in joint_updates(tensors).items():
        moved[STARTS[part] : STARTS[part] + ROWS[part]] = update
    moved = by_group(moved) if order is by_group else moved
    (whole,) = spectra.open_source(adapter, base, split=False)
    close(whole, moved)
    assert whole.max_rank == 4
    assert len(pickle.dumps(whole)) < 10_000
    source = spectra.open_source(adapter, base)
    pair = spectra.open_source(base, base)
    assert {delta.name for delta in source} <= {delta.name for delta in pair}
    assert (len(source) == 2) == (kind in ("phi3", "falcon"))
    for part, update in joint_updates(tensors).items():
        if len(source) == 2:
            close(source[f"{weight}[{part}]"], update)
            assert torch.equal(source[f"{weight}[{part}]"].base.read(), pair[f"{weight}[{part}]"].base.read())


@pytest.mark.parametrize("split", [True, False])
def test_gate_and_up_of_a_base_that_fuses_them(split, tmp_path):
    A, B = torch.randn(2, 16), torch.randn(24, 2)
    name = "model.layers.0.mlp.gate_up_proj.weight"
    base = write_checkpoint(tmp_path / "base", {name: torch.randn(48, 16)}, config={"model_type": "phi3"})
    adapter = write_lora(tmp_path / "a", {f"{UP}.lora_A": A, f"{UP}.lora_B": B})
    (found,) = spectra.open_source(adapter, base, split=split)
    update = 3 * B.double() @ A.double()
    assert found.name == (f"{name}[up]" if split else name)
    close(found, update if split else torch.cat([torch.zeros(24, 16).double(), update]))


def test_kept_whole_without_a_base_the_parts_lie_in_the_joint_matrix(tmp_path):
    tensors = joint_factors(JOINT)
    (found,) = spectra.open_source(write_lora(tmp_path / "a", tensors), split=False)
    assert found.name == f"{JOINT}.weight"
    for part, update in joint_updates(tensors).items():
        rows = found.read().to_dense()[STARTS[part] : STARTS[part] + ROWS[part]]
        assert torch.allclose(rows, update, rtol=0, atol=1e-12)
    assert not found.read().to_dense()[16:24].any()


@pytest.mark.parametrize("params", [PARAMS, None])
def test_a_merge_of_the_joint_matrix_is_verified(params, tmp_path):
    tensors, base = joint_factors(JOINT), weights()
    merged, whole = dict(base), torch.zeros(32, 16)
    for part, update in joint_updates(tensors).items():
        whole[STARTS[part] : STARTS[part] + ROWS[part]] = update.float()
    merged[f"{JOINT}.weight"] = base[f"{JOINT}.weight"] + whole
    report = spectra.verify_merge(
        write_model(tmp_path / "base", base, params),
        write_lora(tmp_path / "a", tensors),
        write_model(tmp_path / "merged", merged, params),
    )
    assert report.verdict in ("exact", "rounded")


def test_other_modules_go_by_their_names(tmp_path):
    modules = {
        "transformer.h.0.attn.proj": ("model.layers.0.self_attn.o_proj", 16, 16),
        "transformer.h.0.mlp.fc_1": ("model.layers.0.mlp.gate_proj", 24, 16),
        "transformer.h.0.mlp.fc_2": ("model.layers.0.mlp.up_proj", 24, 16),
        "transformer.h.0.mlp.proj": ("model.layers.0.mlp.down_proj", 16, 24),
        "lm_head": ("lm_head", 32, 16),
    }
    tensors, held, expected = {}, {}, {}
    for module, (name, rows, columns) in modules.items():
        A, B = torch.randn(2, columns), torch.randn(rows, 2)
        tensors |= {f"{module}.lora_A": A, f"{module}.lora_B": B}
        held[f"{name}.weight"] = torch.randn(rows, columns)
        expected[f"{name}.weight"] = 3 * B.double() @ A.double()
    source = spectra.open_source(write_lora(tmp_path / "a", tensors), write_checkpoint(tmp_path / "base", held))
    assert {delta.name for delta in source} == set(expected)
    for name, update in expected.items():
        close(source[name], update)


def test_factors_of_the_time_before_qkv_are_stacked_as_well(tmp_path):
    tensors = joint_factors(JOINT)
    old = {name.replace("attn.qkv", "attn.attn"): tensor for name, tensor in tensors.items()}
    source = spectra.open_source(write_lora(tmp_path / "a", old))
    for part, update in joint_updates(tensors).items():
        close(source[f"{JOINT}.weight[{part}]"], update)


def test_the_folder_that_litgpt_merged_into_is_read_as_the_adapter(tmp_path):
    folder = write_model(write_lora(tmp_path / "a", joint_factors(JOINT)), weights())
    source = spectra.open_source(folder)
    assert source.kind == "litgpt"
    assert any("left out lit_model.pth" in warning for warning in source.coverage.warnings)


def test_without_hyperparameters_s_must_be_given_and_all_three_trained(tmp_path):
    adapter = write_lora(tmp_path / "a", joint_factors(JOINT, "qkv"), None)
    with pytest.raises(SourceError, match=r"no hyperparameters.yaml beside it.*pass scale= \(--scale\)"):
        spectra.open_source(adapter)
    source = spectra.open_source(adapter, scale=0.5)
    torch.manual_seed(0)
    assert {delta.name for delta in source} == {f"{JOINT}.weight[{part}]" for part in "qkv"}
    (found,) = spectra.open_source(write_lora(tmp_path / "b", joint_factors(JOINT), None), scale=0.5)
    assert "holds factors for 2 of q, k and v" in found.reason


def test_a_scale_beside_the_hyperparameters_is_ignored_and_said(tmp_path):
    tensors = joint_factors(JOINT)
    source = spectra.open_source(write_lora(tmp_path / "a", tensors), scale=9.0)
    close(source[f"{JOINT}.weight[q]"], joint_updates(tensors)["q"])
    assert any("scale was ignored" in warning for warning in source.coverage.warnings)


@pytest.mark.parametrize(
    ("config", "params", "words"),
    [
        (switches("qkv"), PARAMS, "of q, k and v was trained: q, k, v; transformer.h.0.attn.qkv has 2"),
        (said(lora_r=4), PARAMS, "says lora_r = 4, the factors of transformer.h.0.attn.qkv have 2"),
        (said(), None, "neither a model_config.yaml beside the file nor the base's config says"),
        (said(), PARAMS | {"n_head": 2, "n_query_groups": 2}, "make 16 rows of q, v, lora_B of"),
    ],
)
def test_what_the_files_contradict_or_lack_is_refused(config, params, words, tmp_path):
    (found,) = spectra.open_source(write_lora(tmp_path / "a", joint_factors(JOINT), config, params))
    assert words in found.reason


@pytest.mark.parametrize(
    "options", [{"lora_alpha": None}, {"lora_alpha": float("nan")}, {"lora_r": 0}, {"lora_r": "x"}]
)
def test_hyperparameters_that_are_no_numbers_are_an_error(options, tmp_path):
    with pytest.raises(SourceError, match=r"hyperparameters.yaml says lora_alpha = "):
        spectra.open_source(write_lora(tmp_path / "a", joint_factors(JOINT), said(**options)))


@pytest.mark.parametrize(
    "text", ["[1, 2]", "{", "a: &a [*a", "\x00", "[" * 100_000, "!!python/object/apply:os.system [ls]"]
)
def test_yaml_that_is_no_object_is_an_error_of_one_line(text, tmp_path):
    folder = write_lora(tmp_path / "a", joint_factors(JOINT))
    (folder / "hyperparameters.yaml").write_text(text)
    with pytest.raises(SourceError, match=r"hyperparameters\.yaml") as caught:
        spectra.open_source(folder)
    assert "\n" not in str(caught.value)


def test_a_base_of_other_rows_is_a_mismatch(tmp_path):
    base = write_checkpoint(
        tmp_path / "base", {"model.layers.0.self_attn.qkv_proj.weight": torch.randn(48, 16)}, config=HEADS
    )
    source = spectra.open_source(write_lora(tmp_path / "a", joint_factors(JOINT)), base)
    assert {delta.status for delta in source} == {"shape_mismatch"}


@pytest.mark.parametrize("name", [f"{JOINT}.lora_C", "transformer.h.0.attn.qkv.scores"])
def test_a_tensor_that_no_rule_knows_takes_the_number_of_every_part(name, tmp_path):
    source = spectra.open_source(write_lora(tmp_path / "a", joint_factors(JOINT) | {name: torch.ones(2, 2)}))
    assert all("is no part of" in delta.reason for delta in source)


def test_the_yaml_of_the_real_trainer_has_nested_parts(tmp_path):
    folder = write_lora(tmp_path / "a", joint_factors(JOINT))
    nested = said(train={"epochs": 5, "lr": 1e-4}, data={"class_path": "litgpt.data.Alpaca"}, logger_name="csv")
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(nested))
    assert {delta.status for delta in spectra.open_source(folder)} == {"ok"}
