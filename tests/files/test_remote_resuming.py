"""Models on a server: a run that was stopped goes on, and reads nothing twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from support.remote_models import assert_right, data_of, remotely

import spectra
from spectra.errors import StoreError
from spectra.files import far, patience, ranges


def test_resuming_reads_nothing_twice(server, tmp_path):
    remotely("layers.0", out=tmp_path / "out")
    before = {(seen.path, seen.range) for seen in server.seen if seen.server == "cdn" and seen.sent > 1000}
    start = len(server.seen)
    assert_right(remotely("v_proj", out=tmp_path / "out"), tmp_path)
    again = {(seen.path, seen.range) for seen in server.seen[start:] if seen.server == "cdn" and seen.sent > 1000}
    assert again
    assert not before & again


def test_a_run_whose_versions_were_kept_under_another_key_goes_on(server, tmp_path):
    remotely("layers.0", out=tmp_path / "out")
    text = (tmp_path / "out" / "run.json").read_text()
    assert '"version": "' in text
    assert "mtime_ns" not in text
    run_json = json.loads(text)
    for file in run_json["inputs"]["files"].values():
        file["mtime_ns"] = file.pop("version")
    del run_json["checksum"]
    (tmp_path / "out" / "run.json").write_text(json.dumps(run_json))
    start = len(server.seen)
    remotely("layers.0", out=tmp_path / "out")
    assert all(seen.sent < 2000 for seen in server.seen[start:] if seen.server == "cdn"), "it was stored"
    for file in run_json["inputs"]["files"].values():
        file["mtime_ns"] = "another"
    (tmp_path / "out" / "run.json").write_text(json.dumps(run_json))
    with pytest.raises(StoreError, match="files"):
        remotely("layers.0", out=tmp_path / "out")


KILLED = """
import os, signal, sys, time
import spectra
from spectra.engine import solve
real, done = solve.solve_forms, []
def killed(deltas, forms, wanted):
    done.append(deltas)
    if len(done) == 2:
        time.sleep(1.5)  # what is on its way would be asked for again
        os.kill(os.getpid(), signal.SIGKILL)
    return real(deltas, forms, wanted)
solve.solve_forms = killed
source = spectra.open_source("org/tuned", "org/base").select(["v_proj", "q_proj"])
list(spectra.decompose(source, out=sys.argv[1]))
"""


def test_killed_and_resumed_nothing_is_read_twice(server, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out"], env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    before = [*data_of(server, "org/base")[1], *data_of(server, "org/tuned")[1]]
    assert len(before) >= 4, "two matrices were begun"
    start = len(server.seen)
    found = remotely(["v_proj", "q_proj"], out=tmp_path / "out")
    after = [*data_of(server, "org/base", start)[1], *data_of(server, "org/tuned", start)[1]]
    assert not {*before} & {*after}
    assert len({*before, *after}) == len(before) + len(after) == 2 * 4
    assert {spectrum.status for spectrum in found.values()} == {"ok"}
    assert list(ranges.folder().iterdir()) == [], "what was done is not kept"


def test_who_stops_leaves_what_had_come_and_who_has_seen_enough_nothing(server):
    delta = spectra.open_source("org/tuned", "org/base").select("v_proj").deltas[0]

    def stopped():
        with far.expected([delta.refs]):
            delta.read()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    left = set(ranges.folder().iterdir())
    assert len(left) == 2, "for the run that goes on"
    stream = spectra.decompose(spectra.open_source("org/tuned", "org/base"))
    next(stream)
    del stream
    until = time.monotonic() + 30
    while set(ranges.folder().iterdir()) - left and time.monotonic() < until:  # a request may be on its way
        time.sleep(0.05)
    assert set(ranges.folder().iterdir()) <= left


def test_matrices_that_cannot_be_had_do_not_hold_up_the_others(server, tmp_path, monkeypatch):
    """The base of a matrix whose tuned weight is lost was fetched ahead, and is let go."""
    monkeypatch.setattr(patience, "PATIENCE", 0.1)
    monkeypatch.setattr(patience, "FIRST", 0.1)
    source = spectra.open_source("org/tuned", "org/base")
    lost = source.deltas[0].refs[0].path.rpartition("/")[2]
    server.faults.append(lambda handler, seen: "tuned" in seen.path and lost in seen.path and not handler.say(404))
    holders = []
    real = far.Ahead

    def noted(*args, **kwargs):
        holders.append(real(*args, **kwargs))
        return holders[-1]

    monkeypatch.setattr(far, "Ahead", noted)
    statuses = [spectrum.status for spectrum in spectra.decompose(source)]
    assert {"ok", "unreadable"} == set(statuses)
    assert [holder._unread for holder in holders if holder._unread] == []
    assert list(ranges.folder().iterdir()) == [], "nothing is left on the disk"
