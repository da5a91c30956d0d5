"""What a LoRA cannot carry is listed with its reason, and no more than that; modules can be kept whole instead."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.extracted import assert_close, make_pair, truncated
from support.merges import peft_merge
from support.peft_oracle import tiny_model as plain

import spectra
from spectra.errors import SelectionError

NORM = "model.layers.0.input_layernorm.weight"


def folders(tmp_path, change):
    """A small LLaMA and a copy of it that `change` made."""
    base = llama_tensors()
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", change(dict(base)))
    return spectra.open_source(tmp_path / "tuned", tmp_path / "base")


def test_vectors_that_moved_are_listed_and_those_that_did_not_are_not(tmp_path):
    def change(tensors):
        moved = nudged(tensors)
        return moved | {"model.norm.weight": tensors["model.norm.weight"]}

    table = spectra.extract(folders(tmp_path, change), tmp_path / "out", rank=2)
    left = table.attrs["not_carried"]
    assert left[NORM] == "a vector, not a matrix, which tuning changed"
    assert "model.norm.weight" not in left


def test_everything_that_was_not_paired_is_listed(tmp_path):
    def change(tensors):
        del tensors["lm_head.weight"]
        return nudged(tensors) | {"score.weight": torch.ones(3, 16), "model.layers.1.mlp.up_proj.weight": torch.ones(7)}

    left = spectra.extract(folders(tmp_path, change), tmp_path / "out", rank=2).attrs["not_carried"]
    assert left["score.weight"] == "not in the base"
    assert "lm_head.weight" in left
    assert left["model.layers.1.mlp.up_proj.weight"].startswith("shape_mismatch: tuned is [7], base is")


def test_a_matrix_without_numbers_is_listed_and_the_others_are_written(tmp_path):
    bad = "model.layers.0.mlp.up_proj.weight"

    def change(tensors):
        moved = nudged(tensors)
        moved[bad][0, 0] = float("nan")
        return moved

    for rule in ({"rank": 2}, {"energy": 0.5}):
        name = next(iter(rule))
        table = spectra.extract(folders(tmp_path, change), tmp_path / name, **rule)
        assert bad not in set(table["name"])
        assert table.attrs["not_carried"][bad] == "nonfinite: 1 entries are NaN or infinite"
        assert len(table) == 15


def test_an_unchanged_matrix_has_a_row_and_no_lora(tmp_path):
    same = "model.layers.0.mlp.up_proj.weight"
    source = folders(tmp_path, lambda tensors: nudged(tensors) | {same: tensors[same]})
    rows = spectra.extract(source, tmp_path / "out", rank=2).set_index("name")
    assert rows.loc[same, ["rank", "relative_error", "clamped"]].tolist() == [0, 0.0, "unchanged: ΔW = 0"]
    assert same not in rows.attrs["not_carried"]
    assert not [key for key in load_file(tmp_path / "out" / "adapter_model.safetensors") if "0.mlp.up_proj" in key]


def test_what_the_noise_drowns_is_left_out_and_listed(tmp_path):
    tiny = "model.layers.0.mlp.up_proj.weight"

    def change(tensors):
        torch.manual_seed(0)
        strong = {name: (t + 0.3 * torch.ones_like(t)).bfloat16() for name, t in tensors.items()}
        return strong | {tiny: tensors[tiny].bfloat16()}  # rounding and nothing else

    rows = spectra.extract(folders(tmp_path, change), tmp_path / "out", above_noise=True).set_index("name")
    assert rows.loc[tiny, "rank"] == 0
    assert rows.attrs["not_carried"][tiny] == "no value is above the storage rounding"
    assert set(rows["rank"].drop(tiny)) == {1}


def test_where_no_rounding_edge_is_known_all_is_kept_and_that_is_said(tmp_path):
    name = "model.layers.0.self_attn.v_proj.weight"
    torch.manual_seed(0)
    base = torch.randn(32, 128)
    coded = torch.randint(-100, 100, (32, 128)) * 0.013  # codes times a scale, as a decoded file has them
    for folder, tensors in (("base", base), ("coded", coded), ("bf16", (base * 1.1).bfloat16())):
        write_checkpoint(tmp_path / folder, {name: tensors.contiguous()})

    def row(folder):
        source = spectra.open_source(tmp_path / folder, tmp_path / "base")
        return spectra.extract(source, None, above_noise=True, dry_run=True).iloc[0]

    assert row("coded")["rank"] == 32
    why = "tuned holds codes times scales, whose rounding is not known"
    assert row("coded")["note"].endswith(f"no edge of storage rounding is known ({why}): all values are kept")
    assert "no edge" not in row("bf16")["note"]


def test_nothing_to_write_is_an_error_that_says_why(tmp_path):
    source = folders(tmp_path, lambda tensors: tensors)
    with pytest.raises(SelectionError, match=r"nothing to write: no matrix keeps a rank, for example .*unchanged"):
        spectra.extract(source, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_modules_that_are_kept_whole_come_back_with_the_lora(kind, tmp_path):
    pair = make_pair(tmp_path, lambda: plain(kind).float())
    source = spectra.open_source(pair.tuned, pair.base)
    table = spectra.extract(source, tmp_path / "out", rank=3, save_modules=True)
    merged = pair.merged(tmp_path / "out")
    whole, left = table.attrs["modules_to_save"], table.attrs["not_carried"]
    assert whole
    for name in pair.before:
        module = name.rpartition(".")[0]
        if module in whole or name.endswith(".bias"):
            assert_close(merged[name], pair.update(name))
        else:
            assert_close(merged[name], truncated(pair.update(name), 3))
    assert not left
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["bias"] == ("lora_only" if kind == "bert" else "none")


def test_biases_that_an_adapter_trained_stay_beside_the_smaller_lora(tmp_path):
    lora = peft.LoraConfig(r=4, target_modules=["query", "dense"], bias="lora_only")
    merge = peft_merge(tmp_path, lora, kind="bert")
    source = spectra.open_source(merge.adapter, merge.base)
    assert len(spectra.extract(source, tmp_path / "plain", rank=4).attrs["not_carried"]) == 9
    assert not spectra.extract(source, tmp_path / "out", rank=4, save_modules=True).attrs["not_carried"]
    model = peft.PeftModel.from_pretrained(plain("bert").float(), tmp_path / "out").merge_and_unload()
    loaded = model.state_dict()
    for name, expected in merge.weights("merged").items():
        assert torch.allclose(loaded[name], expected, atol=1e-6), name


def test_biases_of_modules_without_a_lora_are_kept_without_their_weights(tmp_path):
    pair = make_pair(tmp_path, lambda: plain("bert").float())
    source = spectra.open_source(pair.tuned, pair.base).select("layer.0.attention.self.query")
    left = spectra.extract(source, tmp_path / "out", rank=2, save_modules=True).attrs["not_carried"]
    assert not left
    merged = pair.merged(tmp_path / "out")
    assert_close(
        merged["bert.encoder.layer.1.output.dense.bias"], pair.update("bert.encoder.layer.1.output.dense.bias")
    )
    matrices = [name for name, delta in merged.items() if delta.ndim > 1]
    assert matrices == ["bert.encoder.layer.0.attention.self.query.weight"]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["bias"] == "all"


@pytest.mark.parametrize(("count", "weights"), [(2, None), (2, [0.5, 0.5]), (1, [0.5])])
def test_modules_of_a_sum_are_not_kept_as_one_summand_has_them(count, weights, tmp_path):
    pair = make_pair(tmp_path, lambda: plain("llama").float())
    sources = [spectra.open_source(pair.tuned, pair.base)] * count
    with pytest.raises(SelectionError, match="weighted sum"):
        spectra.extract(sources, tmp_path / "out", rank=3, weights=weights, save_modules=True)
    assert not (tmp_path / "out").exists()


def test_a_head_that_an_adapter_saves_whole_is_kept_without_a_base(tmp_path):
    tensors = {
        "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight": torch.randn(2, 16),
        "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight": torch.randn(8, 2),
        "base_model.model.score.weight": torch.randn(3, 16),
    }
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["score"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    source = spectra.open_source(tmp_path / "lora")
    assert "score.weight" in spectra.extract(source, tmp_path / "plain", rank=1).attrs["not_carried"]
    spectra.extract(source, tmp_path / "out", rank=1, save_modules=True)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.score.weight"], tensors["base_model.model.score.weight"])
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
