"""The run's own folder: replaced inputs, runs begun at once, folders deleted or read-only, what killed runs leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.checkpoints import llama_tensors, nudged, write_checkpoint

import spectra
from spectra.cli.main import main
from spectra.errors import StoreError
from spectra.results import writing
from spectra.results.store import Store


def _replaced(path, place):
    """Another byte at a place of a file of the same size and time."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_input_that_is_replaced_with_the_same_size_and_time_is_noticed(tmp_path, source):
    file = tmp_path / "tuned" / "model.safetensors"
    list(spectra.decompose(source, out=tmp_path / "run"))
    _replaced(file, file.stat().st_size - 1)
    with pytest.raises(StoreError, match="different: files"):
        list(spectra.decompose(source, out=tmp_path / "run"))
    with pytest.raises(StoreError, match="different: files"):
        list(spectra.decompose(source.select("q_proj"), out=tmp_path / "run"))


def test_a_large_file_is_sampled_and_rehash_reads_all_of_it(tmp_path):
    from spectra.files.storage import Place
    from spectra.results import fingerprint

    path = tmp_path / "large"
    path.write_bytes(os.urandom(8 * 2**20))
    place = Place.of(path)
    stamp = place.stamp()
    quick, whole = (fingerprint.of_file(place, stamp, rehash=rehash) for rehash in (False, True))
    assert fingerprint.same(quick, whole)
    _replaced(path, 2**20 + 2**18)  # between two samples
    assert fingerprint.of_file(place, place.stamp()) == quick
    assert not fingerprint.same(whole, fingerprint.of_file(place, place.stamp(), rehash=True))
    assert fingerprint.is_as_it_was(str(path), quick)
    path.write_bytes(os.urandom(8 * 2**20))
    os.utime(path, ns=(stamp[1], stamp[1]))
    assert not fingerprint.is_as_it_was(str(path), quick)


def test_rehash_holds_whole_files_against_each_other(tmp_path, source):
    words = ["svd", source.tuned, "--base", source.base, "--out", str(tmp_path / "run"), "--no-figures", "--rehash"]
    assert CliRunner().invoke(main, words).exit_code == 0
    files = Store(tmp_path / "run").run()["inputs"]["files"]
    assert all(len(file["sha256"]) == 64 for file in files.values())
    assert CliRunner().invoke(main, words[:-1]).exit_code == 0  # without it nothing is forgotten
    assert Store(tmp_path / "run").run()["inputs"]["files"] == files
    assert CliRunner().invoke(main, words).exit_code == 0


def test_a_folder_that_is_deleted_under_a_run_is_no_success(tmp_path, source):
    stream = spectra.decompose(source, out=tmp_path / "run")
    for _ in range(5):
        next(stream)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StoreError, match=r"of the \d+ results that this run stored .* are not there any more"):
        list(stream)


def test_a_folder_that_another_run_claims_meanwhile_is_no_success(tmp_path, source):
    stream = spectra.decompose(source, out=tmp_path / "run")
    next(stream)
    run = Store(tmp_path / "run").run()
    from spectra.results import run_file

    run_file.write(tmp_path / "run" / "run.json", run | {"inputs": run["inputs"] | {"tuned": "another"}})
    with pytest.raises(StoreError, match="claimed by another run"):
        list(stream)


def test_of_two_models_that_begin_at_once_one_gets_the_folder(tmp_path, source):
    write_checkpoint(tmp_path / "other", nudged(llama_tensors(), seed=5))
    code = (
        "import sys, spectra; list(spectra.decompose(spectra.open_source(sys.argv[1], sys.argv[2]), out=sys.argv[3]))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(spectra.__file__).resolve().parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, tuned, source.base, tmp_path / "run"], env=environment, stderr=subprocess.PIPE
        )
        for tuned in (source.tuned, tmp_path / "other")
    ]
    said = [process.communicate()[1].decode() for process in started]
    assert sorted(process.returncode for process in started) == [0, 1]
    assert sum("holds results of other inputs" in text for text in said) == 1


@pytest.fixture
def nothing_can_be_written(monkeypatch):
    def refused(*_, **__):
        raise PermissionError(30, "Read-only file system")

    def forbid():
        monkeypatch.setattr(writing.os, "replace", refused)

    return forbid


def test_a_finished_run_is_read_where_nothing_can_be_written(tmp_path, source, nothing_can_be_written):
    words = ["svd", source.tuned, "--base", source.base, "--out", str(tmp_path / "run"), "--no-figures"]
    first = CliRunner().invoke(main, words)
    nothing_can_be_written()
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    more = CliRunner().invoke(main, [*words, "--top", "2"])
    assert more.exit_code == 1
    assert "Read-only file system" in more.output
    assert "make room" not in more.output
    assert "let this user write there" in more.output


def test_partial_files_of_killed_runs_are_removed_and_those_of_living_ones_kept(tmp_path, source):
    out = tmp_path / "run"
    (out / "spectra").mkdir(parents=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    orphan = out / "spectra" / f".a.safetensors.{writing.HOST}-{dead.pid}.partial"
    own = out / "spectra" / f".b.safetensors.{writing.HOST}-{os.getpid()}.partial"
    far = out / "spectra" / ".c.safetensors.elsewhere-1.partial"
    for path in (orphan, own, far):
        path.write_bytes(b"half")
    list(spectra.decompose(source, out=out))
    assert [path.exists() for path in (orphan, own, far)] == [False, True, True]
    os.utime(far, (0, 0))
    list(spectra.decompose(source, out=out))
    assert not far.exists()


def test_partial_files_beside_a_figure_or_a_page_are_removed_and_those_of_other_programs_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    orphan, stranger = tmp_path / f".depth.csv.{writing.HOST}-{dead.pid}.partial", tmp_path / "film.mp4.partial"
    for path in (orphan, stranger):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    writing.write(tmp_path / "page.html", b"whole")
    assert [path.exists() for path in (orphan, stranger)] == [False, True]


@pytest.mark.parametrize("place", ["~nosuchuser/x", "x" * 5000])
def test_places_that_cannot_be_are_one_message(place, source):
    for words in (["plot", place], ["inspect", place], ["inspect", place, "--verify"], ["svd", place]):
        shown = CliRunner().invoke(main, words)
        assert shown.exit_code == 1, (words, shown.output, shown.exception)
        assert isinstance(shown.exception, SystemExit), (words, shown.exception)
    shown = CliRunner().invoke(main, ["svd", source.tuned, "--base", source.base, "--out", place])
    assert isinstance(shown.exception, SystemExit), shown.exception


@pytest.mark.parametrize(
    "words", [["--tuned", ""], ["x", "--base", ""], ["x", "--base", "x", "--cluster", ""], ["x", "--heads", "²"]]
)
def test_empty_and_odd_options_are_usage_errors(words, source):
    words = [source.tuned if word == "x" else word for word in words]
    shown = CliRunner().invoke(main, ["svd", *words])
    assert shown.exit_code == 2, shown.output
