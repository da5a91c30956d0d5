"""Files that are cut off while a run reads them: a message, and never the end of the process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import spectra
from spectra.errors import SourceError, StoreError
from spectra.files.readers import READERS
from spectra.files.storage import Place
from spectra.files.torch_file import read_header
from spectra.files.torch_zip import placed
from spectra.results.store import Store
from spectra.spectrum import Spectrum

# What a cut between the look at a file and the reading of its bytes does: no check of ours can come between.
CUT = """
import os, sys, torch
from spectra.errors import SourceError
from spectra.files.readers import READERS
from spectra.files.storage import Place
from spectra.files.torch_file import read_header
file = Place.of(sys.argv[1])
first, ref = (read_header(file).tensors[name] for name in ("a", sys.argv[2]))
READERS["torch"](first)
os.truncate(sys.argv[1], 5000)
try:
    READERS["torch"](ref).to(torch.complex64).sum()
except SourceError as problem:
    print(problem)
"""


def saved(path, content):
    torch.save(content, path)
    return Place.of(path)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(64, 48, generator=generator) for name in "ab"}


def lying_otherwise():
    """Tensors whose entries do not lie in the file as they are counted."""
    large = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))
    complex_ = torch.view_as_complex(large.reshape(-1, 64, 2).clone())
    return {
        "turned": large.clone().T,
        "steps": large.clone()[1:, ::2],
        "conjugate": complex_.conj(),
        "negative": complex_.clone().conj().imag,
        "e4m3": large.to(torch.float8_e4m3fn),
        "e5m2": large.to(torch.float8_e5m2).T,
        "with_state": torch.nn.Parameter(large.clone().T),
    }


@pytest.mark.parametrize("name", ["b", *lying_otherwise()])
def test_a_torch_file_that_is_cut_off_under_a_run_is_a_message(tmp_path, name):
    given = {**tensors(), **lying_otherwise()}
    given["with_state"].note = "kept in its state"
    saved(tmp_path / "model.bin", given)
    done = subprocess.run([sys.executable, "-c", CUT, tmp_path / "model.bin", name], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert f"model.bin ends inside {name}" in done.stdout


def test_a_claim_of_more_entries_than_there_are_is_not_read(tmp_path):
    file = saved(tmp_path / "model.bin", {"wide": torch.zeros(1, 3).expand(1000, 3), "plain": torch.zeros(2)})
    assert set(placed(file, file.stamp())) == {"plain"}
    assert set(read_header(file).broken) == {"wide"}


@pytest.mark.parametrize("wrap", [lambda it: it, lambda it: {"state_dict": it}, lambda it: {"state": {"model": it}}])
def test_what_is_read_in_its_place_is_what_torch_loads(tmp_path, wrap):
    given = tensors() | {
        "half": torch.arange(12.0).reshape(3, 4).half(),
        "brain": torch.arange(12.0).reshape(3, 4).bfloat16(),
        "double": torch.arange(12.0).double(),
        "int": torch.arange(12),
        "bool": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "rows": torch.arange(40.0).reshape(8, 5)[2:4],
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
    }
    shared = torch.arange(100.0)
    given |= {"first": shared[:50].reshape(5, 10), "second": shared[50:]}
    file = saved(tmp_path / "model.bin", wrap(given))
    refs = read_header(file).tensors
    lying = placed(file, file.stamp())
    assert set(lying) >= set(given) - {"parameter"}
    for name, tensor in given.items():
        read = READERS["torch"](refs[name])
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor.detach())


def test_what_does_not_lie_plainly_is_read_all_the_same(tmp_path):
    a = torch.arange(12.0).reshape(3, 4)
    given = {**lying_otherwise(), "views": a[1:, 1::2].T, "plain": a}
    file = saved(tmp_path / "model.bin", given)
    assert set(placed(file, file.stamp())) == set(given)
    refs = read_header(file).tensors
    for name, tensor in given.items():
        read = READERS["torch"](refs[name])
        assert read.dtype == tensor.dtype
        assert torch.equal(read.to(torch.complex64), tensor.detach().to(torch.complex64))
    torch.save({"plain": a}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    old = Place.of(tmp_path / "old.bin")
    assert placed(old, old.stamp()) == {}
    assert torch.equal(READERS["torch"](read_header(old).tensors["plain"]), a)


def test_another_version_of_the_file_is_not_taken_for_the_one_that_was_listed(tmp_path):
    file = saved(tmp_path / "model.bin", tensors())
    ref = read_header(file).tensors["a"]
    saved(tmp_path / "model.bin", {"a": torch.zeros(64, 48), "longer": torch.zeros(9)})
    with pytest.raises(SourceError, match="changed after it was opened"):
        ref.read()
    assert placed(file, ref.stamp) == {}
    assert replace(ref, stamp=file.stamp()).read().sum() == 0


def test_a_stored_result_that_is_cut_off_is_damaged(tmp_path):
    spectra.save([Spectrum("a.weight", (400, 400), S=range(400, 0, -1))], tmp_path / "run")
    path = Store(tmp_path / "run").spectra.path("a.weight")
    for size in (path.stat().st_size - 1, 1500, 100, 8, 0):
        with path.open("r+b") as file:
            file.truncate(size)
        with pytest.raises(StoreError, match="missing or damaged"):
            spectra.load(tmp_path / "run")["a.weight"]
