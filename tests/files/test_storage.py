"""A storage is a storage: what the protocol asks of it, and the same models read from a disk and from memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.checkpoints import llama_tensors, nudged, write_adapter, write_checkpoint
from support.memory import Memory, in_fsspecs_memory, in_memory

import spectra
from spectra.errors import SourceError
from spectra.files.cloud import Cloud, open_cloud
from spectra.files.folder import open_folder
from spectra.files.storage import DISK, Place, Storage
from spectra.results import fingerprint


@pytest.fixture(params=["disk", "memory", "fsspec"])
def place(request, tmp_path):
    """A folder with a file of ten bytes, an empty one and an inner folder."""
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "ten.bin").write_bytes(b"0123456789")
    (folder / "empty").write_bytes(b"")
    (folder / "inner" / "x").write_bytes(b"x")
    if request.param == "fsspec":
        return in_fsspecs_memory(folder)
    return Place.of(folder) if request.param == "disk" else in_memory(folder, tmp_path)


def test_a_folder_lists_what_lies_in_it_and_not_below(place):
    assert place.is_folder()
    assert not place.is_file()
    assert [item.name for item in place.items()] == ["empty", "inner", "ten.bin"]
    assert [item.name for item in place.items() if item.is_folder()] == ["inner"]
    assert not (place / "none").is_folder()
    assert not (place / "a\0b").is_file()


@pytest.mark.parametrize(
    ("offset", "count", "bytes_there"),
    [(0, 10, b"0123456789"), (3, 4, b"3456"), (8, 5, b"89"), (10, 1, b""), (99, 1, b""), (4, 0, b"")],
)
def test_a_range_is_what_the_file_has_of_it(place, offset, count, bytes_there):
    assert (place / "ten.bin").read(offset, count) == bytes_there
    assert (place / "empty").read(offset, count) == b""


def test_what_is_not_there_is_one_message_that_names_it(place):
    for attempt in ((place / "none").stamp, lambda: (place / "none").read(0, 1), lambda: (place / "none").open()):
        with pytest.raises(SourceError, match="none cannot be"):
            attempt()


def test_a_stamp_is_the_size_and_changes_with_the_content(place):
    file = place / "ten.bin"
    before = file.stamp()
    assert before[0] == 10
    assert file.stamp() == before
    if isinstance(place.storage, Cloud):
        fsspec.filesystem("memory").pipe_file(file.path, b"9876543210")
        file = open_cloud(file.path)  # as whoever opens it anew
    elif isinstance(place.storage, Memory):
        place.storage.files[file.path] = b"9876543210"
    else:
        with open(file.path, "wb") as opened:
            opened.write(b"9876543210")
        os.utime(file.path, ns=(before[1] + 1, before[1] + 1))
    assert file.stamp() != before


def test_a_storage_travels_and_says_little_of_itself(place):
    assert (pickle.loads(pickle.dumps(place)) / "ten.bin").read(0, 3) == b"012"
    assert len(repr(place.storage)) < 30
    assert len({place, place}) == 1


def test_the_disk_has_what_the_protocol_asks_for_and_nothing_else():
    def public(cls):
        return {name for name in vars(cls) if not name.startswith("_")}

    assert public(type(DISK)) == public(Storage)


CONTENT = bytes(range(256)) * 5
MOVES = st.lists(
    st.tuples(st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END]), st.integers(-300, 1500), st.integers(-1, 400))
)


@given(MOVES)
def test_a_stream_is_the_file(moves):
    """Seek and read in any order: the same bytes and positions as from `BytesIO`, whatever is buffered."""
    ours, theirs = Place(Memory({"x": CONTENT}), "x").open(), io.BytesIO(CONTENT)
    for whence, offset, count in moves:
        if {os.SEEK_SET: 0, os.SEEK_CUR: theirs.tell(), os.SEEK_END: len(CONTENT)}[whence] + offset < 0:
            continue
        assert ours.seek(offset, whence) == theirs.seek(offset, whence)
        assert ours.read(count) == theirs.read(count)
        assert ours.tell() == theirs.tell()


def test_a_stream_does_not_go_before_the_start():
    with pytest.raises(ValueError, match="before the start of x"):
        Place(Memory({"x": CONTENT}), "x").open().seek(-1)


@pytest.mark.parametrize(
    ("folder", "name", "path"),
    [
        (".", "x", "x"),
        ("a/b", "./x", "a/b/x"),
        ("/", "x", "/x"),
        ("https://host/org", "x/y.safetensors", "https://host/org/x/y.safetensors"),
    ],
)
def test_a_name_is_put_behind_a_path(folder, name, path):
    place = Place(Memory({}), folder) / name
    assert str(place) == place.path == path
    assert place.name == path.rpartition("/")[2]
    assert str((Place(Memory({}), folder) / "x").parent) == folder


# -- the same models from memory


def write_sharded(folder, tensors):
    return write_checkpoint(folder, tensors, shards=3)


def write_torch(folder, tensors):
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def write_old_torch(folder, tensors):
    folder.mkdir()
    torch.save({"state_dict": tensors}, folder / "weights.pt", _use_new_zipfile_serialization=False)
    return folder


def write_gguf(folder, tensors):
    import gguf

    folder.mkdir()
    names = {"embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "starcoder2")
    writer.add_token_list([f"token{number}" for number in range(1000)])
    for name, tensor in tensors.items():
        stored = next((new for old, new in names.items() if old in name), name.removesuffix(".weight"))
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{stored}.weight", gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{stored}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def write_pipeline(folder, tensors):
    write_checkpoint(folder / "unet", tensors)
    (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    return folder


LAYOUTS = [write_sharded, write_torch, write_old_torch, write_gguf, write_pipeline]


def numbers(source):
    return [
        (spectrum.name, spectrum.status, spectrum.note, spectrum.S.tolist(), spectrum.Vh.tolist(), spectrum.base_norm)
        for spectrum in spectra.decompose(source, top=3, device="cpu")
    ]


@pytest.mark.parametrize("write", LAYOUTS)
def test_a_model_in_memory_gives_the_numbers_of_the_disk(tmp_path, write):
    base = llama_tensors(layers=1)
    base["model.wide.weight"] = torch.randn(8, 64)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", nudged(base))
    on_disk = spectra.open_source(tmp_path / "tuned", tmp_path / "base")
    expected, files = numbers(on_disk), fingerprint.of_files(on_disk)
    places = [in_memory(tmp_path / side, tmp_path) for side in ("tuned", "base")]
    for side in ("tuned", "base"):
        shutil.rmtree(tmp_path / side)
    source = spectra.open_source(*places)
    assert source.coverage == on_disk.coverage
    assert numbers(source) == expected
    assert len(expected) > 5
    travelled = pickle.loads(pickle.dumps(source.deltas[0]))
    assert torch.equal(travelled.read().to_dense(), source.deltas[0].read().to_dense())
    in_a_storage = fingerprint.of_files(source)
    assert list(in_a_storage) == list(files)
    for path, entry in in_a_storage.items():
        assert (entry["size"], entry["head_sha256"]) == (files[path]["size"], files[path]["head_sha256"])


def test_an_adapter_in_memory_gives_the_numbers_of_the_disk(tmp_path):
    module = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{module}A.weight": torch.randn(2, 16), f"{module}B.weight": torch.randn(16, 2)}
    folder = write_adapter(tmp_path / "a", factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    expected = numbers(spectra.open_source(folder))
    place = in_memory(folder, tmp_path)
    shutil.rmtree(folder)
    assert numbers(spectra.open_source(place)) == expected
    assert len(expected) == 1


def test_listing_reads_headers_and_rows_read_their_bytes_only(tmp_path):
    save_file(
        {"a.weight": torch.arange(4000.0).reshape(1000, 4), "b.weight": torch.ones(9)}, tmp_path / "x.safetensors"
    )
    place = in_memory(tmp_path / "x.safetensors", tmp_path)
    ref = open_folder(place).tensors["a.weight"]
    header = ref.offset
    assert sum(count for _, _, count in place.storage.reads) <= header
    place.storage.reads.clear()
    assert torch.equal(ref.rows(10, 12).read(), torch.arange(40.0, 48).reshape(2, 4))
    assert place.storage.reads == [(place.path, header + 10 * 16, 2 * 16)]


def test_a_file_in_memory_that_changes_is_noticed(tmp_path):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    place = in_memory(tmp_path / "x.safetensors", tmp_path)
    ref = open_folder(place).tensors["a.weight"]
    content = place.storage.files[place.path]
    place.storage.files[place.path] = content[:-1] + b"\x01"
    with pytest.raises(SourceError, match="changed after it was opened"):
        ref.read()


def test_a_read_that_ends_too_early_is_an_error(tmp_path, monkeypatch):
    """What a server does that closes the connection: no tensor with an end that nobody sent."""
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    place = in_memory(tmp_path / "x.safetensors", tmp_path)
    ref = open_folder(place).tensors["a.weight"]
    monkeypatch.setattr(Memory, "read_into", lambda *_: 3)
    with pytest.raises(SourceError, match=r"x\.safetensors ends inside a\.weight"):
        ref.read()
