"""The process that draws for `svd --out`: the same figures, an end whatever happens, and never a missing figure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spectra.cli.drawing import DrawingProcess, drawing_process
from spectra.cli.main import main
from spectra.errors import SelectionError
from spectra.results.collection import save
from spectra.results.homes import home_of
from spectra.spectrum import Spectrum

CALLS = [{"kinds": (kind,)} for kind in ("histogram", "depth")]


@pytest.fixture
def stored(tmp_path):
    """A directory with the spectra of three layers."""
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]
    values = np.array([3.0, 2.0, 1.0, 0.5])
    save([Spectrum(name, (4, 4), S=values * at) for at, name in enumerate(names, 1)], tmp_path / "run")
    return tmp_path / "run"


def test_it_draws_what_would_be_drawn_here(stored, tmp_path):
    from spectra import draw_results

    with drawing_process(True) as process:
        files, notes = process.draw(str(stored), CALLS)
    here = draw_results(stored, tmp_path / "here")
    assert [path.name for path in files] == [path.name for path in here.files]
    assert notes == list(here.notes)
    for path in here.files:
        assert (stored / path.name).read_bytes() == path.read_bytes()


def test_a_relative_directory_is_that_of_the_moment(stored, monkeypatch):
    with drawing_process(True) as process:
        monkeypatch.chdir(stored.parent)
        files, _ = process.draw("run", CALLS[:1])
    assert files[0] == Path("run/histogram.png")
    assert (stored / "histogram.png").is_file()


def test_what_cannot_be_drawn_is_an_error_here(stored):
    with drawing_process(True) as process, pytest.raises(SelectionError, match="poster"):
        process.draw(str(stored), [call | {"size": "poster"} for call in CALLS])


@pytest.mark.parametrize("when", ["not begun", "killed"])
def test_without_the_process_the_command_draws_itself(when, stored, tmp_path, monkeypatch):
    import torch
    from click.testing import CliRunner
    from support.checkpoints import write_checkpoint

    for name, size in (("base", 0.0), ("tuned", 1.0)):
        write_checkpoint(tmp_path / name, {"model.layers.0.self_attn.q_proj.weight": torch.eye(4) * size})
    if when == "not begun":
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    else:
        begin = DrawingProcess.__init__

        def die(process):
            begin(process)
            process._process.kill()

        monkeypatch.setattr(DrawingProcess, "__init__", die)
    out = tmp_path / "out"
    done = CliRunner().invoke(
        main, ["svd", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert (home_of(out) / "histogram.png").is_file()


def test_ctrl_c_is_for_whoever_began_it(stored):
    with drawing_process(True) as process:
        time.sleep(1.0)
        os.kill(process._process.pid, signal.SIGINT)
        assert process.draw(str(stored), CALLS[:1]) is not None


def test_it_goes_when_whoever_began_it_is_killed():
    code = (
        "import sys, time; from spectra.cli.drawing import DrawingProcess\n"
        "print(DrawingProcess()._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_it_is_closed_unused():
    with drawing_process(True) as process:
        pass
    assert process._process.poll() is not None
    with drawing_process(False) as process:
        assert process is None
