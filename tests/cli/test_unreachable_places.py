"""Folders and files that cannot be looked at, searched, written to, or be at all: one line each."""

from __future__ import annotations

import os

import pytest
from click.testing import CliRunner
from support.checkpoints import llama_tensors, nudged, write_checkpoint

from spectra.cli.main import main

NOWHERE = ["~nosuchuser/x", "x" * 5000]


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "base", llama_tensors())
    write_checkpoint(tmp_path / "tuned", nudged(llama_tensors()))
    return tmp_path


def said(*words):
    shown = CliRunner().invoke(main, list(words))
    assert isinstance(shown.exception, SystemExit), (words, shown.exception)
    (line,) = [line for line in shown.stderr.splitlines() if line.startswith("Error: ")]
    assert len(line) < 9000
    return line


@pytest.mark.parametrize("place", NOWHERE)
@pytest.mark.parametrize(
    "words",
    [
        ("extract", "tuned", "--base", "base", "--rank", "2", "--out"),
        ("series", "--base", "base", "tuned", "--step", "1", "--out"),
        ("series", "tuned", "--base"),
        ("alignment", "tuned", "--base", "base", "--layer", "v_proj", "--cache"),
        ("alignment", "tuned", "--base", "base", "--layer", "v_proj", "--out"),
        ("similarity", "tuned"),
        ("interference", "tuned"),
        ("verify", "--base", "base", "--merged", "tuned", "--adapter"),
        ("heads",),
    ],
)
def test_a_place_that_cannot_be(models, words, place):
    assert said(*words, place)
    assert not (models / "~nosuchuser").exists()


@pytest.mark.parametrize("place", NOWHERE)
def test_a_page_where_none_can_be(models, place):
    pytest.importorskip("jinja2")
    assert CliRunner().invoke(main, ["svd", "tuned", "--base", "base", "--out", "run", "--no-figures"]).exit_code == 0
    assert said("report", "run", "--out", place)


@pytest.fixture
def locked(monkeypatch):
    """Makes a folder one that this user may not search; root, who runs many a test, may search them all."""
    stat, access = os.stat, os.access

    def lock(folder):
        def refused(path, *given, **named):
            if not isinstance(path, int) and str(folder) in os.path.abspath(os.path.dirname(os.fspath(path))):
                raise PermissionError(13, "Permission denied", str(path))
            return stat(path, *given, **named)

        monkeypatch.setattr(os, "stat", refused)
        monkeypatch.setattr(
            os, "access", lambda path, mode: str(folder) not in os.path.abspath(path) and access(path, mode)
        )

    return lock


def test_a_folder_that_cannot_be_searched(models, locked):
    (models / "closed").mkdir()
    locked(models / "closed")
    assert "closed cannot be searched by this user" in said("inspect", "closed/model")


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("XDG_CONFIG_HOME", r"aliases in {}/spectra/config.toml (Permission denied)"),
        ("HF_HUB_CACHE", "the hub cache {}/models--some--model cannot be looked at: Permission denied"),
        ("HF_HOME", "the hub cache {}/hub/models--some--model cannot be looked at: Permission denied"),
        ("SPECTRA_MODELS", "{}/some/model"),
    ],
)
def test_config_and_cache_folders_that_cannot_be_searched(models, locked, monkeypatch, variable, words):
    (models / "closed").mkdir()
    for name in ("SPECTRA_CONFIG", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(variable, str(models / "closed"))
    locked(models / "closed")
    assert words.format(models / "closed") in said("inspect", "some/model")


@pytest.mark.parametrize("variable", ["XDG_CONFIG_HOME", "HF_HUB_CACHE", "HF_HOME", "SPECTRA_MODELS", "SPECTRA_CONFIG"])
def test_homes_of_nobody_in_variables(models, monkeypatch, variable):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(variable, "~nosuchuser/x")
    assert "was not found" in said("inspect", "some/model")
    assert CliRunner().invoke(main, ["inspect", "tuned"]).exit_code == 0


def test_a_config_that_cannot_be_read(models, monkeypatch):
    (models / "config.toml").write_text("")
    monkeypatch.setenv("SPECTRA_CONFIG", str(models / "config.toml"))

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refused)
    assert said("inspect", "some/model").endswith("config.toml cannot be read: Permission denied")


def test_a_finished_run_with_figures_is_read_where_nothing_can_be_written(models, monkeypatch):
    words = ["svd", "tuned", "--base", "base", "--layer", "v_proj,q_proj", "--out", "run"]
    first = CliRunner().invoke(main, words)
    before = {path: path.read_bytes() for path in (models / "run").iterdir() if path.suffix in (".png", ".csv")}
    assert len(before) > 2

    def refused(*_, **__):
        raise OSError(30, "Read-only file system")

    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    monkeypatch.setattr(os, "replace", refused)
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert "figures are left as they are: run cannot be written to" in again.stderr
    assert before == {path: path.read_bytes() for path in before}
    more = CliRunner().invoke(main, [*words, "--top", "2"])
    assert "Read-only file system" in more.stderr
