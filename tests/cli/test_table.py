"""Tables on the terminal: its width, the columns that are asked for, their order, and colours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import reading
from support.checkpoints import llama_tensors, nudged, write_adapter, write_checkpoint
from support.command_line import lora_folder, run

import spectra
from spectra.cli.table import _Column, _sorted, _total, colours, fitted
from spectra.extraction.extract import Row
from spectra.merges.report import COLUMNS as VERDICTS
from spectra.results.alignment import COLUMNS as ALIGNMENT
from spectra.results.alignment import alignment_rows
from spectra.results.heads import COLUMNS as HEADS
from spectra.results.heads import head_rows
from spectra.results.inspection import COLUMNS as INSPECTION
from spectra.results.inspection import inspect
from spectra.results.interference import COLUMNS as INTERFERENCE
from spectra.results.interference import interference_rows
from spectra.results.intruders import COLUMNS as INTRUDERS
from spectra.results.intruders import intruder_rows
from spectra.results.pairs import COLUMNS as PAIRS
from spectra.results.pairs import Pair, Pairs
from spectra.results.series import series_rows
from spectra.results.series_table import COLUMNS as SERIES
from spectra.results.tables import SIMILARITY_COLUMNS as SIMILARITY
from spectra.results.tables import row as row_of
from spectra.results.tables import similarity_row
from spectra.spectrum import Spectrum

PAIR = ("ckpt", "--base", "llama-7b")
SVD = tuple(row_of(Spectrum("", (0, 0), "failed")))
EXTRACTION = tuple(item.name for item in fields(Row))


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
    reading.refuse(monkeypatch)
    assert "'nrm' is no column (--columns, --sort): " in run(command, *PAIR, "--columns", "nrm", status=2)[1]
    assert "'rol' is no column" in run(command, *PAIR, "--sort", "rol", status=2)[1]


def test_a_column_of_single_matrices_shows_single_matrices(llama):
    lines = run("svd", *PAIR, "--sort", "name", "--columns", "norm,status")[0].splitlines()
    assert lines[0].split() == ["matrix", "norm", "status"]
    assert len(lines) == 17
    assert lines[1].startswith("lm_head.weight")
    lines = run("svd", *PAIR, "--sort", "+norm", "--columns", "role,norm")[0].splitlines()
    assert lines[0].split() == ["role", "matrices", "unchanged", "norm"]
    assert run("alignment", *PAIR, "--columns", "left_deciles")[0].count("\n") == 17


def test_layers_are_sorted_as_numbers():
    rows = [{"name": name} for name in ("layers.10.v", "layers.9.v", "embed")]
    assert [row["name"] for row in _sorted(rows, "name", smallest_first=False)] == [
        "embed",
        "layers.9.v",
        "layers.10.v",
    ]
    rows = [{"rank": rank} for rank in ("8", "16 – 32", "9")]
    assert [row["rank"] for row in _sorted(rows, "rank", smallest_first=False)] == ["16 – 32", "9", "8"]


@pytest.fixture
def all_kinds(llama):
    """Something to look at for every command that prints a table of matrices."""
    base = llama_tensors()
    write_checkpoint(llama / "other", nudged(base, seed=4))
    for step in (100, 200):
        write_checkpoint(llama / f"run-{step}", nudged(base, seed=step))
    heads = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
        heads |= {f"{prefix}.lora_A.weight": torch.randn(2, 16)}
        heads |= {f"{prefix}.lora_B{head}.weight": torch.randn(8, 2) for head in range(3)}
    write_adapter(llama / "heads", heads, {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_nums": 3})
    lora_folder(llama / "lora", seed=1)
    merged = {name: tensor.clone() for name, tensor in base.items()}
    for delta in spectra.open_source("lora"):
        merged[delta.name] += delta.read().to_dense().float()
    write_checkpoint(llama / "merged", merged)
    return llama


TABLES = {
    "svd": (PAIR, SVD, 16),
    "alignment": (PAIR, ALIGNMENT, 16),
    "alignment --intruders-only": (PAIR, INTRUDERS, 16),
    "similarity": (("ckpt", "other", "--base", "llama-7b"), SIMILARITY, 16),
    "similarity of three": (("ckpt", "other", "run-100", "--base", "llama-7b"), PAIRS, 48),
    "interference": (("ckpt", "other", "--base", "llama-7b"), INTERFERENCE, 16),
    "series": (("run-100", "run-200", "--base", "llama-7b"), SERIES, 32),
    "heads": (("heads", "--base", "llama-7b"), HEADS, 2),
    "inspect": (PAIR, INSPECTION, 16),
    "verify": (("--base", "llama-7b", "--adapter", "lora", "--merged", "merged"), VERDICTS, 2),
    "extract": (("ckpt", "--base", "llama-7b", "--rank", "2", "--dry-run"), EXTRACTION, 16),
}


@pytest.mark.parametrize("command", TABLES)
def test_every_table_of_matrices_takes_the_same_options(all_kinds, command):
    words, there, matrices = TABLES[command]
    words = (*command.partition(" of ")[0].split(), *words)
    lines = run(*words, "--all", "--sort", "name", "--columns", "name")[0].splitlines()
    head = next(place for place, line in enumerate(lines) if "name" in line.split())
    table = list(takewhile(str.strip, lines[head + 1 :]))
    assert len(table) == matrices
    names = [next(word for word in line.split() if "." in word) for line in table]
    assert names == sorted(names)
    told = run(*words, "--columns", "nrm", status=2)[1]
    assert "'nrm' is no column (--columns, --sort): " in told
    run(*words, "--all", "--columns", ",".join(there))  # all that are named can be shown


def test_the_columns_that_are_checked_are_those_of_the_table(all_kinds):
    source, other = (spectra.open_source(path, "llama-7b").select("v_proj") for path in ("ckpt", "other"))
    assert list(next(iter(alignment_rows(source, k=2)))) == list(ALIGNMENT)
    assert list(next(iter(intruder_rows(source, k=2)))) == list(INTRUDERS)
    assert list(next(iter(interference_rows([source, other])))) == list(INTERFERENCE)
    assert list(next(iter(series_rows(["run-100"], "llama-7b")))) == list(SERIES)
    assert list(next(iter(head_rows(spectra.open_source("heads", heads="each"))))) == list(HEADS)
    found = next(iter(spectra.compare(source, other)))
    assert list(similarity_row(found)) == list(SIMILARITY)
    assert list(Pairs([Pair("a", "b", found)]).rows()[0]) == list(PAIRS)
    assert list(inspect("ckpt", "llama-7b").matrices[0]) == list(INSPECTION)


def columns_of(words, column):
    """The cells of a column of words, in every table that the command prints."""
    cells, place = [], None
    for line in run(*words)[0].splitlines():
        if column in line.split():
            place = line.split().index(column)
        elif place is not None and not line.strip():
            place = None
        elif place is not None:
            cells.append(line.split()[place])
    return cells


@pytest.mark.parametrize("command", ["svd", "alignment", "similarity", "similarity of three", "interference", "series",
                                     "inspect", "extract", "heads"])  # fmt: skip
def test_roles_stand_in_the_models_order_in_every_table(all_kinds, command):
    words, _, _ = TABLES[command]
    if command == "heads":
        stored = load_file("heads/adapter_model.safetensors")
        many = {name.replace("layers.0.", f"layers.{layer}.").replace("v_proj", role): tensor.clone()
                for layer in range(7) for role in ("v_proj", "k_proj") for name, tensor in stored.items()}  # fmt: skip
        write_adapter(all_kinds / "heads", many, json.loads(Path("heads/adapter_config.json").read_text()))
        words = ("heads",)
    roles = columns_of([*command.partition(" of ")[0].split(), *words], "role")
    model = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    there = [role for role in model if role in roles]
    assert len(there) > 1
    assert roles == there * (len(roles) // len(there))  # series has them once for each step


def test_a_layer_has_no_median_and_roles_are_sorted_as_the_model_has_them(llama):
    layers = columns_of(("svd", *PAIR, "--columns", "layer,norm", "--sort", "layer"), "layer")
    assert layers == ["1"] * 7 + ["0"] * 7 + ["–"] * 2  # outside of layers last
    rows = [{"role": role} for role in ("down_proj", "k_proj", "q_proj")]
    assert [row["role"] for row in _sorted(rows, "role", smallest_first=False)] == ["q_proj", "k_proj", "down_proj"]
