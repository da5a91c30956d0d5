"""Tables on the terminal: its width, the columns that are asked for, their order, and colours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress

import pytest
from support.command_line import run

import spectra
from spectra.cli.table import _Column, _total, colours, fitted
from spectra.results.alignment import COLUMNS, alignment_rows

PAIR = ("ckpt", "--base", "llama-7b")


def columns(names, **numbers):
    return [_Column("matrix", names, True), *(_Column(head, cells, False) for head, cells in numbers.items())]


def test_names_are_cut_only_as_far_as_they_stay_apart():
    names = [f"model.layers.{i}.self_attn.v_proj.weight" for i in range(12)]
    for width in range(20, 60):
        found, said = fitted(columns(names, norm=["1.234"] * 12, rank=["3"] * 12), width)
        cells = found[0].cells
        assert len(set(cells)) == 12
        assert _total(found) <= width or len(found) == 2
        assert (len(found) == 3) == (not said)
    assert fitted(columns(names, norm=["1"] * 12), 48)[0][0].cells[3] == names[3]
    assert fitted(columns(names, norm=["1"] * 12), 34)[0][0].cells[3] == "layers.3.self_attn.v_proj"


def test_what_is_the_same_in_every_row_is_said_once_and_the_last_columns_go_next():
    status = _Column("status", ["ok"] * 2, True)
    note = _Column("note", ["k clamped from 30 to 8"] * 2, True)
    given = [
        *columns(["a.x.weight", "b.x.weight"], norm=["1"] * 2),
        status,
        _Column("effective_rank", ["2.5"] * 2, False),
    ]
    found, said = fitted([*given, note], 32)
    assert [column.head for column in found] == ["matrix", "norm", "effective_rank"]
    assert said == ["in every row: status ok", "in every row: note k clamped from 30 to 8"]
    assert found[2].heads == ("", "effective", "rank")
    found, said = fitted(given, 17)
    assert [column.head for column in found] == ["matrix", "norm"]
    assert said[-1] == "not shown at this width: effective_rank; a wider terminal or a pipe has all"
    assert fitted([*given, note], 200) == ([*given, note], [])


def test_a_pipe_has_everything_and_a_terminal_what_fits(llama):
    whole, _ = run("svd", *PAIR, "--layer", "v_proj", "-q")
    assert len(whole.splitlines()[0]) > 100
    assert "model.layers.0.self_attn.v_proj.weight" in whole
    result = on_a_terminal(80, "svd", *PAIR, "--layer", "v_proj", "-q", NO_COLOR="")
    lines = result.splitlines()
    assert max(len(line.replace("\x1b[1m", "").replace("\x1b[0m", "")) for line in lines) <= 80
    assert "in every row: status ok" in result
    assert "top_8" in result
    assert lines[0].startswith("\x1b[1m")


def test_colours_are_for_terminals_and_obey_no_color(monkeypatch):
    stream = type("Stream", (), {"isatty": lambda self: True})()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")  # https://no-color.org: an empty value says nothing
    assert colours(stream)
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not colours(stream)
    monkeypatch.setattr(type(stream), "isatty", lambda self: False)
    assert not colours(stream)


def on_a_terminal(width, *words, **environment):
    """What a command writes to a terminal of this width."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    settings = {"NO_COLOR": "1", "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    command = [sys.executable, "-m", "spectra", *words]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=inherited | settings)
    os.close(theirs)
    said = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal, suppress(OSError):  # which says that the other end is closed
        while piece := terminal.read(4096):
            said += piece
    assert process.wait() == 0, said
    return said.decode().replace("\r\n", "\n")


def test_columns_sort_and_all(llama):
    out, _ = run("svd", *PAIR, "--columns", "norm, signal_rank,method", "--sort", "norm", "--all")
    lines = out.splitlines()
    assert lines[0].split() == ["matrix", "norm", "signal_rank", "method"]
    assert len(lines) == 17
    norms = [float(line.split()[1]) for line in lines[1:]]
    assert norms == sorted(norms, reverse=True)
    out, _ = run("svd", *PAIR, "--columns", "norm", "--sort", "+stable_rank", "--all")
    rising, _ = run("svd", *PAIR, "--columns", "stable_rank", "--sort", "+stable_rank", "--all")
    assert [line.split()[0] for line in out.splitlines()] == [line.split()[0] for line in rising.splitlines()]
    assert [line.split()[0] for line in run("svd", *PAIR)[0].splitlines()] == [
        *(
            "role",
            "embed_tokens",
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
            "lm_head",
        )
    ]
    out, _ = run("svd", *PAIR, "--sort", "stable_rank", "--columns", "signal_rank")
    assert re.split(r"\s+", out.splitlines()[0]) == ["role", "matrices", "unchanged", "signal_rank"]
    out, _ = run("alignment", *PAIR, "--all", "--columns", "intruders,right_in_top")
    assert len(out.splitlines()) == 17


@pytest.mark.parametrize("command", ["svd", "alignment"])
def test_a_column_that_is_not_there_is_refused_before_anything_is_computed(llama, monkeypatch, command):
    monkeypatch.setattr(spectra.deltas.delta.WeightDelta, "read", None)
    assert "'nrm' is no column (--columns, --sort): " in run(command, *PAIR, "--columns", "nrm", status=2)[1]
    assert "'rol' is no column" in run(command, *PAIR, "--sort", "rol", status=2)[1]
    told = run(command, *PAIR, "--columns", "note", status=2)[1]
    assert "'note' is no number, and 16 matrices are shown by role: add --all" in told


def test_the_columns_that_are_checked_are_those_of_the_table(llama):
    source = spectra.open_source("ckpt", "llama-7b").select("v_proj")
    assert list(next(iter(alignment_rows(source, k=2)))) == list(COLUMNS)
