"""The folder: whole or not at all, in place of nothing that is there, and the same bytes whatever the order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import spectra
from spectra.errors import StoreError
from spectra.extraction.output import TensorFile, new_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_tensors_come_back_and_the_order_of_arrival_leaves_no_trace(tmp_path):
    tensors = {
        "b": torch.randn(3, 2),
        "a": torch.randn(5, dtype=torch.float64),
        "c": torch.randn(2, 3).to(torch.bfloat16).mT,
        "alpha": torch.tensor(4.0),
    }
    for name, order in (("one", list(tensors)), ("two", list(tensors)[::-1])):
        file = TensorFile(tmp_path / f"{name}.safetensors")
        for key in order:
            file.add({key: tensors[key]})
        file.close({"format": "pt"})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    found = load_file(tmp_path / "one.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)
    assert names(tmp_path) == ["one.safetensors", "two.safetensors"]


def test_an_empty_folder_is_taken_and_a_full_one_is_not_touched(tmp_path, source):
    (tmp_path / "empty").mkdir()
    spectra.extract(source, tmp_path / "empty", rank=1)
    before = names(tmp_path / "empty")
    with pytest.raises(StoreError, match="is not empty, and nothing in it was touched"):
        spectra.extract(source, tmp_path / "empty", rank=1)
    assert names(tmp_path / "empty") == before == ["adapter_config.json", "adapter_model.safetensors"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="is not a folder"):
        spectra.extract(source, tmp_path / "file", rank=1)


def test_a_failure_leaves_nothing(tmp_path):
    def write_half():
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert names(tmp_path) == []


def test_a_killed_process_leaves_a_hidden_folder_that_the_next_run_removes(tmp_path, source):
    code = (
        "import os, signal, sys; from spectra.extraction.output import new_folder\n"
        f"with new_folder({str(tmp_path / 'out')!r}) as folder:\n"
        "    (folder / 'half').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert [name for name in names(tmp_path) if name.startswith(".out.")]
    (tmp_path / f".out.{os.getpid()}.partial").mkdir()  # a process that is at work now
    (tmp_path / ".out.x.partial").mkdir()  # nobody's that we know
    with new_folder(tmp_path / "other"):
        pass
    assert len([name for name in names(tmp_path) if name.startswith(".out.")]) == 3
    os.rmdir(tmp_path / f".out.{os.getpid()}.partial")
    spectra.extract(source, tmp_path / "out", rank=1)
    assert [name for name in names(tmp_path) if name.startswith(".out.")] == [".out.x.partial"]


def test_a_place_that_cannot_be_written_to_is_one_message(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        spectra.extract(source, tmp_path / "file" / "out", rank=1)


def test_a_dry_run_writes_nothing_and_has_the_same_numbers(tmp_path, source):
    dry = spectra.extract(source, tmp_path / "out", energy=0.7, dry_run=True)
    assert not (tmp_path / "out").exists()
    wet = spectra.extract(source, tmp_path / "out", energy=0.7)
    columns = ["name", "rank", "relative_error", "parameters", "clamped"]
    assert dry[columns].equals(wet[columns])


def test_the_folder_may_be_where_one_is(tmp_path, source, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    spectra.extract(source, ".", rank=1)
    assert names(tmp_path / "here") == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_a_killed_process_left_goes_also_where_another_one_was_done(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    (tmp_path / ".out.999999999.partial").mkdir()
    with pytest.raises(StoreError, match="is not empty"), new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]
