"""Folders of torch.distributed.checkpoint: tensor by tensor what torch's own converter gives, or refused."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from torch.distributed.checkpoint import FileSystemWriter, filesystem, metadata
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import spectra
from spectra.errors import NotFoundError, SourceError
from spectra.files import dcp as ours
from spectra.files.folder import open_folder

MODEL = {
    "model.layers.0.weight": torch.randn(6, 4),
    "model.norm.weight": torch.ones(4),
    "half": torch.randn(3, 2).bfloat16(),
    "ids": torch.arange(5),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(folder, state, **options):
    dcp.save(state, storage_writer=FileSystemWriter(folder, **options), no_dist=True)
    return folder


def assert_equal(folder, expected):
    found = open_folder(folder)
    assert found.broken == {}
    assert set(found.tensors) == set(expected)
    for name, tensor in expected.items():
        got = found.tensors[name].read()
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape == found.tensors[name].shape
        assert torch.equal(got.float(), tensor.float()), name


def as_stored(folder):
    with open(folder / ".metadata", "rb") as file:
        return pickle.load(file)


def rewrite(folder, content):
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def in_pieces(folder, name, tensor, cuts):
    """A tensor whose pieces, (offsets, sizes) each, several ranks saved: the files of one save, by torch's classes."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks, stored = [], {}
    for rank, (offsets, sizes) in enumerate(cuts):
        piece = tensor[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))].clone()
        torch.save(piece, folder / f"__{rank}_0.distcp")
        chunks.append(metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        length = (folder / f"__{rank}_0.distcp").stat().st_size
        stored[metadata.MetadataIndex(name, offsets, rank)] = filesystem._StorageInfo(f"__{rank}_0.distcp", 0, length)
    properties = metadata.TensorProperties.create_from_tensor(tensor)
    listed = {name: metadata.TensorStorageMetadata(properties, tensor.shape, chunks)}
    rewrite(folder, metadata.Metadata(listed, planner_data={name: (name,)}, storage_data=stored))
    return folder


@pytest.mark.parametrize("options", [{}, {"single_file_per_rank": False}, {"thread_count": 2}], ids=str)
def test_a_state_dict_is_read_as_it_was(tmp_path, options):
    assert_equal(save(tmp_path / "flat", MODEL, **options), MODEL)


def test_what_torch_itself_makes_of_it_is_the_same(tmp_path):
    folder = save(
        tmp_path / "state", {"model": MODEL, "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}}, "step": 3}
    )
    dcp_to_torch_save(folder, tmp_path / "one.pt")
    assert_equal(folder, torch.load(tmp_path / "one.pt")["model"])


@pytest.mark.parametrize("wrapped", [("model",), ("app", "model"), ("state_dict",)], ids=str)
def test_the_optimizer_is_left_out_and_wrappers_are_taken_off(tmp_path, wrapped):
    state = MODEL
    for key in reversed(wrapped):
        state = {key: state, "optim": {"state": {"model.layers.0.weight": {"exp_avg": torch.ones(6, 4)}}}}
    assert_equal(save(tmp_path / "state", state | {"lr_scheduler": {"last": torch.ones(2, 2)}}), MODEL)


def test_other_models_in_it_are_said(tmp_path):
    found = open_folder(save(tmp_path / "x", {"model": MODEL, "teacher": {"a.weight": torch.eye(3)}}))
    assert set(found.tensors) == set(MODEL)
    assert "left out 1 such as teacher.a.weight" in found.warnings[0]


def test_an_optimizer_alone_is_no_model(tmp_path):
    with pytest.raises(SourceError, match=r"holds no weights, but 1 tensors of other kinds such as 'optimizer\.state"):
        open_folder(save(tmp_path / "x", {"optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}}}))


ROWS = [((0, 0), (3, 4)), ((3, 0), (3, 4)), ((6, 0), (1, 4))]
BLOCKS = [((i, j), (3 if i == 0 else 4, 2)) for i in (0, 3) for j in (0, 2)]


@pytest.mark.parametrize("cuts", [ROWS, BLOCKS, [((0, 0), (7, 4))]], ids=["rows", "blocks", "one"])
def test_pieces_of_several_ranks(tmp_path, cuts):
    whole = torch.randn(7, 4)
    assert_equal(in_pieces(tmp_path / "x", "a.weight", whole, cuts), {"a.weight": whole})


@pytest.mark.parametrize(
    "cuts",
    [
        ROWS[:2],
        [*ROWS[:2], ROWS[1]],
        [ROWS[0], ((2, 0), (4, 4))],
        [*BLOCKS[:3], BLOCKS[2]],
        [((0, 0), (7, 3)), ((0, 2), (7, 1))],
    ],
    ids=["a hole", "twice", "overlap", "a block twice", "columns"],
)
def test_pieces_that_are_not_the_whole_are_refused(tmp_path, cuts):
    """torch's reader would leave what no piece covers as it lies in memory."""
    found = open_folder(in_pieces(tmp_path / "x", "a.weight", torch.randn(7, 4), cuts))
    assert "not the whole of [7, 4]" in found.broken["a.weight"]


def test_a_part_of_a_tensor_is_read_as_that_part(tmp_path):
    """Fused projections, stacks of experts and resized vocabularies are rows and items of what is stored."""
    stack = torch.randn(3, 6, 4)
    ref = open_folder(save(tmp_path / "x", {"stack": stack})).tensors["stack"]
    assert torch.equal(ref.item(1).read(), stack[1])
    assert torch.equal(ref.item(2).rows(2, 5).T.read(), stack[2, 2:5].T)
    assert torch.equal(ref.rows(1, 3).read(), stack[1:3])


def test_a_fused_projection_is_split(tmp_path):
    base, tuned = ({"h.0.attn.c_attn.weight": torch.randn(4, 12)} for _ in range(2))
    config = {"model_type": "gpt2"}
    folder = save(tmp_path / "x", tuned)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    source = spectra.open_source(folder, write_checkpoint(tmp_path / "base", base, config=config))
    for place, part in enumerate("qkv"):
        rows = slice(4 * place, 4 * place + 4)
        expected = (tuned["h.0.attn.c_attn.weight"].double() - base["h.0.attn.c_attn.weight"].double()).T[rows]
        assert torch.equal(source[f"h.0.attn.c_attn.weight[{part}]"].read().to_dense(), expected)


def test_a_hidden_file_of_that_name_beside_weights_is_no_checkpoint(tmp_path):
    save_file({"a.weight": torch.eye(3)}, tmp_path / "weights.safetensors")
    (tmp_path / ".metadata").write_text("x")
    assert list(open_folder(tmp_path).tensors) == ["a.weight"]


def test_a_pair_has_the_spectrum_of_the_whole(tmp_path):
    base, tuned = llama_tensors(), nudged(llama_tensors())
    inner = save(tmp_path / "checkpoint-5" / "pytorch_model_fsdp_0", {"model": tuned})
    (tmp_path / "checkpoint-5" / "config.json").write_text('{"model_type": "llama"}')
    source = spectra.open_source(inner, write_checkpoint(tmp_path / "base", base))
    assert {delta.name for delta in source} == {name for name, tensor in base.items() if tensor.ndim == 2}
    for found in spectra.decompose(source):
        delta = tuned[found.name].double() - base[found.name].double()
        assert np.allclose(found.S, torch.linalg.svdvals(delta), rtol=1e-9)
    assert open_folder(inner).config == {"model_type": "llama"}
    assert pickle.loads(pickle.dumps(source.deltas[0])).read().to_dense().shape == source.deltas[0].shape


def test_a_checkpoint_without_its_list_is_refused(tmp_path):
    folder = save(tmp_path / "x", MODEL)
    with pytest.raises(SourceError, match="name its folder"):
        open_folder(folder / ".metadata")
    with pytest.raises(SourceError, match=r"a piece of a distributed checkpoint.*\.metadata"):
        open_folder(folder / "__0_0.distcp")
    (folder / ".metadata").unlink()
    with pytest.raises(NotFoundError, match=r"\.metadata beside them"):
        open_folder(folder)


def test_a_list_without_any_piece_says_what_is_missing(tmp_path):
    folder = save(tmp_path / "x", MODEL)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(NotFoundError, match=r"no piece of it \(\.distcp\) is there: copy them beside it"):
        open_folder(folder)


def test_a_missing_or_truncated_piece_costs_its_own_tensors(tmp_path):
    folder = save(tmp_path / "x", MODEL, single_file_per_rank=False)
    pieces = {index.fqn: info for index, info in as_stored(folder).storage_data.items()}
    (folder / pieces["half"].relative_path).unlink()
    short = folder / pieces["model.layers.0.weight"].relative_path
    short.write_bytes(short.read_bytes()[:-1])
    found = open_folder(folder)
    assert set(found.broken) == {"half", "model.layers.0.weight"}
    assert "is missing, which holds a piece of half" in found.broken["half"]
    assert "is truncated" in found.broken["model.layers.0.weight"]


def test_damage_inside_a_piece_is_one_message(tmp_path):
    folder = save(tmp_path / "x", {"a.weight": torch.randn(8, 8)})
    (file,) = folder.glob("*.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(SourceError, match=r"a\.weight in .* cannot be read") as caught:
        open_folder(folder).tensors["a.weight"].read()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_changes_is_noticed(tmp_path):
    folder = save(tmp_path / "x", MODEL)
    ref = open_folder(folder).tensors["half"]
    save(folder, {"half": torch.zeros(5, 5)})
    with pytest.raises(SourceError, match="changed after it was opened"):
        ref.read()


def test_code_in_the_metadata_or_a_piece_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = save(tmp_path / "x", {"a.weight": torch.randn(8, 8)})
    content = as_stored(folder)
    rewrite(folder, metadata.Metadata({}, planner_data=Evil(), storage_data=content.storage_data))
    with pytest.raises(SourceError, match="no tensor at all"):
        open_folder(folder)
    rewrite(folder, {"a": Evil()})
    with pytest.raises(SourceError, match="is not the metadata of a distributed checkpoint"):
        open_folder(folder)
    rewrite(folder, content)
    (piece,) = folder.glob("*.distcp")
    torch.save(Evil(), piece)
    (index,) = content.storage_data
    content.storage_data[index] = filesystem._StorageInfo(piece.name, 0, piece.stat().st_size)
    rewrite(folder, content)
    with pytest.raises(SourceError, match="cannot be read"):
        open_folder(folder).tensors["a.weight"].read()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../out.distcp", "/etc/passwd", "a/../__0_0.distcp"])
def test_a_piece_outside_the_folder_is_missing(tmp_path, name):
    folder = in_pieces(tmp_path / "x", "a.weight", torch.randn(7, 4), [((0, 0), (7, 4))])
    (tmp_path / "out.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    content = as_stored(folder)
    (index,) = content.storage_data
    content.storage_data[index].relative_path = name
    rewrite(folder, content)
    assert "is missing" in open_folder(folder).broken["a.weight"]


def test_a_checkpoint_of_classes_that_are_not_here_is_listed(tmp_path):
    """Megatron's `.metadata` names classes of its own; only torch's are needed."""
    folder = save(tmp_path / "x", {"a.weight": torch.randn(8, 8)})
    content = (folder / ".metadata").read_bytes()
    assert content.count(b"\x0bStorageMeta") == 1
    (folder / ".metadata").write_bytes(content.replace(b"\x0bStorageMeta", b"\x0bMegatronXYZ"))
    with pytest.raises(AttributeError):
        as_stored(folder)
    assert list(open_folder(folder).tensors) == ["a.weight"]


def test_listing_needs_no_torch(tmp_path):
    folder = save(tmp_path / "x", MODEL)
    counted = f"len(f.open_folder({str(folder)!r}).tensors)"
    code = f"import sys, spectra.files.folder as f\nprint({counted}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(MODEL)), "False"]


def test_every_piece_is_inside_and_none_twice():
    """The sweep against the definition, a count per entry."""
    draw, outcomes = random.Random(0).randrange, set()
    for _ in range(500):
        shape = (draw(1, 4), draw(1, 4))
        pieces, count = [], torch.zeros(shape)
        for _ in range(draw(1, 5)):
            at = [draw(0, end) for end in shape]
            size = [draw(1, end - start + 1) for start, end in zip(at, shape, strict=True)]
            pieces.append(ours.Piece(tuple(at), tuple(size), "", 0, 0))
            count[at[0] : at[0] + size[0], at[1] : at[1] + size[1]] += 1
        expected = bool((count == 1).all())
        outcomes.add(expected)
        assert ours._covers(shape, pieces) == expected
    assert outcomes == {True, False}
