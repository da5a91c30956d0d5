"""Models and runs that the commands' tests share."""

from __future__ import annotations

import pytest
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import run

from spectra.plots import tables


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """`llama-7b` and `ckpt/`: a LLaMA-shaped base that the alias finds, and a sharded fine-tune."""
    base = llama_tensors()
    write_checkpoint(tmp_path / "models" / "llama-7b", base, shards=2)
    write_checkpoint(tmp_path / "ckpt", nudged(base), shards=3)
    monkeypatch.setenv("SPECTRA_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def compared(llama):
    """`sim-a`, `sim-b`, `sim-c`: comparisons of q_proj and v_proj with `full`, sim-c of v_proj only, on both sides."""
    write_checkpoint(llama / "full", nudged(llama_tensors(), seed=9))
    for seed, name in enumerate("abc", start=1):
        write_checkpoint(llama / name, nudged(llama_tensors(), seed=seed))
        layers = ["--layer", "v_proj"] + (["--layer", "q_proj"] if name != "c" else [])
        command = ["similarity", name, "full", "--base", "llama-7b", *layers, "--top", 4, "--no-figures"]
        run(*command, *(["--side", "both"] if name == "b" else []), "--out", f"sim-{name}")
    return llama


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a command saves."""
    figures = []
    save = tables.save_figure
    monkeypatch.setattr(tables, "save_figure", lambda figure, *rest: [figures.append(figure), save(figure, *rest)][1])
    return figures
