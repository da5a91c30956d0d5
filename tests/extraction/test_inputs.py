"""What can be extracted: adapters of any kind, sums of several updates, deltas, and runs that were stored."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import lora_folder
from support.extracted import truncated
from support.peft_oracle import Convolutions, make_oracle
from support.peft_oracle import tiny_model as plain

import spectra
from spectra.engine import decompose as engine
from spectra.errors import SelectionError, SourceError, SpectraError

Lora = peft.LoraConfig
ADAPTERS = {
    "lora": ("llama", Lora(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj", "embed_tokens"])),
    "rslora on Conv1D": ("gpt2", Lora(r=4, use_rslora=True, target_modules=["c_attn"], fan_in_fan_out=True)),
    "dora": ("bert", Lora(r=4, use_dora=True, target_modules=["query", "dense"])),
    "loha": ("gpt_neox", peft.LoHaConfig(r=2, target_modules=["query_key_value"])),
    "lokr": ("llama", peft.LoKrConfig(r=2, target_modules=["q_proj"])),
    "ia3": ("llama", peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])),
    "oft": ("llama", peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"])),
    "convolutions": (None, Lora(r=4, target_modules=["two", "one", "point", "linear"])),
}


def read_back(adapter, base, **options):
    return {delta.name: delta.read().to_dense() for delta in spectra.open_source(adapter, base, split=False, **options)}


@pytest.mark.parametrize("name", ADAPTERS)
def test_any_adapter_becomes_a_lora_whose_error_was_known(name, tmp_path):
    kind, config = ADAPTERS[name]
    oracle = make_oracle(tmp_path / "made", kind or Convolutions(), config)
    source = spectra.open_source(oracle.adapter, oracle.base)
    rows = spectra.extract(source, tmp_path / "out", rank=2, dtype="float64").set_index("name")
    found = read_back(tmp_path / "out", oracle.base)
    assert set(found) == set(oracle.deltas)
    for weight, delta in oracle.deltas.items():
        assert torch.allclose(found[weight], truncated(delta, 2), rtol=0, atol=1e-10 * float(delta.norm()))
        measured = float((found[weight] - delta).norm() / delta.norm())
        assert rows.relative_error[weight] == pytest.approx(measured, abs=3e-8)
    model = plain(kind) if kind else Convolutions()
    before = {weight: tensor.detach().clone() for weight, tensor in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    for weight, delta in oracle.deltas.items():
        got = merged[weight] - before[weight]
        assert float(got.norm()) == pytest.approx(float(truncated(delta, 2).norm()), rel=1e-9)


def test_without_a_base_an_adapter_keeps_its_own_names_and_says_its_own_base(tmp_path):
    lora_folder(tmp_path / "lora", seed=1)
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "org/model"}))
    spectra.extract(spectra.open_source(tmp_path / "lora"), tmp_path / "out", rank=2)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "org/model"
    assert written["target_modules"] == [f"model.layers.{layer}.self_attn.v_proj" for layer in range(2)]


def test_the_rank_of_the_factors_is_enough_to_lose_nothing(tmp_path):
    lora_folder(tmp_path / "lora", seed=1, rank=4)
    source = spectra.open_source(tmp_path / "lora")
    table = spectra.extract(source, tmp_path / "out", rank=6, dtype="float64")
    assert table["rank"].tolist() == [4, 4]
    assert table["clamped"].tolist() == ["rank 6 is more than ΔW has: 4"] * 2
    found = read_back(tmp_path / "out", None)
    for delta in source:
        assert torch.allclose(found[delta.name], delta.read().to_dense(), atol=1e-12)


@pytest.mark.parametrize("dense", [False, True])
def test_several_updates_are_added_up_exactly(dense, tmp_path):
    base = llama_tensors()
    write_checkpoint(tmp_path / "base", base)
    lora_folder(tmp_path / "a", seed=1)
    lora_folder(tmp_path / "b", seed=2)
    sources = [spectra.open_source(tmp_path / name, tmp_path / "base") for name in "ab"]
    if dense:
        write_checkpoint(tmp_path / "tuned", nudged(base))
        sources[1] = spectra.open_source(tmp_path / "tuned", tmp_path / "base")
    table = spectra.extract(sources, tmp_path / "out", rank=16, weights=[0.5, -2.0], dtype="float64")
    assert len(table) == (16 if dense else 2)
    found = read_back(tmp_path / "out", tmp_path / "base")
    for name in table["name"]:
        parts = [next((d.read().to_dense() for d in source if d.name == name), 0.0) for source in sources]
        expected = 0.5 * parts[0] - 2.0 * parts[1]
        assert torch.allclose(found[name], expected, rtol=0, atol=1e-12)


def test_sums_need_one_base_one_weight_each_and_equal_shapes(tmp_path):
    for place in "xy":
        write_checkpoint(tmp_path / place, llama_tensors())
    lora_folder(tmp_path / "a", seed=1)
    one, other = (spectra.open_source(tmp_path / "a", tmp_path / place) for place in "xy")
    with pytest.raises(SelectionError, match="different bases"):
        spectra.extract([one, other], tmp_path / "out", rank=1)
    with pytest.raises(SelectionError, match="1 weights for 2 updates"):
        spectra.extract([one, one], tmp_path / "out", rank=1, weights=[1.0])
    for nothing in ([], [3]):
        with pytest.raises(SelectionError, match="nothing to extract"):
            spectra.extract(nothing, tmp_path / "out", rank=1)


def test_deltas_in_memory(tmp_path):
    left, right = torch.randn(8, 3).double(), torch.randn(3, 6).double()
    deltas = [
        spectra.WeightDelta.from_factors("layers.0.q_proj.weight", left, right),
        spectra.WeightDelta.from_tensor("layers.1.q_proj.weight", left @ right),
    ]
    table = spectra.extract(deltas, tmp_path / "out", rank=3, dtype="float64")
    assert table["relative_error"].to_numpy() == pytest.approx([0, 0], abs=3e-8)
    for delta in read_back(tmp_path / "out", None).values():
        assert torch.allclose(delta, left @ right)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_stored_run_is_written_without_decomposing_anything(kind, tmp_path, monkeypatch):
    base, tuned = plain(kind, 0).float(), plain(kind, 1).float()
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    source = spectra.open_source(tmp_path / "tuned", tmp_path / "base")
    spectra.decompose(source, top=16, out=tmp_path / "run").collect()
    fresh = spectra.extract(source, tmp_path / "fresh", rank=3, dtype="float64")

    def refuse(*_, **__):
        raise AssertionError("decomposed again")

    monkeypatch.setattr(engine, "_side_by_side", refuse)
    stored = spectra.extract(tmp_path / "run", tmp_path / "out", rank=3, dtype="float64")
    planned = spectra.extract(spectra.load(tmp_path / "run"), None, parameters=3000, dry_run=True)
    assert planned["parameters"].sum() <= 3000
    fresh, stored = fresh.set_index("name"), stored.set_index("name")
    assert set(fresh.index) == set(stored.index)
    assert stored.relative_error.to_dict() == pytest.approx(fresh.relative_error.to_dict(), abs=3e-8)
    found, expected = (read_back(tmp_path / out, tmp_path / "base") for out in ("out", "fresh"))
    for name, delta in expected.items():
        assert torch.allclose(found[name], delta, rtol=0, atol=1e-7 * float(delta.norm()))


def test_of_parts_that_kept_few_vectors_the_error_is_that_of_what_was_written(tmp_path):
    for name, seed in (("base", 0), ("tuned", 1)):
        plain("gpt2", seed).float().save_pretrained(tmp_path / name)
    source = spectra.open_source(tmp_path / "tuned", tmp_path / "base")
    spectra.decompose(source, top=2, out=tmp_path / "run").collect()
    rows = spectra.extract(tmp_path / "run", tmp_path / "out", rank=4, dtype="float64").set_index("name")
    whole = spectra.open_source(tmp_path / "tuned", tmp_path / "base", split=False)
    for name, found in read_back(tmp_path / "out", tmp_path / "base").items():
        update = whole[name].read().to_dense()
        measured = float((found - update).norm() / update.norm())
        assert rows.relative_error[name] == pytest.approx(measured, abs=1e-9)
    fused = rows.loc["transformer.h.0.attn.c_attn.weight"]
    assert fused["rank"] == 4  # of the six that the three parts have together
    assert rows.loc["transformer.h.0.mlp.c_fc.weight"].clamped == "rank 4 is wanted, and 2 vectors are stored"


def test_spectra_in_memory_are_linear_layers_by_name(tmp_path, source):
    found = spectra.decompose(source, top=4).collect()
    table = spectra.extract(found, tmp_path / "out", rank=4, dtype="float64")
    assert len(table) == len(source)
    back = read_back(tmp_path / "out", tmp_path / "base")
    for delta in source:
        assert torch.allclose(back[delta.name], truncated(delta.read().to_dense(), 4), atol=1e-9)


def test_a_run_whose_files_are_gone_says_which(tmp_path, source):
    spectra.decompose(source, top=2, out=tmp_path / "run").collect()
    shutil.rmtree(tmp_path / "tuned")
    with pytest.raises(SourceError, match="cannot be opened any more"):
        spectra.extract(tmp_path / "run", tmp_path / "out", rank=1)


def test_heads_of_their_own_are_no_sum(tmp_path):
    left, right = torch.randn(8, 3), torch.randn(3, 6)
    deltas = [spectra.WeightDelta.from_factors(f"q_proj.weight[head{i}]", left, right) for i in range(2)]
    with pytest.raises(SpectraError, match="2 updates of one weight: choose one"):
        spectra.extract(deltas, tmp_path / "out", rank=1)


def test_a_part_without_its_base_has_no_place(tmp_path):
    delta = spectra.WeightDelta.from_tensor("h.0.attn.c_attn.weight[v]", torch.randn(4, 4))
    with pytest.raises(SpectraError, match="only the base tells"):
        spectra.extract([delta], tmp_path / "out", rank=1)
