"""Names from files reach no terminal, table, page or file name as they are, and none of them ends a run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import unicodedata

import pytest
from click.testing import CliRunner
from support import hostile
from support.hostile import TOO_LONG
from support.spectra_kinds import same_spectrum

import spectra
from spectra import naming
from spectra.cli.main import main
from spectra.errors import SpectraError
from spectra.printing import printed, printed_json
from spectra.results.store import Store

ALLOWED = {"\n"}


def clean(text):
    return not [sign for sign in text if unicodedata.category(sign) in ("Cc", "Cf", "Cs") and sign not in ALLOWED]


@pytest.fixture
def model(tmp_path):
    return hostile.write(tmp_path / "tuned", 1, 0.1), hostile.write(tmp_path / "base", 1)


def test_every_matrix_has_its_number_and_nothing_reaches_the_terminal(tmp_path, model):
    tuned, base = map(str, model)
    out = str(tmp_path / "run")
    for words in (
        ["inspect", tuned], ["inspect", tuned, "--base", base], ["inspect", tuned, "--json"],
        ["svd", tuned, "--base", base, "--top", "2", "--out", out, "-v"],
        ["svd", tuned, "--base", base, "--top", "2", "--out", out, "--all"],
        ["svd", tuned, "--base", base, "--json"],
        ["svd", tuned, "--base", base, "--layer", "nothing*"],
        ["inspect", out, "--verify"],
        ["plot", out, "--title", "$\\bad{$ \x1b", "--per-layer", "--format", "svg", "--out", str(tmp_path / "figures")],
    ):  # fmt: skip
        shown = CliRunner().invoke(main, words)
        assert shown.exit_code == (1 if "nothing*" in words or words[0] == "svd" else 0), shown.output
        assert not shown.exception or isinstance(shown.exception, SystemExit)
        assert clean(shown.output), words
        if "--json" in words:
            rows = json.loads(shown.stdout)["matrices"]
            assert {row["name"] for row in rows} | {TOO_LONG} == set(hostile.NAMES)
            assert {row["name"] for row in rows if row.get("status", "ok") not in ("ok", None)} <= {TOO_LONG}
    with open(tmp_path / "run" / "summary.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(hostile.NAMES)
    assert all(clean(cell) for row in rows for cell in row.values())


def test_what_is_stored_under_such_names_comes_back_under_them(tmp_path, model):
    source = spectra.open_source(*model)
    found = {item.name: item for item in spectra.decompose(source, top=2, out=tmp_path / "run")}
    stored = spectra.load(tmp_path / "run")
    assert set(stored.names) == set(hostile.NAMES)
    for spectrum in stored:
        same_spectrum(spectrum, found[spectrum.name])
    inside = sorted((tmp_path / "run" / "spectra").iterdir())
    assert len(inside) == len(hostile.NAMES)
    assert all(len(os.fsencode(path.name)) <= 255 for path in inside)
    again = spectra.decompose(source, top=2, out=tmp_path / "run")
    assert len(list(again)) == len(hostile.NAMES)
    assert set(hostile.NAMES) - set(again.reused) == {TOO_LONG}  # unreadable: tried again each time
    for shown in (stored, stored[0], source, source.coverage, *source, *stored, spectra.inspect(model[0])):
        assert clean(repr(shown))
        assert clean(shown._repr_html_())


def test_a_shortened_name_whose_file_is_damaged_is_computed_again(tmp_path, model):
    source = spectra.open_source(*model)
    list(spectra.decompose(source, out=tmp_path / "run"))
    path = Store(tmp_path / "run").spectra.path(hostile.NAMES[2])
    path.write_bytes(b"")
    assert set(spectra.load(tmp_path / "run").names) == set(hostile.NAMES) - {hostile.NAMES[2]}
    stream = spectra.decompose(source, out=tmp_path / "run")
    assert len(list(stream)) == len(stream.reused) + 2
    assert len(spectra.load(tmp_path / "run")) == len(hostile.NAMES)


def test_messages_and_json_say_the_same_without_doing_it():
    assert str(SpectraError("\x1b[31mname\u2066")) == "\\x1b[31mname\\u2066"
    document = {"name": "".join(map(chr, [*range(0x20), 0x7F, 0x9B, 0x202E, 0xD800, 0xE0001])) + "σ😀"}
    text = printed_json(json.dumps(document, ensure_ascii=False))
    assert clean(text)
    assert "σ😀" in text
    assert json.loads(text) == document
    assert printed("σ₁ ‖ΔW‖ 東京 é") == "σ₁ ‖ΔW‖ 東京 é"


@pytest.mark.parametrize("name", ["a" * 5000, "a b " * 5000, "\x1b" * 5000])
def test_a_message_stays_one_that_people_read(name):
    message = str(
        SpectraError(f"/models/x.safetensors: what is before {name!r} belongs to no tensor; download it again")
    )
    assert message.startswith("/models/x.safetensors: what is before")
    assert message.endswith("download it again")
    assert len(message) <= 3000


def test_numbers_in_names_are_as_long_as_their_author_likes():
    long = "layers." + "9" * 5000 + ".q_proj.weight"
    assert naming.layer_of(long) is None
    assert naming.role_of(long) == "q_proj"
    assert not naming.matches("9" * 5000, long.replace("9" * 5000, "3"))


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_stdout_that_lacks_letters_shows_their_numbers(model, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    for words in (["--all"], ["--json"]):
        command = [sys.executable, "-m", "spectra", "svd", model[0], "--base", model[1], *words]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert done.returncode == 1, done.stderr
        assert b"5,021 characters, and at most 4,000 are read" in done.stderr
        assert b"Traceback" not in done.stderr
        if words == ["--json"]:
            assert {row["name"] for row in json.loads(done.stdout)["matrices"]} == set(hostile.NAMES)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize("words", [["inspect", None], ["--help"], ["svd", "--help"], ["--version"]])
def test_a_full_stdout_is_one_message(model, words):
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "spectra", *(word or model[0] for word in words)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: stdout cannot be written: No space left on device; make room or use a pipe\n"


def test_letters_that_a_terminal_does_not_know_are_escaped(model):
    for words in (["--help"], ["svd", *model[:1], "--base", model[1]]):
        environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
        command = [sys.executable, "-m", "spectra", *words]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert b"Traceback" not in done.stderr
        assert done.stdout
