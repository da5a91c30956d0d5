"""Groups of options: what a command is handed, and the command that CONTRIBUTING shows."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.command_line import run

import spectra
from spectra.cli import elsewhere, main, options
from spectra.cli.options import Compute, Opening

CONTRIBUTING = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


def handed(*arguments):
    """What a command with all groups gets."""
    got = {}

    @click.command()
    @options.source_options
    @options.compute_options
    @options.result_options
    def command(**given):
        got.update(given)

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return got


def test_each_group_is_one_object_with_the_defaults_of_the_library():
    assert handed() == {
        "opening": Opening(layers=(), heads="mean", scale=None, split=True),
        "compute": Compute(device="auto", workers=None, cluster=None, memory=None),
        "out": None,
        "figures": "page",
        "as_json": False,
    }


def test_what_is_typed_arrives():
    got = handed(
        *("--layer", "q_proj", "--layer", "v_proj", "--heads", "2", "--scale", "0.5", "--no-split"),
        *("--device", "cpu", "--workers", "3", "--memory", "1GiB", "--out", "run", "--no-figures", "--json"),
    )
    assert got["opening"] == Opening(("q_proj", "v_proj"), 2, 0.5, False)
    assert got["opening"].settings == {"heads": 2, "scale": 0.5, "split": False}
    assert (got["out"], got["figures"], got["as_json"]) == ("run", None, True)
    with got["compute"].keywords() as keywords:
        assert keywords["executor"]._max_workers == 3
        assert (keywords["device"], keywords["memory_budget"]) == ("cpu", "1GiB")


def test_without_workers_or_a_cluster_this_process_computes():
    with Compute("auto", None, None, None).keywords() as keywords:
        assert keywords == {"device": "auto", "executor": None, "memory_budget": None}


def test_opening_selects_and_tells_what_is_left_out(llama, capsys):
    source = Opening(("v_proj",), "mean", None, True).open("ckpt", "llama-7b")
    assert [delta.role for delta in source] == ["v_proj", "v_proj"]
    assert source.options == {"heads": "mean", "scale": None, "split": True}
    assert "skipped: a vector, not a matrix" in capsys.readouterr().err
    with pytest.raises(spectra.SpectraError, match="matches none"):
        Opening(("nothing",), "mean", None, True).open("ckpt", "llama-7b")


def test_the_command_that_contributing_shows_runs(llama):
    text = CONTRIBUTING.read_text().split("## Add a command")[1]
    (code,) = re.findall(r"```python\n(.*?)```", text.split("\n## ")[0], re.S)
    room = {"click": click, "Opening": Opening, "Compute": Compute, **vars(options)}
    exec(code, room)
    result = CliRunner().invoke(room["command"], ["ckpt", "--base", "llama-7b", "--layer", "v_proj"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)]
    assert all(float(line.split()[1]) > 0 for line in lines)


@pytest.mark.parametrize(
    ("command", "option", "meant"),
    [
        ("svd", "--base-model", "--base"),
        ("svd", "--model_tuned", "--tuned"),
        ("svd", "--rank", "--top"),
        ("extract", "--max-rank", "--rank"),
        ("verify", "--lora", "--adapter"),
        ("similarity", "--output", "--out"),
        ("alignment", "--top-k", "--k"),
        ("svd", "--adapter", "--tuned"),
        ("svd", "--cuda", "--device"),
        ("svd", "--dtype", "--vectors"),
    ],
)
def test_an_option_with_another_name_elsewhere_is_answered_with_its_name_here(command, option, meant):
    _, err = run(command, "x", option, "1", status=2)
    assert f"No such option '{option}'. Did you mean '{meant}'?" in err


def test_an_option_in_front_of_the_command_is_told_its_place():
    assert "behind it: spectra inspect … -q" in run("-q", "inspect", "x", status=2)[1]
    assert "Did you mean '--version'?" in run("--versio", status=2)[1]


def test_what_is_answered_exists():
    found = [main.get_command(click.Context(main), name) for name in main.list_commands(click.Context(main))]
    there = {name for command in found for option in command.params for name in option.opts}
    assert {name for names in elsewhere._HERE.values() for name in names} <= there


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("verify a b c", "its models are options: --base a --adapter b --merged c"),
        ("verify --base a", "missing: --adapter ADAPTER --merged MERGED"),
        ("verify --base a x y", "its models are options: --adapter x --merged y"),
        ("verify", "missing: --base BASE --adapter ADAPTER --merged MERGED"),
        ("inspect --tuned x", "write PATH without one"),
        ("plot --tuned x", "write DIR… without one"),
        ("heads --adapter x", "write ADAPTER without one"),
    ],
)
def test_all_that_is_missing_is_said_at_once_and_models_that_need_no_option(words, told):
    ended = CliRunner().invoke(main, words.split())
    assert ended.exit_code == 2
    assert told in ended.output


def test_help_needs_no_options():
    assert CliRunner().invoke(main, ["verify", "--help"]).exit_code == 0


def test_a_shell_completes_words_behind_what_is_no_command_line_yet():
    from click.shell_completion import ShellComplete

    found = ShellComplete(main, {}, "spectra", "_SPECTRA_COMPLETE").get_completions(["verify"], "--m")
    assert {item.value for item in found} >= {"--merged", "--memory"}
    found = ShellComplete(main, {}, "spectra", "_SPECTRA_COMPLETE").get_completions(["svd", "--base", "a"], "--t")
    assert {item.value for item in found} >= {"--top", "--tuned"}
