"""What fsspec opens: the right numbers, one version, and every failure in one sentence."""

from __future__ import annotations

import os
import threading
import time

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import run
from support.hub_server import HubServer
from support.memory import in_fsspecs_memory

import spectra
from spectra.errors import MissingExtraError, NotFoundError, SourceError, StoreError
from spectra.files import cloud, far, hub, lanes, patience
from spectra.files.cloud import open_cloud


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """The URLs of a tuned model and its base, of two shards each, whose copies lie on the disk."""
    monkeypatch.setattr(cloud, "_PAUSES", (0.0, 0.0))
    write_checkpoint(tmp_path / "base", llama_tensors(), shards=2)
    write_checkpoint(tmp_path / "tuned", nudged(llama_tensors()), shards=2)
    return tuple(str(in_fsspecs_memory(tmp_path / side)) for side in ("tuned", "base"))


def values(tuned, base, **options):
    source = spectra.open_source(tuned, base).select("v_proj")
    return {spectrum.name: spectrum for spectrum in spectra.decompose(source, **options)}


def failing(monkeypatch, method, problem, times=-1):
    """Let a method of fsspec's memory fail so many times; returns the list of its calls."""
    calls, real = [], getattr(MemoryFileSystem, method)

    def fails(self, path, *args, **kwargs):
        calls.append(path)
        if len(calls) <= times or times < 0:
            if isinstance(problem, Exception):
                raise problem
            return problem(real(self, path, *args, **kwargs))
        return real(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, method, fails)
    return calls


def test_the_numbers_are_those_of_the_disk_and_the_run_goes_on(pair, tmp_path):
    found, expected = values(*pair, out=tmp_path / "out"), values(tmp_path / "tuned", tmp_path / "base")
    assert found.keys() == expected.keys()
    for name, spectrum in found.items():
        np.testing.assert_array_equal(spectrum.S, expected[name].S)
    again = spectra.decompose(spectra.open_source(*pair).select("v_proj"), out=tmp_path / "out")
    assert {spectrum.name for spectrum in again} == set(again.reused) == found.keys()


def test_only_headers_and_chosen_tensors_are_read(pair, tmp_path, monkeypatch):
    read, real = [], MemoryFileSystem.cat_file

    def counted(self, path, start=None, end=None, **kwargs):
        read.append(end - start)
        return real(self, path, start, end, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    far._heads.clear()
    source = spectra.open_source(*pair).select("v_proj")
    before = sum(read)
    assert all(spectrum.status == "ok" for spectrum in spectra.decompose(source))
    assert sum(read) - before == sum(ref.nbytes for delta in source for ref in delta.refs)


def test_a_file_that_changes_is_an_error_and_its_results_are_not_taken(pair, tmp_path):
    values(*pair, out=tmp_path / "out")
    source = spectra.open_source(*pair).select("v_proj")
    memory = fsspec.filesystem("memory")
    for path in memory.find(pair[0]):
        if path.endswith(".safetensors"):
            memory.pipe_file(path, memory.cat_file(path)[:-1] + b"\0")
    found = list(spectra.decompose(source))
    assert {spectrum.status for spectrum in found} == {"unreadable"}
    assert all("changed after it was opened; run the command again" in spectrum.reason for spectrum in found)
    assert {spectrum.status for spectrum in values(*pair).values()} == {"ok"}, "opened again"
    with pytest.raises(StoreError, match="files"):
        values(*pair, out=tmp_path / "out")


@pytest.mark.parametrize("problem", [OSError("reset by peer"), lambda content: content[:-1]])
def test_what_passes_ends_in_the_right_numbers(pair, monkeypatch, problem):
    source = spectra.open_source(*pair).select("v_proj")
    expected = {spectrum.name: spectrum.S for spectrum in spectra.decompose(source)}
    failing(monkeypatch, "cat_file", problem, times=2)
    for spectrum in spectra.decompose(source):
        np.testing.assert_array_equal(spectrum.S, expected[spectrum.name])


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (OSError("reset by peer"), "cannot be read: reset by peer; run the same again later"),
        (lambda content: content[:-1], "fewer bytes come than it has"),
        (PermissionError("Forbidden"), "access is refused (Forbidden); give the keys"),
        (FileNotFoundError(2, "gone"), "cannot be read: there is no such file"),
        (RuntimeError("Unable to locate credentials"), "Unable to locate credentials; give the keys"),
    ],
)
def test_what_stays_is_one_sentence_in_the_rows(pair, monkeypatch, problem, said):
    source = spectra.open_source(*pair).select("v_proj")
    failing(monkeypatch, "cat_file", problem)
    for spectrum in spectra.decompose(source):
        assert spectrum.status == "unreadable"
        assert said in spectrum.reason
        assert "memory://" in spectrum.reason
        assert "\n" not in spectrum.reason


@pytest.fixture
def silent(monkeypatch):
    """Calls that never return are waited for as long as this."""
    monkeypatch.setattr(patience, "PATIENCE", 0.3)
    monkeypatch.setattr(patience, "FIRST", 0.05)
    monkeypatch.setattr(patience, "_silent", set())


@pytest.mark.parametrize("method", ["info", "ls", "cat_file"])
def test_a_file_system_that_never_answers_is_one_message(pair, monkeypatch, silent, method):
    failing(monkeypatch, method, lambda said: threading.Event().wait())
    start = time.monotonic()
    _, printed = run("inspect", pair[0], status=1)
    assert "memory://" in printed
    assert "no answer within 0.3" in printed
    assert printed.count("\n") == 1
    assert time.monotonic() - start < 10


def test_one_that_falls_silent_costs_its_matrices_and_is_not_waited_for_again(pair, monkeypatch, silent):
    source = spectra.open_source(*pair)
    failing(monkeypatch, "cat_file", lambda said: threading.Event().wait())
    start = time.monotonic()
    reasons = [spectrum.reason for spectrum in spectra.decompose(source)]
    assert len(reasons) == len(source) > 10
    assert all("no answer within" in reason for reason in reasons)
    assert time.monotonic() - start < 2 * 0.1 * len(reasons) + 5, "0.3 s once, and little for each of the others"


def test_who_stops_does_not_wait_for_a_call_that_never_returns(pair, silent, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 60.0)
    threading.Timer(0.2, patience.give_up).start()
    start = time.monotonic()
    with pytest.raises(SourceError, match="reading was given up"):
        patience.answer("memory://a/b", threading.Event().wait)
    assert time.monotonic() - start < 10


def test_one_file_system_is_never_asked_two_things_at_once(pair, monkeypatch):
    busy, real = set(), MemoryFileSystem.cat_file

    def read(self, *args, **kwargs):
        assert id(self) not in busy
        busy.add(id(self))
        time.sleep(0.01)
        busy.discard(id(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", read)
    monkeypatch.setattr(lanes, "PIECE", 100)
    assert {spectrum.status for spectrum in values(*pair).values()} == {"ok"}
    assert len(cloud._idle[os.getpid(), "memory"]) <= 20, "they are used again"


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch):
    def missing(protocol, **_):
        raise ImportError(f"Install what opens {protocol}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(MissingExtraError, match=r"reading s3:// .*pip install 'weight-spectra\[cloud\]'"):
        hub.resolve("s3://bucket/model")
    with pytest.raises(SourceError, match=r"az:// cannot be read: Install what opens az"):
        hub.resolve("az://bucket/model")


def test_what_is_not_there_is_not_found():
    for url, said in (("memory://nothing/here", "no such file or folder"), ("nosuch://a/b", "nothing that fsspec")):
        with pytest.raises(NotFoundError, match=said):
            hub.resolve(url)
    _, printed = run("inspect", "memory://nothing/here", status=1)
    assert printed.count("\n") == 1


def test_a_file_without_a_version_is_refused(pair, monkeypatch):
    failing(monkeypatch, "info", lambda said: {key: said[key] for key in ("name", "size", "type")})
    with pytest.raises(SourceError, match="nothing would tell that it changes"):
        open_cloud(f"{pair[0]}/config.json").stamp()


def test_addresses_of_this_machine_and_of_the_hub_mean_what_they_say(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "a b", llama_tensors())
    assert spectra.inspect((tmp_path / "a b").as_uri()).folder.tensors
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        commit = server.add("org/name", tmp_path / "a b", branch="v1")
        root = f"{server.endpoint}/org/name/resolve/{commit}"
        assert hub.resolve("hf://org/name@v1").path == root
        assert hub.resolve("hf://org/name@v1/config.json").path == f"{root}/config.json"
        with pytest.raises(NotFoundError, match="no page of a model"):
            hub.resolve("hf://datasets/org/name")
