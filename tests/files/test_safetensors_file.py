"""The safetensors reader against the library, on good files and on broken ones."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from spectra.errors import SourceError
from spectra.files import safetensors_file
from spectra.files.dtypes import DTYPES
from spectra.files.storage import Place

GOOD = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def read_header(path):
    return safetensors_file.read_header(Place.of(path))


def write(path, header, data=b"", length=None):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name not in ("U16", "U32", "U64", "C64")])
def test_every_dtype_reads_as_the_library_reads_it(tmp_path, dtype):
    tensor = torch.randn(3, 5).mul(4).abs().to(getattr(torch, DTYPES[dtype][0]))
    save_file({"x": tensor, "empty": tensor[:0].clone()}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    expected = load_file(tmp_path / "x.safetensors")
    assert not header.broken
    for name, ref in header.tensors.items():
        got = ref.read()
        assert got.dtype == expected[name].dtype
        assert got.shape == expected[name].shape == ref.shape
        assert torch.equal(got.view(torch.uint8), expected[name].view(torch.uint8))


def test_views_are_applied_when_reading(tmp_path):
    x = torch.arange(24.0).reshape(2, 3, 4)
    save_file({"x": x}, tmp_path / "x.safetensors")
    ref = read_header(tmp_path / "x.safetensors").tensors["x"]
    assert torch.equal(ref.item(1).T.rows(1, 3).read(), x[1].T[1:3])
    assert torch.equal(ref.permute(2, 0, 1).reshape(8, 3).read(), x.permute(2, 0, 1).reshape(8, 3))
    assert ref.item(1).T.rows(1, 3).shape == (2, 3)
    assert torch.equal(pickle.loads(pickle.dumps(ref.item(0).T)).read(), x[0].T)
    with pytest.raises(SourceError, match="not 2:9"):
        ref.rows(2, 9)
    with pytest.raises(SourceError, match="which is not"):
        ref.reshape(5, 5)


def test_metadata_is_kept(tmp_path):
    save_file(GOOD, tmp_path / "x.safetensors", metadata={"ss_network_alpha": "4"})
    assert read_header(tmp_path / "x.safetensors").metadata == {"ss_network_alpha": "4"}


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ONE = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HOSTILE = {
    "header longer than the file": ({"a": entry()}, b"12345678", 10**12),
    "not JSON": (b"{nonsense", b"", None),
    "not an object": ([1, 2], b"", None),
    "deep nesting": (b'{"a":' * 50_000, b"", None),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, b"12345678", None),
    "offsets reversed": ({"a": entry(offsets=(8, 0))}, b"12345678", None),
    "shape does not fill its bytes": ({"a": entry(shape=(3,))}, b"12345678", None),
    "shape that overflows": ({"a": entry(shape=(2**40, 2**40))}, b"12345678", None),
    "negative shape": ({"a": entry(shape=(-2,))}, b"12345678", None),
    "fractional shape": ({"a": entry(shape=(2.0,))}, b"12345678", None),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, b"123456789012", None),
    "a tail": ({"a": entry()}, b"12345678" + b"0", None),
    "a long tail": ({"a": entry()}, bytes(1008), None),
    "a tail and no tensor": ({}, b"12345678", None),
    "a hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), None),
    "a hole before the first": ({"a": entry(offsets=(4, 12))}, bytes(12), None),
    "a hole before an empty one": ({"a": entry(), "b": entry(shape=(0,), offsets=(9, 9))}, bytes(9), None),
    "an empty one inside another": ({"a": entry(), "b": entry(shape=(0,), offsets=(4, 4))}, bytes(8), None),
    "UTF-16": (json.dumps({"a": entry()}).encode("utf-16"), b"12345678", None),
    "metadata that is no string": ({"__metadata__": {"a": 1}, "a": entry()}, b"12345678", None),
    "duplicate key": (b"{%s, %s}" % (ONE, ONE), b"1234", None),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"12345678", None),
    "entry is a list": ({"a": [1]}, b"", None),
    "metadata is a list": ({"__metadata__": [1]}, b"", None),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_one_message_that_names_the_file(tmp_path, case):
    header, data, length = HOSTILE[case]
    path = write(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(SourceError, match=r"x\.safetensors") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
    if case != "duplicate key":  # where the library takes the last one; which is meant, nobody knows
        with pytest.raises(SafetensorError), safe_open(path, "pt") as file:
            file.keys()


def test_what_lies_beside_the_tensors_is_named(tmp_path):
    """The message leads to the place: which tensors, how many bytes."""
    for header, data, words in (
        (
            {"a": entry(), "b": entry(offsets=(8, 16))},
            bytes(19),
            "the bytes after 'b', the last tensor, 3 of them, belong to no",
        ),
        (
            {"a": entry(), "b": entry(offsets=(12, 20))},
            bytes(20),
            "the bytes between 'a' and 'b', 4 of them, belong to no tensor",
        ),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "'a' and 'b' overlap"),
    ):
        with pytest.raises(SourceError, match=words):
            read_header(write(tmp_path / "x.safetensors", header, data))


def test_other_files_under_this_name_are_named(tmp_path):
    pointer = tmp_path / "p.safetensors"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(SourceError, match="git lfs pull"):
        read_header(pointer)
    torch.save(GOOD, tmp_path / "t.safetensors")
    with pytest.raises(SourceError, match="pickle"):
        read_header(tmp_path / "t.safetensors")
    (tmp_path / "s.safetensors").write_bytes(b"123")
    with pytest.raises(SourceError, match="truncated"):
        read_header(tmp_path / "s.safetensors")


@pytest.mark.parametrize("length", [0x0280, 0x0480, int.from_bytes(b"PK", "little")])
def test_a_header_whose_length_looks_like_the_start_of_a_pickle_is_read(tmp_path, length):
    text = json.dumps({"a": entry()}).encode()
    path = write(tmp_path / "x.safetensors", text + b" " * (length - len(text)), bytes(8))
    assert torch.equal(read_header(path).tensors["a"].read(), torch.zeros(2))


def test_a_truncated_file_loses_only_what_is_cut_off(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    header = read_header(path)
    tensors, broken = header.tensors, header.broken
    assert len(tensors) == len(broken) == 1
    assert torch.equal(next(iter(tensors.values())).read(), torch.ones(4))
    assert "truncated" in next(iter(broken.values()))


def test_a_file_that_changes_after_listing_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(GOOD, path)
    ref = read_header(path).tensors["a"]
    save_file({"a": torch.zeros(7, 3)}, path)
    with pytest.raises(SourceError, match="changed after it was opened"):
        ref.read()
    path.unlink()
    with pytest.raises(SourceError, match="cannot be opened"):
        ref.read()


@given(st.data())
def test_any_mutation_is_read_as_the_library_reads_it_or_refused(tmp_path_factory, data):
    """Flip bytes anywhere: no crash, and never a tensor that the library sees differently."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file(GOOD, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        header = read_header(path)
        tensors = header.tensors
    except SourceError:
        return
    try:
        expected = load_file(path)
    except SafetensorError:  # nothing that the library refuses is read without a word
        assert header.broken or any(ref.dtype not in DTYPES for ref in tensors.values())
        return
    for name, tensor in expected.items():
        if name in tensors and tensors[name].dtype in DTYPES:
            assert torch.equal(tensors[name].read().view(torch.uint8), tensor.view(torch.uint8))
