"""Killed at any moment, two at once, no room left: what is stored stays readable and the rest is made up for."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.spectra_kinds import slow_deltas

import spectra
from spectra.deltas.source import Source
from spectra.errors import StoreError
from spectra.results import writing

TESTS = Path(__file__).resolve().parents[1]
COUNT = 12
DRIVER = """
import sys
import spectra
from spectra.deltas.source import Source
from support.spectra_kinds import slow_deltas
source = Source("made", tuple(slow_deltas({count}, 40, {delay})), tuned="tuned")
for spectrum in spectra.decompose(source, top=3, device="cpu", out=sys.argv[1]):
    pass
"""


def _start(out, delay=0.15):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    code = DRIVER.format(count=COUNT, delay=delay)
    return subprocess.Popen([sys.executable, "-c", code, str(out)], env=environment, stderr=subprocess.PIPE)


def _stored(out):
    return {file.name: file for file in (out / "spectra").glob("*.safetensors")}


def _source(delay=0.0):
    return Source("made", tuple(slow_deltas(COUNT, 40, delay)), tuned="tuned")


def _same(a, b):
    a, b = spectra.load(a), spectra.load(b)
    assert a.names == b.names
    for left, right in zip(a, b, strict=True):
        assert (left.method, left.norm, left.reason) == (right.method, right.norm, right.reason)
        assert all((getattr(left, key) == getattr(right, key)).all() for key in ("S", "U", "Vh"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The results of one call that nobody stopped, in this process."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    list(spectra.decompose(_source(), top=3, device="cpu", out=out))
    return out


def test_killed_and_run_again_equals_an_undisturbed_run(tmp_path, undisturbed):
    out = tmp_path / "run"
    process = _start(out)
    until = time.monotonic() + 60
    while len(_stored(out)) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {name: file.stat().st_mtime_ns for name, file in _stored(out).items()}
    assert 3 <= len(before) < COUNT
    assert len(spectra.load(out)) == len(before)  # what is there can be read
    again = _start(out)
    assert again.communicate()[1] == b""
    after = {name: file.stat().st_mtime_ns for name, file in _stored(out).items()}
    assert len(after) == COUNT
    assert all(after[name] == stamp for name, stamp in before.items())
    _same(out, undisturbed)
    assert (out / "summary.csv").read_bytes() == (undisturbed / "summary.csv").read_bytes()


def test_two_runs_into_one_directory_do_not_corrupt_it(tmp_path, undisturbed):
    together = [_start(tmp_path / "run", delay=0.02) for _ in range(2)]
    assert [process.communicate()[1] for process in together] == [b"", b""]
    assert list((tmp_path / "run").rglob("*.partial")) == []
    _same(tmp_path / "run", undisturbed)


def test_a_disk_that_fills_up_ends_in_one_message_and_loses_nothing(tmp_path, monkeypatch):
    room = [4]
    replace = os.replace

    def full(partial, path):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(partial, path)

    monkeypatch.setattr(writing.os, "replace", full)
    with pytest.raises(StoreError, match="No space left on device") as raised:
        list(spectra.decompose(_source(), device="cpu", out=tmp_path / "run"))
    assert "run the same again" in str(raised.value)
    monkeypatch.undo()
    assert len(spectra.load(tmp_path / "run")) == 3
    assert list((tmp_path / "run").rglob("*.partial")) == []
    assert len(list(spectra.decompose(_source(), device="cpu", out=tmp_path / "run"))) == COUNT
    list(spectra.decompose(_source(), device="cpu", out=tmp_path / "other"))
    assert (tmp_path / "run/summary.csv").read_bytes() == (tmp_path / "other/summary.csv").read_bytes()


def test_a_place_that_cannot_be_written_ends_in_one_message(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        list(spectra.decompose(_source(), device="cpu", out=tmp_path / "file" / "run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_ends_in_one_message(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        list(spectra.decompose(_source(), device="cpu", out=tmp_path / "run"))
    tmp_path.chmod(0o700)


def test_threads_per_matrix_are_those_that_the_run_began_with(tmp_path, monkeypatch):
    import spectra.results.resume as runs

    asked = []
    decompose = runs.decompose_indexed
    monkeypatch.setattr(
        runs, "decompose_indexed", lambda *a, **options: asked.append(options["threads"]) or decompose(*a, **options)
    )
    whole = _source()
    list(spectra.decompose(whole, device="cpu", out=tmp_path / "run"))
    next(iter(_stored(tmp_path / "run").values())).unlink()
    list(spectra.decompose(whole, device="cpu", out=tmp_path / "run"))
    assert len(asked) == 2
    assert asked[0] == asked[1]
    assert spectra.load(tmp_path / "run").run["threads_per_matrix"] == asked[0]


def test_the_same_files_typed_from_another_folder_are_the_same_run(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "base", llama_tensors())
    write_checkpoint(tmp_path / "tuned", nudged(llama_tensors()))
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    first = spectra.decompose(spectra.open_source("tuned", "base"), out=out)
    assert len(list(first)) > 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    for tuned, base in (("../tuned", "../base"), (tmp_path / "tuned", tmp_path / "base")):
        again = spectra.decompose(spectra.open_source(tuned, base), out=out)
        assert len(list(again)) == len(again.reused)
