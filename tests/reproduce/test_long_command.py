"""The long experiment end to end on a tiny model: killed once, finished, looked at, and what it leaves."""

from __future__ import annotations

import functools
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from click.testing import CliRunner

from spectra.cli import main
from spectra.errors import MissingExtraError, NotFoundError, StoreError
from spectra.reproduce.long import LONG, LongPlan, reproduce_long
from spectra.reproduce.long import experiment as experiment_module
from spectra.reproduce.long.experiment import alone, time_left, train_all
from spectra.reproduce.long.numbers import Numbers
from spectra.reproduce.long.page import tables

PLAN = LongPlan(base_steps=3, steps=60, first=30, r=2, n=2, per_task=1, held_out=8, hidden=32, layers=1)
SCRIPT = """
import sys
from pathlib import Path
from spectra.reproduce.long import LongPlan
from spectra.reproduce.long import experiment as experiment_module
from spectra.reproduce.long.experiment import train_all
if __name__ == "__main__":
    train_all(Path(sys.argv[1]), {plan}, say=lambda line: print(line, flush=True))
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Killed while runs are at work, so that whatever a worker left behind would still write, then finished."""
    folder = tmp_path_factory.mktemp("experiment")
    script = folder / "script.py"
    script.write_text(SCRIPT.format(plan=repr(PLAN)))
    first = subprocess.Popen([sys.executable, script, folder / "out"], stdout=subprocess.PIPE, text=True)
    while "lora is trained" not in (line := first.stdout.readline()):
        assert line or first.poll() is None
    children = _children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    orphans = _still_alive(children)
    kept = {path: path.stat().st_mtime for path in (folder / "out" / "runs").glob("*/result.json")}
    said: list[str] = []
    text = reproduce_long(folder / "out", PLAN, pictures=folder / "figures", processes=1, say=said.append)
    return folder, children, orphans, kept, said, text


def _children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def _still_alive(pids):
    """Those that have not ended ten seconds later: the tracker of resources ends a moment after its parent."""
    deadline = time.monotonic() + 10
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if _alive(pid)]


def test_a_killed_call_leaves_no_worker_and_keeps_finished_runs(experiment):
    _, children, orphans, kept, _, _ = experiment
    assert len(children) >= 2
    assert not orphans
    assert len(kept) >= 2  # the base and one run at least
    assert all(path.stat().st_mtime == before for path, before in kept.items())


def test_it_leaves_figures_beside_their_numbers(experiment):
    folder, _, _, _, said, text = experiment
    pictures = folder / "figures"
    assert text.startswith("### What the rule says\n\n**")
    assert "spectra and agreement of every snapshot" in said
    for name in ("along-training", "at-equal-loss", "agreement", "spectra"):
        assert (pictures / f"{name}.png").stat().st_size > 10_000
    summary = pd.read_csv(pictures / "summary.csv")
    assert set(summary["run"]) == {run.name for run in PLAN.runs()}
    assert set(summary["step"]) == {0, 30, 60}
    assert summary.loc[summary["step"] == 0, "rank_90"].isna().all()
    assert summary.loc[summary["step"] > 0, "rank_90"].notna().all()
    assert len(pd.read_csv(pictures / "snapshots.csv.gz")) == len(PLAN.runs()) * 2 * 7
    assert len(pd.read_csv(pictures / "losses.csv")) == len(PLAN.runs()) * 3 * 8
    loss = pd.read_csv(pictures / "losses.csv").groupby(["run", "step"])["loss"].mean()
    assert loss[("lora", 60)] == pytest.approx(summary.set_index(["run", "step"]).loc[("lora", 60), "loss"], rel=1e-4)


def test_the_tables_are_made_of_the_numbers(experiment):
    pictures = experiment[0] / "figures"
    assert tables(Numbers.load(pictures), PLAN) == (pictures / "tables.md").read_text()


def test_so_far_trains_nothing_and_looks_at_what_is_there(experiment, tmp_path):
    folder = experiment[0]
    there = tmp_path / "out"
    (there / "runs").mkdir(parents=True)
    for name in ("base", "lora", "multilora"):
        (there / "runs" / name).symlink_to(folder / "out" / "runs" / name)
    text = reproduce_long(there, PLAN, pictures=tmp_path / "figures", so_far=True)
    assert "multilora-2 has not come to this step" in text
    assert ", so far" in text
    assert (tmp_path / "figures" / "along-training.png").is_file()
    assert not (there / "runs" / "full").exists()


def test_a_directory_of_another_plan_is_refused_before_anything_is_trained(experiment):
    with pytest.raises(StoreError, match="holds this run with other settings"):
        train_all(experiment[0] / "out", LONG)


def test_what_fails_in_a_worker_is_said_at_once_and_stops_the_others(tmp_path, monkeypatch):
    """A base that is no model: every run fails in its process."""
    monkeypatch.setattr(experiment_module, "refuse_other_plan", lambda plan, directory: None)
    folder = tmp_path / "runs" / "base"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    with pytest.raises(StoreError, match="holds this run with other settings"):
        train_all(tmp_path, PLAN)
    assert not (tmp_path / "runs" / "lora").exists()


def test_ctrl_c_ends_at_once_with_its_workers(tmp_path):
    ours = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    command = [sys.executable, "-m", "spectra", "reproduce", "long", "--out", str(tmp_path)]
    unignored = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, preexec_fn=unignored, **ours)
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs" / "base" / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = _children(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.endswith("stopped\n")
    assert "Traceback" not in said
    assert len(children) >= 2
    assert not _still_alive(children)


def test_errors_of_workers_come_through():
    problem = pickle.loads(pickle.dumps(MissingExtraError("spectra reproduce", "reproduce")))
    assert str(problem) == str(MissingExtraError("spectra reproduce", "reproduce"))


def test_nothing_so_far_says_what_to_do(tmp_path):
    done = CliRunner().invoke(main, ["reproduce", "long", "--so-far", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "holds no run that has come to step 50: train first, without --so-far" in done.output
    with pytest.raises(NotFoundError):
        reproduce_long(tmp_path, LONG, pictures=tmp_path, so_far=True)


def test_options_of_the_other_experiment_are_refused(tmp_path):
    done = CliRunner().invoke(main, ["reproduce", "--quick", "long", "--so-far", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "--quick before long is an option of the other experiment: put it behind long" in done.output


def test_two_at_a_time_in_one_directory_are_refused(tmp_path):
    with alone(tmp_path), pytest.raises(StoreError, match="being trained in by another process"):
        train_all(tmp_path, PLAN)


def test_the_time_left_follows_the_pace_of_this_call():
    assert time_left(1200, 100, 10.0) == "about 2 min left"
    assert time_left(10, 100, 10.0) == "less than a minute left"
    assert time_left(10, 0, 10.0) == "no step yet"


def test_the_help_says_the_plans_steps():
    text = CliRunner().invoke(main, ["reproduce", "long", "--help"]).output
    assert re.search(rf"Twelve runs of {LONG.steps:,} steps", text)
    assert len(LONG.runs()) == 12
