"""Ctrl-C, and the same command again: what is kept is said, and used."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from support import reading
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import lora_folder, run

import spectra
from spectra.deltas.base import BaseWeight

PAIR = ("--base", "llama-7b", "--tuned", "ckpt")


def stopping(*given, **named):
    raise KeyboardInterrupt


def stop_at_the_fifth(patch):
    """Ctrl-C while the fifth matrix is read."""
    reads = []

    def stop(delta):
        reads.append(delta.name)
        if len(reads) == 5:
            stopping()

    reading.watch(patch, stop)


@pytest.fixture
def interrupted(monkeypatch):
    stop_at_the_fifth(monkeypatch)


def test_svd_says_what_is_stored_and_goes_on_from_there(llama, monkeypatch):
    command = ("svd", *PAIR, "--out", "results", "--no-figures", "--workers", 1)
    with monkeypatch.context() as patch:
        stop_at_the_fifth(patch)
        out, err = run(*command, status=130)
    assert out == ""
    stored = len(spectra.load("results"))
    assert err.splitlines()[-1] == f"stopped; {stored} of 16 are stored in results, the same command goes on"
    assert 0 < stored <= 4
    assert f"{stored} of 16 reused from results" in run(*command)[1]
    assert "16 of 16 reused from results" in run(*command)[1]


def test_nothing_was_reused_the_first_time(llama):
    _, err = run("svd", *PAIR, "--out", "results", "--no-figures", "--layer", "v_proj")
    assert "reused" not in err
    _, err = run("svd", *PAIR, "--out", "results", "--no-figures", "--layer", "self_attn")
    assert "2 of 8 reused from results" in err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("svd", *PAIR), "nothing is stored: with --out DIR the same command goes on"),
        (("extract", *PAIR, "--rank", 2, "--out", "lora"), "were done, nothing was written"),
        (("alignment", *PAIR), "of 16 were done, nothing is stored: --cache DIR keeps W₀'s vectors"),
        (("similarity", "ckpt", "other", "--base", "llama-7b"), "nothing is stored: with --out DIR"),
        (("similarity", "ckpt", "other", "--base", "llama-7b", "--out", "sim"), "are stored in sim, the same command"),
    ],
)
def test_every_command_that_computes_says_what_is_kept(llama, interrupted, command, words):
    write_checkpoint(llama / "other", nudged(llama_tensors(), seed=9))
    _, err = run(*command, status=130)
    assert err.splitlines()[-1].startswith("stopped; ")
    assert words in err.splitlines()[-1]
    assert not (llama / "lora").exists()


def test_a_series_that_is_stopped_in_its_first_checkpoint_says_which_matrices_are_stored(llama, monkeypatch):
    for step in (10, 20):
        write_checkpoint(llama / f"step-{step}", nudged(llama_tensors(), seed=step))
    command = ("series", "step-10", "step-20", "--base", "llama-7b", "--out", "run", "--no-figures", "--workers", 1)
    with monkeypatch.context() as patch:
        stop_at_the_fifth(patch)
        _, err = run(*command, status=130)
    stored = len(spectra.load("run/checkpoints/step-20"))
    told = f"stopped; 0 of 2 are stored in run ({stored} matrices of 1 checkpoints), the same command goes on"
    assert err.splitlines()[-1] == told
    assert stored
    assert f"{stored} of 32 reused from run" in run(*command)[1]


def test_verify_gives_no_verdict_when_it_is_stopped(llama, monkeypatch):
    from spectra.merges import verify

    lora_folder(llama / "lora", seed=1)
    monkeypatch.setattr(verify, "_check", stopping)
    out, err = run("verify", "--base", "llama-7b", "--adapter", "lora", "--merged", "ckpt", status=130)
    assert out == ""
    assert err.splitlines()[-1].endswith("were done, which is no verdict")


def test_a_stop_outside_the_computing_is_one_word(llama, monkeypatch):
    monkeypatch.setattr("spectra.sources.open_source", stopping)
    assert run("svd", *PAIR, status=130)[1] == "stopped\n"


def test_comparisons_say_what_was_reused(llama, monkeypatch):
    write_checkpoint(llama / "other", nudged(llama_tensors(), seed=9))
    command = ("similarity", "ckpt", "other", "--base", "llama-7b", "--out", "sim", "--no-figures", "--side", "both")
    assert "reused" not in run(*command, "--layer", "v_proj")[1]
    monkeypatch.setattr(BaseWeight, "read", None)
    assert "2 of 2 reused from sim" in run(*command, "--layer", "v_proj")[1]


def test_pairs_of_three_updates_say_what_was_reused(llama):
    for seed in (8, 9):
        write_checkpoint(llama / f"other-{seed}", nudged(llama_tensors(), seed=seed))
    command = ("similarity", "ckpt", "other-8", "other-9", "--base", "llama-7b", "--out", "sim", "--no-figures")
    assert "reused" not in run(*command, "--layer", "v_proj")[1]
    assert "6 of 12 reused from sim" in run(*command, "--layer", "v_proj,k_proj")[1]
    assert "12 of 12 reused from sim" in run(*command, "--layer", "v_proj,k_proj", "--side", "left")[1]


def test_a_series_says_what_was_reused_whether_its_checkpoint_is_given_or_not(llama):
    for step in (10, 20):
        write_checkpoint(llama / f"step-{step}", nudged(llama_tensors(), seed=step))
    command = ("--base", "llama-7b", "--layer", "v_proj", "--out", "run", "--no-figures")
    assert "reused" not in run("series", "step-10", *command)[1]
    assert "2 of 4 reused from run" in run("series", "step-10", "step-20", *command)[1]
    assert "4 of 4 reused from run" in run("series", "step-20", *command)[1]
    assert "4 of 4 reused from run" in run("series", "--out", "run", "--no-figures")[1]


# Where the tests run in a shell's background, Ctrl-C is ignored, and so it would be by what they start.
HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
LONG = """
import sys, torch
from spectra.cli.main import main
from spectra.deltas.delta import WeightDelta
def read(self, device="cpu"):
    print("begun", file=sys.stderr, flush=True)
    torch.linalg.svdvals(torch.randn(6000, 6000, dtype=torch.float64))  # a minute in which Python hears nothing
WeightDelta.read = read
main(sys.argv[1:])
"""


WAITING = "waiting for the matrices in hand; Ctrl-C again ends it at once\n"


def test_one_ctrl_c_says_what_it_waits_for_and_two_end_it_at_once(llama):
    started = subprocess.Popen(
        [sys.executable, "-c", HEARD + LONG, "svd", "--base", "llama-7b", "--tuned", "ckpt", "--workers", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while "begun" not in (line := started.stderr.readline()):
            assert line, "it ended before it began"
        started.send_signal(signal.SIGINT)
        stopped, waiting = sorted(started.stderr.readline() for _ in range(2))  # on a busy machine in either order
        assert stopped.startswith("stopped; 0 of 16 were done")
        assert waiting == WAITING
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=20)
    finally:
        started.kill()
    assert (started.returncode, out, err) == (130, "", "")


def test_a_ctrl_c_that_is_heard_at_once_is_one_word_and_no_traceback(llama):
    code = f"{HEARD}import os, sys; from spectra.cli.main import main; import spectra.sources as it\n"
    code += "it.open_source = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)\nmain(sys.argv[1:])"
    words = [sys.executable, "-c", code, "svd", "--base", "llama-7b", "--tuned", "ckpt"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize("loading", ["click.globals", "spectra.cli.options", "numpy._core.multiarray", "torch._C"])
def test_ctrl_c_while_modules_are_loaded_is_one_word_and_no_traceback(llama, loading):
    """As `spectra` and `python -m spectra` start; every module that was loaded is told on stderr."""
    code = f"{HEARD}import runpy; runpy.run_module('spectra', run_name='__main__', alter_sys=True)"
    words = [sys.executable, "-X", "importtime", "-c", code, "svd", "--base", "llama-7b", "--tuned", "ckpt"]
    started = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (line := started.stderr.readline()).rstrip().endswith(f" {loading}"):
            assert line, "it ended before that was loaded"
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=60)
    finally:
        started.kill()
    said = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (started.returncode, out, said) == (130, "", ["stopped"])


def test_who_handles_ctrl_c_otherwise_goes_on_doing_so(llama):
    before = signal.getsignal(signal.SIGINT)
    assert "stopped" not in run("inspect", "ckpt")[1]
    assert signal.getsignal(signal.SIGINT) is before
    mine = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run("inspect", "ckpt")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, mine)
