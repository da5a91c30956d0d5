"""FSDP's rank files: joined to the whole bit for bit, or refused; a DTensor is never taken for a plain tensor."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support.checkpoints import llama_tensors, nudged, write_adapter, write_checkpoint
from support.distributed import part, rank_of, write_ranks
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import spectra
from spectra.errors import NotFoundError, SourceError
from spectra.files.folder import open_folder

TENSORS = {
    "a.weight": torch.arange(40.0).reshape(10, 4),
    "few.weight": torch.randn(2, 3),  # fewer rows than ranks
    "b.weight": torch.randn(8, 6).bfloat16(),
    "norm.weight": torch.randn(5),
    "ids": torch.arange(6),
}


def read(folder):
    found = open_folder(folder)
    assert found.broken == {}
    return {name: ref.read() for name, ref in found.tensors.items()}


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_parts_along_rows_are_joined(tmp_path, world):
    assert_equal(read(write_ranks(tmp_path, TENSORS, [world], lambda name: [Shard(0)])), TENSORS)


@pytest.mark.parametrize(
    "placements",
    [[Replicate(), Shard(0)], [Shard(0), Replicate()], [Replicate(), Replicate()], [Replicate(), Shard(1)]],
    ids=str,
)
def test_replicas_and_the_other_axis(tmp_path, placements):
    matrices = {name: tensor for name, tensor in TENSORS.items() if tensor.ndim == 2}
    assert_equal(read(write_ranks(tmp_path, matrices, [2, 3], lambda name: placements)), matrices)


def test_a_mesh_that_is_one_axis_of_a_larger_one(tmp_path):
    """Ranks of the other axis hold replicas, and the placements do not say so."""
    for rank in range(6):
        with rank_of(rank, [2, 3]) as mesh:
            held = {name: part(tensor, mesh["fsdp"], [Shard(0)]) for name, tensor in TENSORS.items()}
            torch.save(held, tmp_path / f"model_world_size_6_rank_{rank}.pt")
    assert_equal(read(tmp_path), TENSORS)


@pytest.mark.parametrize("placement", [Partial(), _StridedShard(0, split_factor=2)], ids=str)
def test_other_placements_are_refused_by_name(tmp_path, placement):
    folder = write_ranks(tmp_path, {"a.weight": torch.randn(4, 4)}, [2], lambda name: [placement])
    found = open_folder(folder)
    assert list(found.broken) == ["a.weight"]
    assert type(placement).__name__ in found.broken["a.weight"]
    assert "verl.model_merger" in found.broken["a.weight"]


def test_two_cuts_are_refused(tmp_path):
    found = open_folder(write_ranks(tmp_path, TENSORS, [2, 2], lambda name: [Shard(0), Shard(0)]))
    assert not found.tensors
    assert all("cut along two axes of the ranks (Shard(0), Shard(0))" in why for why in found.broken.values())


def test_a_part_of_a_tensor_is_read_as_that_part(tmp_path):
    whole = torch.randn(7, 4)
    for world in (1, 3):
        folder = write_ranks(tmp_path / str(world), {"a": whole}, [world], lambda name: [Shard(0)])
        ref = open_folder(folder).tensors["a"]
        assert torch.equal(ref.rows(2, 6).read(), whole[2:6])
        assert torch.equal(ref.rows(2, 6).T.rows(1, 3).read(), whole[2:6].T[1:3])


def test_other_weights_beside_rank_files_are_said(tmp_path):
    folder = write_ranks(tmp_path, TENSORS, [2], lambda name: [Shard(0)])
    torch.save({"lr": torch.ones(1)}, folder / "optim_world_size_2_rank_0.pt")
    assert open_folder(folder).warnings == ()
    torch.save({"x.weight": torch.eye(2)}, folder / "critic.pt")
    (warning,) = open_folder(folder).warnings
    assert "took the rank files and left out critic.pt" in warning


def test_a_pair_has_the_spectrum_of_the_whole(tmp_path):
    base, tuned = llama_tensors(), nudged(llama_tensors())
    config = {"model_type": "llama", "num_attention_heads": 4}
    folder = write_ranks(tmp_path / "actor", tuned, [3], lambda name: [Shard(0)])
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / "config.json").write_text(json.dumps(config))
    torch.save({"lr": 1.0}, folder / "optim_world_size_3_rank_0.pt")
    source = spectra.open_source(folder, write_checkpoint(tmp_path / "base", base, config=config))
    assert {delta.name for delta in source} == {name for name, tensor in base.items() if tensor.ndim == 2}
    for delta in source:
        assert torch.equal(delta.read().to_dense(), tuned[delta.name].double() - base[delta.name].double())
    assert open_folder(folder).config == config
    assert pickle.loads(pickle.dumps(source.deltas[0])).read().to_dense().shape == source.deltas[0].shape


def test_an_adapter_in_rank_files(tmp_path):
    """verl saves LoRA's config in a folder beside the rank files."""
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    A, B = torch.randn(2, 16), torch.randn(16, 2)
    held = {f"{q}.lora_A.default.weight": A, f"{q}.lora_B.default.weight": B}
    folder = write_ranks(tmp_path, held, [2], lambda name: [Shard(0)])
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    write_adapter(tmp_path / "lora_adapter", {"unused": A}, config)
    (delta,) = spectra.open_source(folder)
    assert torch.allclose(delta.read().to_dense(), 3 * B.double() @ A.double(), rtol=1e-12)


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_missing_rank_is_refused(tmp_path, lost):
    folder = write_ranks(tmp_path, TENSORS, [4], lambda name: [Shard(0)])
    (folder / f"model_world_size_4_rank_{lost}.pt").unlink()
    with pytest.raises(NotFoundError, match=f"3 of 4 rank files.* missing ones here, of rank {lost}$"):
        open_folder(folder)


def test_one_rank_alone_is_refused(tmp_path):
    folder = write_ranks(tmp_path, TENSORS, [2], lambda name: [Shard(0)])
    with pytest.raises(SourceError, match=r"rank_1\.pt is what one FSDP rank holds.*name the folder"):
        open_folder(folder / "model_world_size_2_rank_1.pt")
    one = write_ranks(tmp_path / "one", TENSORS, [1], lambda name: [Shard(0)])
    assert_equal(read(one / "model_world_size_1_rank_0.pt"), TENSORS)


def test_files_of_two_saves_are_refused(tmp_path):
    for world in (1, 2):
        write_ranks(tmp_path, TENSORS, [world], lambda name: [Shard(0)])
    with pytest.raises(SourceError, match="several saves, of 1 and 2 ranks"):
        open_folder(tmp_path)
    for number, rows in enumerate((10, 8)):  # the same number of ranks, other shapes
        other = write_ranks(tmp_path / str(number), {"a.weight": torch.randn(rows, 4)}, [2], lambda name: [Shard(0)])
    (other / "model_world_size_2_rank_0.pt").write_bytes((tmp_path / "0" / "model_world_size_2_rank_0.pt").read_bytes())
    assert "not of one save" in open_folder(other).broken["a.weight"]


def test_the_rank_in_the_name_does_not_decide(tmp_path):
    """The mesh in the file says which part it is; a renamed file cannot exchange rows."""
    folder = write_ranks(tmp_path, TENSORS, [2], lambda name: [Shard(0)])
    first, second = (folder / f"model_world_size_2_rank_{rank}.pt" for rank in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert_equal(read(folder), TENSORS)
    first.write_bytes(content)  # the same part twice
    assert "should hold" in open_folder(folder).broken["a.weight"]


def test_a_plain_matrix_in_several_rank_files_is_refused(tmp_path):
    for rank in (0, 1):
        torch.save({"a.weight": torch.eye(3), "b": torch.ones(3)}, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    found = open_folder(tmp_path)
    assert "plain tensor, which does not say whether" in found.broken["a.weight"]
    torch.save({"a.weight": torch.eye(3)}, tmp_path / "model_world_size_1_rank_0.pt")
    assert torch.equal(open_folder(tmp_path / "model_world_size_1_rank_0.pt").tensors["a.weight"].read(), torch.eye(3))


def test_flat_parameters_are_refused_by_name(tmp_path):
    """What FSDP1 saves as LOCAL_STATE_DICT."""
    for rank in (0, 1):
        torch.save({"layers.0._flat_param": torch.ones(9)}, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    with pytest.raises(SourceError, match=r"flat parameters \(layers\.0\._flat_param\).*SHARDED_STATE_DICT"):
        open_folder(tmp_path)


def test_names_that_are_no_rank_files(tmp_path):
    for name in ("model_world_size_0_rank_0.pt", "model_world_size_2_rank_x.pt"):
        torch.save({"a.weight": torch.eye(3)}, tmp_path / name)
        assert list(open_folder(tmp_path).tensors) == ["a.weight"]
        (tmp_path / name).unlink()
    torch.save({}, tmp_path / "model_world_size_2_rank_5.pt")
    with pytest.raises(NotFoundError, match="of rank 0, 1"):
        open_folder(tmp_path)


def test_a_tensor_that_some_ranks_lack(tmp_path):
    folder = write_ranks(tmp_path, TENSORS, [2], lambda name: [Shard(0)])
    with rank_of(1, [2]) as mesh:
        held = {name: part(tensor, mesh, [Shard(0)]) for name, tensor in TENSORS.items() if name != "a.weight"}
        torch.save(held, folder / "model_world_size_2_rank_1.pt")
    found = open_folder(folder)
    assert set(found.broken) == {"a.weight"}
    assert "rank_1.pt" in found.broken["a.weight"]


def test_code_in_a_rank_file_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a.weight": Evil(), "b.weight": torch.eye(2)}, tmp_path / "model_world_size_1_rank_0.pt")
    found = open_folder(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert set(found.broken) == {"a.weight"}
    assert torch.equal(found.tensors["b.weight"].read(), torch.eye(2))


def test_a_storage_of_another_size_than_the_pickle_says_is_damage(tmp_path):
    """A flipped bit in the pickle must not lead to another tensor's bytes."""
    torch.save({"a.weight": torch.randn(3, 4), "b.weight": torch.randn(5, 4)}, tmp_path / "plain.zip")
    with zipfile.ZipFile(tmp_path / "plain.zip") as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(tmp_path / "model_world_size_1_rank_0.pt", "w", zipfile.ZIP_STORED) as new:
        for name, content in records.items():
            swapped = content.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001") if name.endswith("pkl") else content
            assert (swapped != content) == name.endswith("pkl")
            new.writestr(name, swapped)
    found = open_folder(tmp_path)
    assert set(found.tensors) == {"b.weight"}
    assert "does not hold its entries" in found.broken["a.weight"]


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "pickle", "compressed"])
def test_a_damaged_rank_file_is_one_message(tmp_path, damage):
    folder = write_ranks(tmp_path, TENSORS, [2], lambda name: [Shard(0)])
    file = folder / "model_world_size_2_rank_1.pt"
    content = file.read_bytes()
    if damage == "compressed":
        with zipfile.ZipFile(folder / "model_world_size_2_rank_0.pt") as old:
            records = {info.filename: old.read(info) for info in old.infolist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
            for name, record in records.items():
                new.writestr(name, record)
    else:
        damaged = {"cut": content[: len(content) // 2], "noise": bytes(range(256)) * 9, "empty": b""}
        file.write_bytes(damaged.get(damage, pickle.dumps({"a": 1})))
    with pytest.raises(SourceError, match=r"model_world_size_2_rank_1\.pt") as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("imported", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_dtensor_in_another_file_is_no_plain_tensor(tmp_path, imported, name):
    """Whether its classes are imported or not; torch would say that a part has the whole's shape."""
    with rank_of(0, [2]) as mesh:
        torch.save({"a.weight": part(torch.randn(4, 4), mesh, [Shard(0)])}, tmp_path / name)
    code = (
        f"import spectra.files.folder as f\ntry: f.open_folder({str(tmp_path)!r})\nexcept f.SourceError as e: print(e)"
    )
    if imported:
        code = "import torch.distributed.tensor\n" + code
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "holds distributed tensors" in done.stdout
    assert "full_tensor()" in done.stdout


def test_listing_needs_no_torch(tmp_path):
    folder = write_ranks(tmp_path, TENSORS, [2], lambda name: [Shard(0)])
    counted = f"len(f.open_folder({str(folder)!r}).tensors)"
    code = f"import sys, spectra.files.folder as f\nprint({counted}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(TENSORS)), "False"]
