"""Files that claim more than they are: refused in a moment and little memory, with one message.

In the manner of safetensors' attacks/: each test makes the file that once cost minutes or gigabytes.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from spectra.errors import SourceError, SpectraError
from spectra.files import limits
from spectra.files.folder import open_folder
from spectra.files.inert_pickle import load

SECONDS = 5  # on a busy machine; each of them took 20 and more


def safetensors(path, text, data=b""):
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def gguf(path, tail, size=0, tensors=0, values=1):
    """A GGUF file with the head, these bytes, and a hole up to its size."""
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + tail)
        file.truncate(max(size, file.tell()))
    return path


def text(content):
    return struct.pack("<Q", len(content)) + content


def test_more_tensors_than_any_model_has(tmp_path):
    one = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(one % i for i in range(limits.TENSORS + 1)) + b"}"
    _refused(safetensors(tmp_path / "model.safetensors", header), r"claims 250,001 tensors, more than the 250,000")


def test_as_many_as_are_allowed_are_read(tmp_path):
    count = 5000
    save_file(
        {f"layers.{i}.w": torch.zeros(1) for i in range(count)}, tmp_path / "model.safetensors", {"a": "b" * 5000}
    )
    assert len(open_folder(tmp_path).tensors) == count


def test_more_metadata_than_any_trainer_writes(tmp_path):
    keys = b",".join(b'"%d":""' % i for i in range(1_000_000))
    _refused(
        safetensors(tmp_path / "model.safetensors", b'{"__metadata__":{' + keys + b"}}"), "metadata keys, more than"
    )


@pytest.mark.parametrize("axes", [65, 1_000_000])
def test_more_axes_than_a_tensor_can_have(tmp_path, axes):
    shape = b",".join([b"1"] * axes)
    header = b'{"a":{"dtype":"U8","shape":[' + shape + b'],"data_offsets":[0,1]}}'
    _refused(safetensors(tmp_path / "model.safetensors", header, b"\0"), "malformed|more than tensors and strings")


@pytest.mark.parametrize(
    "deep", [b'{"a":' * 1_000_000, b"[" * 90_000_000, b'{"a":{"dtype":"U8","shape":[' + b"9" * 90_000]
)
def test_nested_or_numbered_without_end(tmp_path, deep):
    _refused(
        safetensors(tmp_path / "model.safetensors", deep), "not valid JSON|more than tensors and strings|metadata keys"
    )


@pytest.mark.parametrize(
    ("tail", "tensors", "values", "said"),
    [
        (b"", 2**60, 0, "claims 1,152,921,504,606,846,976 tensors"),
        (b"", 0, 2**40, "metadata values, more than"),
        (struct.pack("<Q", 3 * 2**30), 0, 1, "bytes of one string"),
        (text(b"a") + struct.pack("<IQ", 8, 3 * 2**30), 0, 1, "bytes of one string"),
        (text(b"a") + struct.pack("<IIQ", 9, 8, 2**28), 0, 1, "entries of lists"),
        (text(b"a") + struct.pack("<IIQ", 9, 9, 2**28), 0, 1, "entries of lists"),
    ],
)
def test_counts_and_strings_that_lie_in_a_hole(tmp_path, tail, tensors, values, said):
    _refused(gguf(tmp_path / "m.gguf", tail, 4 * 2**30, tensors, values), said)


def test_a_folder_that_contains_itself(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet"], "vae": ["diffusers", "VAE"]}))
    for name in ("unet", "vae"):
        (tmp_path / name).symlink_to(".")
    _refused(tmp_path, "contain one another")


def test_components_that_contain_themselves(tmp_path):
    (tmp_path / "unet").symlink_to(".")
    (tmp_path / "vae").mkdir()
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "vae" / "model.safetensors")
    assert set(open_folder(tmp_path).tensors) >= {"vae.a"}


@pytest.mark.parametrize("name", ["x" * 5000, "y/" * 3000 + "z", "\ud800", "a\0b", ""])
def test_an_index_of_impossible_names(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    _refused(tmp_path, ".")


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "a\0b"])
def test_a_pipeline_of_impossible_names(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({name: ["diffusers", "UNet"]}))
    _refused(tmp_path, "without readable weights")


def test_links_in_a_circle(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("config.json")
    (tmp_path / "config.json").symlink_to("model.safetensors")
    _refused(tmp_path, ".")


def test_a_name_that_is_longer_than_numbers_may_be_costs_its_own_tensor(tmp_path):
    long = "layers." + "9" * 5000 + ".w"
    header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(("a", long))}
    safetensors(tmp_path / "model.safetensors", json.dumps(header).encode(), b"\0\0")
    folder = open_folder(tmp_path)
    assert list(folder.tensors) == ["a"]
    assert "has 5,009 characters" in folder.broken[long]


def test_a_pickle_that_numbers_its_objects_beyond_its_length():
    with pytest.raises(SourceError, match="numbers more objects than it has bytes"):
        load(b"\x80\x02Nr\xff\xff\xff\x7f.", "file.pkl")
    harmless = "r" + "\x7f" * 40
    assert load(pickle.dumps([harmless], 2), "file.pkl") == [harmless]


@pytest.mark.parametrize("seed", range(3))
def test_torch_files_with_flipped_bits_are_read_or_damaged(tmp_path, seed):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4)}, path)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randint(0, 8 * len(content), (100,), generator=generator).tolist():
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            for ref in open_folder(path).tensors.values():
                ref.read()
        except SpectraError as problem:
            assert "weights_only=False" not in str(problem)  # noqa: PT017


def test_a_storage_that_is_larger_than_the_machine(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(3)}, path)
    inner = zipfile.ZipFile(path)
    changed = {name: inner.read(name) for name in inner.namelist()}
    (pickled,) = [name for name in changed if name.endswith("data.pkl")]
    changed[pickled] = changed[pickled].replace(b"K\x03tq", b"\x8a\x07" + (2**55).to_bytes(7, "little") + b"tq")
    assert changed[pickled] != inner.read(pickled)
    with zipfile.ZipFile(path, "w") as again:
        for name, data in changed.items():
            again.writestr(name, data)
    _refused(path, "damaged|fewer entries")


def test_code_in_a_file_is_named_and_not_run(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"a": torch.zeros(2), "b": Bad()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"holds more than tensors \(posix.system\) and was not opened") as raised:
        open_folder(tmp_path)
    assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def _refused(path, said):
    start = time.monotonic()
    with pytest.raises(SpectraError, match=said):
        open_folder(path)
    assert time.monotonic() - start < SECONDS
