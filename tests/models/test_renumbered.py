"""Layers under other numbers: added, dropped and moved ones are found by what they hold."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import llama_tensors, nudged, write_checkpoint

import spectra
from spectra.files.folder import open_folder
from spectra.models.matrices import weights_of
from spectra.models.renumbered import renumbered

ADDED = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # what block expansion sets to zero


def rebuilt(tensors, plan):
    """A model whose layer i is the tensors' layer plan[i]; a pair (layer, function) changes it on the way."""
    kept = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    for new, item in enumerate(plan):
        old, change = item if isinstance(item, tuple) else (item, lambda rest, tensor: tensor)
        before = f"model.layers.{old}."
        for name, tensor in tensors.items():
            if name.startswith(before):
                rest = name.removeprefix(before)
                kept[f"model.layers.{new}.{rest}"] = change(rest, tensor).clone()
    return kept


def zeroed(rest, tensor):
    return torch.zeros_like(tensor) if rest in ADDED else tensor


def trained(rest, tensor):
    return tensor + 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(rest)))


def compared(folder, plan, layers=4, base_prefix="model.", suffix="safetensors"):
    base = llama_tensors(layers)
    tuned = rebuilt(base, plan)
    folders = []
    for side, tensors in (("tuned", tuned), ("base", base)):
        write_checkpoint(folder / side, tensors)
        if suffix == "bin":
            (folder / side / "model.safetensors").unlink()
            torch.save(tensors, folder / side / "pytorch_model.bin")
        folders.append(open_folder(folder / side))
    weights = [weights_of(one, two, split_experts=True) for one, two in (folders, folders[::-1])]
    return tuned, base, renumbered(*weights)


def sources(found, rest="self_attn.q_proj.weight"):
    """Tuned layer → the layer of the base that it is compared with, for one matrix of each."""
    result = {}
    for key in found.tuned:
        if key.endswith(rest) and key in found.base:
            note = found.notes.get(key)
            result[int(key.split(".")[2])] = int(note.split(".")[2]) if note else int(key.split(".")[2])
    return result


def check_values(tuned, base, found):
    """Every pair is read from where its note says."""
    for key in found.tuned.keys() & found.base.keys():
        ref = found.base[key].ref
        note = found.notes.get(key)
        name = note.split()[2] if note else key
        assert torch.equal(ref.read(), base[name]), key
        assert found.base[key].name == key


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_block_expansion(tmp_path, suffix):
    tuned, base, found = compared(tmp_path, [0, 1, (1, zeroed), 2, 3, (3, zeroed)], suffix=suffix)
    assert sources(found) == {0: 0, 1: 1, 2: 1, 3: 2, 4: 3, 5: 3}
    assert set(found.tuned_only) == {f"model.layers.{layer}.{rest}" for layer in (2, 5) for rest in ADDED}
    check_values(tuned, base, found)
    for key in found.tuned.keys() & found.base.keys():
        assert torch.equal(found.tuned[key].ref.read(), found.base[key].ref.read()), key
    assert len(found.warnings) == 1
    assert "the base has 4 layers model.layers.N, the tuned model 6" in found.warnings[0]


def test_the_zeroed_copy_is_the_added_one_wherever_it_stands(tmp_path):
    _, _, found = compared(tmp_path, [(0, zeroed), 0, 1, 2, 3])
    assert set(found.tuned_only) == {f"model.layers.0.{rest}" for rest in ADDED}


def test_pruning(tmp_path):
    tuned, base, found = compared(tmp_path, [0, 2, 3])
    assert sources(found) == {0: 0, 1: 2, 2: 3}
    assert len(found.base_only) == 8
    assert all(name.startswith("model.layers.1.") for name in found.base_only)
    check_values(tuned, base, found)


def test_a_trained_layer_between_two_that_moved_alike_moved_with_them(tmp_path):
    tuned, base, found = compared(tmp_path, [1, (2, trained), 3], layers=4)
    assert sources(found) == {0: 1, 1: 2, 2: 3}
    check_values(tuned, base, found)


def test_a_trained_layer_at_a_cut_has_no_counterpart(tmp_path):
    _, _, found = compared(tmp_path, [0, (1, trained), 4, 5], layers=6)
    assert sources(found) == {0: 0, 2: 4, 3: 5}
    assert all("no layer of the base holds the same" in why for why in found.tuned_only.values())
    assert len(found.tuned_only) == 8


def test_a_partly_trained_layer_is_still_found_and_its_difference_kept(tmp_path):
    partly = lambda rest, tensor: trained(rest, tensor) if rest.startswith("mlp") else tensor  # noqa: E731
    tuned, base, found = compared(tmp_path, [0, (2, partly), 3])
    assert sources(found, "mlp.up_proj.weight") == {0: 0, 1: 2, 2: 3}
    check_values(tuned, base, found)


def test_nothing_equal_is_left_as_it_is(tmp_path):
    tuned = {name: tensor for name, tensor in nudged(llama_tensors(4)).items() if ".layers.3." not in name}
    base = llama_tensors(4)
    folders = [open_folder(write_checkpoint(tmp_path / side, t)) for side, t in (("t", tuned), ("b", base))]
    weights = [weights_of(one, two, split_experts=True) for one, two in (folders, folders[::-1])]
    found = renumbered(*weights)
    assert (found.tuned, found.base) == tuple(weights)
    assert not any((found.notes, found.tuned_only, found.base_only, found.warnings))


def test_the_same_number_of_layers_reads_nothing(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("read")

    base = llama_tensors(2)
    folders = [open_folder(write_checkpoint(tmp_path / side, base)) for side in "tb"]
    weights = [weights_of(one, two, split_experts=True) for one, two in (folders, folders[::-1])]
    monkeypatch.setattr("spectra.files.tensors.TensorRef.read", refuse)
    assert renumbered(*weights).base == weights[1]


def test_only_rows_are_read(tmp_path, monkeypatch):
    read = []
    original = type(next(iter(open_folder(write_checkpoint(tmp_path / "x", llama_tensors(1))).tensors.values()))).read

    def counted(ref, device="cpu"):
        read.append(ref.numel)
        return original(ref, device)

    monkeypatch.setattr("spectra.files.tensors.TensorRef.read", counted)
    compared(tmp_path, [0, 2, 3])
    assert len(read) == 3 * (3 + 4)  # three rows of one matrix of each layer
    assert set(read) == {16}


def test_zeros_and_ones_are_no_evidence(tmp_path):
    ones = lambda rest, tensor: torch.ones_like(tensor)  # noqa: E731
    base = rebuilt(llama_tensors(4), [(layer, ones) for layer in range(4)])
    tuned = rebuilt(base, [0, 1, 2])
    folders = [open_folder(write_checkpoint(tmp_path / side, t)) for side, t in (("t", tuned), ("b", base))]
    weights = [weights_of(one, two, split_experts=True) for one, two in (folders, folders[::-1])]
    assert not renumbered(*weights).warnings


def test_a_source_reports_no_update_of_weights_that_only_moved(tmp_path):
    base = llama_tensors(4)
    write_checkpoint(tmp_path / "base", base)
    for name, plan in {"expanded": [0, 1, (1, zeroed), 2, 3, (3, zeroed)], "pruned": [0, 2, 3]}.items():
        source = spectra.open_source(write_checkpoint(tmp_path / name, rebuilt(base, plan)), tmp_path / "base")
        assert {spectrum.status for spectrum in spectra.decompose(source)} == {"unchanged"}
        assert len({delta.name for delta in source}) == len(source)
        moved = source["model.layers.2.self_attn.q_proj.weight"]
        original = {"expanded": 1, "pruned": 3}[name]
        assert moved.note == (
            f"compared with model.layers.{original}.self_attn.q_proj.weight of the base: the layers were renumbered"
        )
        assert any("paired by content" in line for line in source.coverage.warnings)


def test_an_absurd_number_in_a_name_is_no_layer(tmp_path):
    base = llama_tensors(2) | {f"model.layers.{'9' * 5000}.weight": torch.ones(2, 2)}
    folders = [open_folder(write_checkpoint(tmp_path / side, t)) for side, t in (("t", llama_tensors(1)), ("b", base))]
    weights = [weights_of(one, two, split_experts=True) for one, two in (folders, folders[::-1])]
    assert len(renumbered(*weights).base) > 0
