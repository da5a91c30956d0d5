"""Small results of a run of many lie in one file, and nothing that is promised of a file each is less true of it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import hostile
from support.spectra_kinds import same_spectrum

import spectra
from spectra.errors import StoreError
from spectra.metrics import measuring
from spectra.results import measured, pack, shelf, writing
from spectra.results.store import Store
from spectra.spectrum import Spectrum

PACK = f"spectra/{pack.PACK}"


@pytest.fixture
def packed(monkeypatch):
    """Every small result goes into a pack."""
    monkeypatch.setattr(shelf, "_MANY", 0)


def made(count=5, k=0):
    rng = np.random.default_rng(1)
    return [
        Spectrum(
            f"layers.{i}.v_proj.weight",
            (4, 3),
            S=np.sort(rng.random(3))[::-1],
            U=rng.random((4, k)).astype(np.float32) if k else None,
            Vh=rng.random((k, 3)).astype(np.float32) if k else None,
            method=f"x{i}",
            noise_edge=None if i == 1 else 0.25,
        )
        for i in range(count)
    ]


def contents(folder):
    """File → bytes of what a run leaves, but for run.json, which says when it was."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run(out, source, **options):
    stream = spectra.decompose(source, out=out, **options)
    return {spectrum.name: spectrum for spectrum in stream}, stream


def test_packed_results_are_those_of_files(tmp_path, source, monkeypatch):
    run(tmp_path / "files", source, top=2)
    monkeypatch.setattr(shelf, "_MANY", 0)
    run(tmp_path / "packed", source, top=2)
    files, packed = contents(tmp_path / "files"), contents(tmp_path / "packed")
    assert set(packed) == {PACK, "summary.csv"}
    assert packed["summary.csv"] == files["summary.csv"]
    there, here = spectra.load(tmp_path / "files"), spectra.load(tmp_path / "packed")
    assert here.names == there.names
    for name in there.names:
        same_spectrum(here[name], there[name])
    assert here.to_frame().equals(there.to_frame())
    assert {item.state for item in spectra.check_results(tmp_path / "packed")} == {"sound"}
    assert [item.file for item in spectra.check_results(tmp_path / "packed")] == ["run.json", "summary.csv", PACK]


def test_few_have_files_of_their_own_and_of_many_the_large_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "_MANY", 2)
    large = Spectrum("large.weight", (3000, 3000), S=np.linspace(1, 0, 3000))
    spectra.save([*made(4), large], tmp_path)
    own = sorted(path.name for path in (tmp_path / "spectra").glob("*.safetensors"))
    assert own == [
        "large.weight.safetensors",
        "layers.0.v_proj.weight.safetensors",
        "layers.1.v_proj.weight.safetensors",
    ]
    assert len(spectra.load(tmp_path)) == 5


def test_the_same_run_again_computes_nothing_and_another_layer_joins(tmp_path, source, packed):
    run(tmp_path / "run", source.select("v_proj"))
    run(tmp_path / "run", source.select("q_proj"))
    before = contents(tmp_path / "run")
    again, stream = run(tmp_path / "run", source.select(["v_proj", "q_proj"]))
    assert len(stream.reused) == len(again) == 4
    assert contents(tmp_path / "run") == before
    run(tmp_path / "other", source.select(["q_proj", "v_proj"]))
    assert contents(tmp_path / "other") == before  # in whatever order they came


def test_results_in_files_of_their_own_are_reused_and_replaced_there(tmp_path, source, monkeypatch):
    run(tmp_path / "run", source)
    before = contents(tmp_path / "run")
    monkeypatch.setattr(shelf, "_MANY", 0)
    assert len(run(tmp_path / "run", source)[1].reused) == len(source)
    assert contents(tmp_path / "run") == before
    found, _ = run(tmp_path / "run", source, top=2)
    assert set(contents(tmp_path / "run")) == set(before)
    same_spectrum(spectra.load(tmp_path / "run")[source.deltas[0].name], found[source.deltas[0].name])


def test_what_is_stored_again_with_more_counts(tmp_path, packed):
    spectra.save(made(), tmp_path)
    more = made(3, k=2)
    spectra.save(more, tmp_path)
    there = spectra.load(tmp_path)
    assert [spectrum.k for spectrum in there] == [2, 2, 2, 0, 0]
    same_spectrum(there[more[2].name], more[2])
    with pytest.raises(StoreError, match="more than the new"):
        spectra.save(made(), tmp_path)


def test_a_process_that_is_killed_has_lost_nothing_that_it_gave(tmp_path, source):
    code = (
        "import os, sys, signal, spectra\n"
        "from spectra.results import shelf\n"
        "shelf._MANY = 0\n"
        "stream = spectra.decompose(spectra.open_source(sys.argv[1], sys.argv[2]), out=sys.argv[3])\n"
        "for count, spectrum in enumerate(stream, 1):\n"
        "    print(spectrum.name, flush=True)\n"
        "    if count == int(sys.argv[4]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(spectra.__file__).resolve().parents[1])}
    out, given = tmp_path / "run", set()
    for number in (1, 5):
        words = [sys.executable, "-c", code, source.tuned, source.base, out, str(number)]
        ended = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        given |= set(ended.stdout.split())
        assert given <= set(spectra.load(out).names)
        assert {item.state for item in spectra.check_results(out)} == {"sound"}
    (out / PACK).parent.joinpath("small.x.log.safetensors~").touch()  # another program's
    stream = subprocess.run(
        [sys.executable, "-c", code, source.tuned, source.base, out, "-1"], env=environment, text=True
    )
    assert stream.returncode == 0
    (out / "spectra" / "small.x.log.safetensors~").unlink()
    code = code.replace("== int(sys.argv[4])", "< 0")
    words = [sys.executable, "-c", code, source.tuned, source.base, tmp_path / "whole", "0"]
    subprocess.run(words, env=environment, check=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert len(given) == 5


@pytest.mark.parametrize("cut", [1, 40, 1500])
def test_a_record_that_was_being_written_is_no_damage_and_costs_no_other(tmp_path, packed, cut):
    store = Store(tmp_path)
    for spectrum in made():
        store.put(spectrum)
    (log,) = (tmp_path / "spectra").iterdir()
    log.write_bytes(log.read_bytes()[:-cut])
    del store
    again = Store(tmp_path)
    assert len(again.names()) == (3 if cut > 200 else 4)
    assert again.spectra.faults() == []
    assert {item.state for item in spectra.check_results(tmp_path)} == {"sound"}
    spectra.save(made(), tmp_path)
    assert set(contents(tmp_path)) == {PACK, "summary.csv"}
    for spectrum in made():
        same_spectrum(spectra.load(tmp_path)[spectrum.name], spectrum)


def test_every_flipped_bit_is_found_and_costs_one_record(tmp_path, packed):
    spectra.save(made(k=2), tmp_path)
    right = {spectrum.name: spectrum for spectrum in made(k=2)}
    content = (tmp_path / PACK).read_bytes()
    rng = random.Random(2)
    for _ in range(400):
        place = rng.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / PACK).write_bytes(flipped)
        states = {item.file: item.state for item in spectra.check_results(tmp_path)}
        assert states[PACK] == "damaged", place
        there, refused = spectra.load(tmp_path), []
        assert there.names == tuple(right)
        for name in there.names:
            try:
                same_spectrum(there[name], right[name])
            except StoreError as problem:
                refused.append(str(problem))
        assert len(refused) <= 1, place
        assert all("small.pack is missing or damaged" in said for said in refused), refused


@pytest.mark.parametrize("harm", ["bit in a name", "bit in numbers", "cut", "cut between", "longer", "gone", "noise"])
def test_the_next_run_says_what_is_damaged_and_computes_that_alone(tmp_path, source, packed, harm):
    run(tmp_path / "run", source)
    right = contents(tmp_path / "run")
    path = tmp_path / "run" / PACK
    content = bytearray(path.read_bytes())
    spots = list(pack.scan(path)[0].values())
    if harm.startswith("bit"):
        content[spots[3].start + (50 if harm.endswith("name") else spots[3].size - 1)] ^= 4
    elif harm.startswith("cut"):
        del content[spots[-2].start + (0 if harm.endswith("between") else 70) :]
    elif harm == "longer":
        content += b"more"
    elif harm == "noise":
        content[:] = random.Random(1).randbytes(len(content))
    path.write_bytes(content)
    if harm == "gone":
        path.unlink()
    kept = {"bit": len(source) - 1, "cut": len(source) - 2, "longer": len(source)}.get(harm.split()[0], 0)
    again, stream = run(tmp_path / "run", source)
    assert (len(again), len(stream.reused)) == (len(source), kept)
    assert harm == "gone" or any(PACK in note and "damaged" in note for note in stream.notes)
    assert contents(tmp_path / "run") == right
    assert {item.state for item in spectra.check_results(tmp_path / "run")} == {"sound"}


def test_the_hurried_may_not_care(tmp_path, packed):
    spectra.save(made(k=2), tmp_path)
    name = "layers.2.v_proj.weight"
    spot = pack.scan(tmp_path / PACK)[0][name]
    content = bytearray((tmp_path / PACK).read_bytes())
    content[spot.start + spot.size - 1] ^= 1  # in Vh, the last array
    (tmp_path / PACK).write_bytes(content)
    assert len(spectra.load(tmp_path, vectors=False)[name].S) == 3
    with pytest.raises(StoreError, match="the checksum of Vh does not fit"):
        spectra.load(tmp_path)[name]
    assert spectra.load(tmp_path, verify=False)[name].Vh.shape == (2, 3)


@pytest.mark.parametrize("what", ["folder", "pipe", "loop", "link", "hole", "empty"])
def test_what_is_no_pack_is_said_and_nobody_waits_for_it(tmp_path, source, packed, what):
    run(tmp_path / "run", source)
    right = contents(tmp_path / "run")
    path = tmp_path / "run" / PACK
    path.unlink()
    made_of = {
        "folder": lambda: path.mkdir(), "pipe": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(path.name),
        "link": lambda: path.symlink_to("/etc/passwd"), "empty": path.touch,
        "hole": lambda: (path.touch(), os.truncate(path, 2**36)),
    }  # fmt: skip
    made_of[what]()
    begun = time.monotonic()
    with pytest.raises(StoreError, match="damaged"):
        spectra.load(tmp_path / "run")[source.deltas[0].name]
    assert "damaged" in {item.state for item in spectra.check_results(tmp_path / "run")}
    if what == "folder":
        with pytest.raises(StoreError, match="cannot be written"):
            run(tmp_path / "run", source)
        path.rmdir()
    run(tmp_path / "run", source)
    assert contents(tmp_path / "run") == right
    assert time.monotonic() - begun < 30


def test_names_that_no_file_can_have(tmp_path, packed):
    stored = [Spectrum(name, (1, 1), S=[float(i)]) for i, name in enumerate(hostile.NAMES, 1)]
    spectra.save(stored, tmp_path)
    assert set(contents(tmp_path)) == {PACK, "summary.csv"}
    there = spectra.load(tmp_path)
    assert set(there.names) == set(hostile.NAMES)
    for spectrum in stored:
        same_spectrum(there[spectrum.name], spectrum)


def test_a_full_disk_leaves_what_was_there_and_nothing_half(tmp_path, packed, monkeypatch):
    store, (first, second, third) = Store(tmp_path), made(3)
    store.put(first)
    write = os.write

    def full(file, content):
        if len(content) < 200:
            raise OSError(28, "No space left on device")
        return write(file, content[: len(content) - 100])

    monkeypatch.setattr(pack.os, "write", full)
    with pytest.raises(StoreError, match=r"\.log cannot be written \(No space left on device\).*make room"):
        store.put(second)
    monkeypatch.undo()
    monkeypatch.setattr(shelf, "_MANY", 0)
    store.put(third)
    store.finish()
    assert spectra.load(tmp_path).names == (first.name, third.name)
    same_spectrum(spectra.load(tmp_path)[third.name], third)


def test_a_finished_run_is_read_where_nothing_can_be_written(tmp_path, source, packed, monkeypatch):
    run(tmp_path / "run", source)

    def refused(*_, **__):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(writing.os, "replace", refused)
    monkeypatch.setattr(pack.os, "open", refused)
    again, stream = run(tmp_path / "run", source)
    assert len(stream.reused) == len(source) == len(again)
    with pytest.raises(StoreError, match="Read-only file system"):
        run(tmp_path / "run", source, top=2)


def test_metrics_of_other_code_are_measured_once_and_kept(tmp_path, source, packed, monkeypatch):
    run(tmp_path / "run", source, top=2)
    before, frame = contents(tmp_path / "run"), spectra.load(tmp_path / "run").to_frame()
    usual, asked = measuring.measured_together, []
    monkeypatch.setattr(measuring, "measured_together", lambda *given: asked.extend(given[0]) or usual(*given))
    monkeypatch.setattr(measured, "code", lambda: "another")
    again, stream = run(tmp_path / "run", source, top=2)
    assert len(asked) == len(stream.reused) == len(source)
    after = contents(tmp_path / "run")
    assert set(after) == set(before)
    assert after["summary.csv"] == before["summary.csv"]
    assert {item.state for item in spectra.check_results(tmp_path / "run")} == {"sound"}
    asked.clear()
    run(tmp_path / "run", source, top=2)
    assert contents(tmp_path / "run") == after
    assert spectra.load(tmp_path / "run").to_frame().equals(frame)
    assert not asked
    for name, spectrum in again.items():
        same_spectrum(spectra.load(tmp_path / "run")[name], spectrum)


def test_metrics_of_other_code_need_no_room(tmp_path, source, packed, monkeypatch):
    run(tmp_path / "run", source)
    before, calls = contents(tmp_path / "run"), []

    def full(*given):
        calls.append(given)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measured, "code", lambda: "another")
    monkeypatch.setattr(pack.os, "write", full)
    again, stream = run(tmp_path / "run", source)
    assert len(stream.reused) == len(again) == len(source)
    assert len(calls) == 1
    held = {name: content for name, content in contents(tmp_path / "run").items() if not name.endswith(".log")}
    assert held == before


def test_a_pack_is_read_again_whenever_it_was_written_to(tmp_path, packed, monkeypatch):
    spectra.save(made(3), tmp_path)
    path = tmp_path / PACK
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))
    first = pack._scanned(path)
    assert pack._scanned(path)[0] is not first[0]  # its time was changed just now
    monkeypatch.setattr(pack, "_SETTLES", 0)
    time.sleep(0.05)
    first = pack._scanned(path)
    assert pack._scanned(path)[0] is first[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (long_ago, long_ago))  # of the same size and time
    assert pack._scanned(path)[1] != ""


def test_a_pack_that_cannot_be_read_for_now_is_not_replaced(tmp_path, packed, monkeypatch):
    first, second = made(2)
    spectra.save([first], tmp_path)
    opened = pack._opened

    def denied(path):
        if path.name == pack.PACK:
            raise PermissionError(13, "Permission denied")
        return opened(path)

    monkeypatch.setattr(pack, "_opened", denied)
    with pytest.raises(StoreError, match=r"small.pack cannot be written \(Permission denied\)"):
        spectra.save([second], tmp_path)
    monkeypatch.setattr(pack, "_opened", opened)
    assert set(spectra.load(tmp_path).names) == {first.name, second.name}
    same_spectrum(spectra.load(tmp_path)[first.name], first)


def test_what_another_process_is_adding_is_read_and_stays(tmp_path, packed):
    mine, (a, b, c) = Store(tmp_path), made(3)
    mine.put(a)
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (log,) = (tmp_path / "spectra").glob("*.log")
    theirs = log.with_name(f"small.{writing.HOST}-{living.pid}-1.log")
    other = Store(tmp_path / "elsewhere")
    other.put(b)
    shutil.move(next((tmp_path / "elsewhere" / "spectra").glob("*.log")), theirs)
    mine.put(c)
    mine.finish()
    assert set(spectra.load(tmp_path).names) == {a.name, b.name, c.name}
    assert [path.name for path in (tmp_path / "spectra").glob("*.log")] == [theirs.name]
    living.communicate(b"\n")
    assert {item.state for item in spectra.check_results(tmp_path)} == {"sound"}
    Store(tmp_path).finish()
    assert [path.name for path in (tmp_path / "spectra").iterdir()] == [pack.PACK]
    assert set(spectra.load(tmp_path).names) == {a.name, b.name, c.name}


def test_a_log_that_another_machine_took_away_is_begun_anew(tmp_path, packed):
    store, (a, b) = Store(tmp_path), made(2)
    store.put(a)
    (log,) = (tmp_path / "spectra").glob("*.log")
    log.unlink()
    store.put(b)
    store.put(a)
    store.finish()
    assert set(spectra.load(tmp_path).names) == {a.name, b.name}


def test_readers_find_what_a_later_run_moved(tmp_path, packed):
    spectra.save(made(5)[2:], tmp_path)
    reading = spectra.load(tmp_path)
    same_spectrum(reading[0], made()[2])
    spectra.save([replace(made()[0], note="x" * 5000), made()[1]], tmp_path)
    for spectrum in made()[2:]:
        same_spectrum(reading[spectrum.name], spectrum)


def test_a_folder_that_is_deleted_under_a_run_is_no_success(tmp_path, source, packed):
    stream = spectra.decompose(source, out=tmp_path / "run")
    for _ in range(5):
        next(stream)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StoreError, match=r"of the \d+ results that this run stored .* are not there any more"):
        list(stream)


def test_comparisons_are_packed_reused_and_made_again_where_they_are_damaged(tmp_path, source, packed):
    out = tmp_path / "run"
    first = [item.phi for item in spectra.compare(source, source, top=2, out=out)]
    right = contents(out)
    assert set(right) == {f"similarity/{pack.PACK}", "similarity.csv"}
    path = out / "similarity" / pack.PACK
    spot = next(iter(pack.scan(path)[0].values()))
    content = bytearray(path.read_bytes())
    content[spot.start + spot.size - 1] ^= 64
    path.write_bytes(content)
    (out / "run.json").write_text("[]")
    again = spectra.compare(source, source, top=2, out=out)
    assert sorted(item.phi for item in again) == sorted(first)
    assert len(again.reused) == len(first) - 1
    assert any("compared again" in line for line in again.notes)
    assert contents(out) == right


def test_what_the_version_before_packs_stored_is_read_checked_and_added_to(tmp_path, packed):
    """`stored_before_packs` was written by commit 95f7907: two matrices, one without numbers, and a comparison."""
    shutil.copytree(Path(__file__).parent / "stored_before_packs", tmp_path / "run")
    before = contents(tmp_path / "run")
    assert {item.state for item in spectra.check_results(tmp_path / "run")} == {"sound"}
    there = spectra.load(tmp_path / "run")
    assert [spectrum.status for spectrum in there] == ["ok", "unchanged", "nonfinite"]
    assert there[0].S.tolist() == [2.0, 1.0, 0.25]
    assert (there[0].U.shape, there[0].Vh.shape, there[0].U.dtype) == ((4, 2), (2, 3), np.float64)
    assert there.names[2] == "layers.2.\x1b" + "x" * 300 + ".weight"
    (compared,) = Store(tmp_path / "run").similarities()
    assert compared.phi == pytest.approx(1.0)
    spectra.save([Spectrum("layers.3.v_proj.weight", (4, 3), S=[1.0, 0.5, 0.0])], tmp_path / "run")
    after = contents(tmp_path / "run")
    assert {name: after[name] for name in before if name != "summary.csv"} == {
        name: before[name] for name in before if name != "summary.csv"
    }
    assert len(spectra.load(tmp_path / "run")) == 4
    assert {item.state for item in spectra.check_results(tmp_path / "run")} == {"sound"}


@pytest.mark.parametrize("claimed", [(0, 0, 0), (4, 2**19, 4)])
def test_marks_without_records_take_a_time_that_grows_as_the_file_does(tmp_path, monkeypatch, claimed):
    # Each mark was followed by a search through four MiB, or by a checksum of as much: half an hour for some MiB.
    read = 0
    opened = pack._opened

    class Counting:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *problem):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def read(self, size):
            nonlocal read
            content = self.file.read(size)
            read += len(content)
            return content

    monkeypatch.setattr(pack, "_opened", lambda path: Counting(opened(path)))
    head = pack._MARK if not any(claimed) else pack._HEAD.pack(pack._MARK, *claimed, 16 * b"x")
    file = tmp_path / pack.PACK
    file.write_bytes(head * (2**20 // len(head)))
    spots, fault = pack.scan(file)
    assert not spots
    assert "0 of its records are sound" in fault
    assert read < 2 * (pack._MOST + pack._TRIED * file.stat().st_size)


def test_a_mark_across_two_searched_blocks_is_found(tmp_path, packed):
    for gap in range(pack._BLOCK - 10, pack._BLOCK + 3):
        folder = tmp_path / str(gap)
        spectra.save(made(), folder)
        file = folder / PACK
        file.write_bytes(bytes(gap) + file.read_bytes())
        assert len(pack.scan(file)[0]) == 5


def test_what_another_process_adds_before_it_is_killed_is_kept_by_whoever_seals_meanwhile(tmp_path, monkeypatch):
    # Its records were listed while it was at work, and its file removed once it was gone.
    other = pack.Pack(tmp_path)
    other.add("first", b"{}", b"")
    log = other._log.path
    mine = pack.Pack(tmp_path)
    assert set(mine.spots) == {"first"}

    def killed(file):
        if file == log and "second" not in other.spots:
            other.add("second", b"{}", b"")
        return file == log

    monkeypatch.setattr(pack, "_is_left", killed)
    mine.seal(str)
    assert not log.exists()
    assert set(pack.Pack(tmp_path).spots) == {"first", "second"}


def test_a_hole_that_is_longer_than_a_record_is_told(tmp_path, packed):
    """Behind it nothing is looked for, so that nobody waits for a file of nothing; but it is not silent."""
    store = Store(tmp_path)
    for spectrum in made(3):
        store.put(spectrum)
    (log,) = tmp_path.glob("spectra/small.*.log")
    sound = log.read_bytes()
    hole = 2 * pack._MOST
    with log.open("r+b") as file:
        file.seek(len(sound) + hole)
        file.write(sound)
    spots, fault = pack.scan(log)
    assert len(spots) == 3
    assert "not all that were stored" in fault
    os.truncate(log, len(sound) + 100)  # a part of one record, as a killed process leaves it
    assert pack.scan(log)[1] == ""
