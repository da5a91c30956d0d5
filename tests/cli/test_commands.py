"""What all commands have in common: messages and exit statuses, help, and a quick start."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from support.command_line import lora_folder, run

from spectra.cli import main

MESSAGES = {
    "missing path": (["svd", "--tuned", "no/such"], 1, "'no/such' was not found. Tried:"),
    "no base": (["svd", "--tuned", "ckpt"], 1, "pass base= (--base)"),
    "wrong folder": (["svd", "--base", "llama-7b", "--tuned", "models"], 1, "did you mean one of them"),
    "no such layer": (["svd", "--base", "llama-7b", "--tuned", "ckpt", "--layer", "w_proj"], 1, "v_proj (2)"),
    "bad size": (["svd", "--base", "llama-7b", "--tuned", "ckpt", "--memory", "many"], 1, "write it as 4GiB"),
    "too little memory": (
        ["svd", "--base", "llama-7b", "--tuned", "ckpt", "--memory", "1KB"],
        1,
        r"raise memory_budget= (--memory)",
    ),
    "no device": (["svd", "--base", "llama-7b", "--tuned", "ckpt", "--device", "tpu"], 1, "not one of auto, cpu, cuda"),
    "top 0": (["svd", "--base", "llama-7b", "--tuned", "ckpt", "--top", "0"], 2, "--top"),
    "no tuned": (["svd", "--base", "llama-7b"], 2, "--tuned"),
    "unknown option": (["svd", "--frobnicate"], 2, "No such option"),
    "unknown command": (["frobnicate"], 2, "No such command"),
    "head": (["svd", "--tuned", "ckpt", "--heads", "first"], 2, "index of a head"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_mistake_is_one_message_with_the_remedy(llama, case):
    arguments, status, words = MESSAGES[case]
    _, err = run(*arguments, status=status)
    assert words in err


def test_every_command_and_option_is_described():
    run("--help")
    for name in main.list_commands(None):
        command = main.get_command(None, name)
        assert command.help
        for option in command.params:
            assert getattr(option, "help", "") or option.param_type_name == "argument", (name, option.name)
        assert run(name, "--help")[0].startswith("Usage")


def fresh(code):
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_and_inspect_load_no_torch(llama):
    code = (
        "import sys\nfrom spectra.cli import main\n"
        "try: main({arguments}, standalone_mode=False)\nexcept SystemExit: pass\n"
        "print(sorted({{'torch', 'pandas', 'matplotlib', 'scipy'}} & set(sys.modules)))"
    )
    assert fresh(code.format(arguments=["--help"])).endswith("[]\n")
    assert fresh(
        code.format(arguments=["inspect", str(llama / "ckpt"), "--base", str(llama / "models/llama-7b")])
    ).endswith("[]\n")


def test_help_is_quick_beside_the_interpreter_itself():
    """A ratio, not a time: these machines are shared. Importing torch would make it 20."""

    def best(code):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            fresh(code)
            times.append(time.perf_counter() - start)
        return min(times)

    bare = best("import json, pathlib")
    assert best("from spectra.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass") < 10 * bare


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sdv"], "No such command 'sdv'. Did you mean svd?"),
        (["sim"], "Did you mean similarity?"),
        (["foo"], "There are svd, similarity,"),
        (["svd", "--tunde", "x"], "Did you mean '--tuned'?"),
        (["svd", "--tuned", "a", "--tuned", "b"], "--tuned takes one value and is given 2 times: run spectra svd once"),
        (["svd", "--base", "a", "--tuned", "t", "--base", "b"], "--base takes one value and is given 2 times"),
        (["svd", "--tuned", "a", "--top", 1, "--top=2"], "--top takes one value and is given 2 times: give the one"),
        (["verify", "--merged", "a", "--merged", "b"], "--merged takes one value and is given 2 times"),
    ],
)
def test_what_is_mistyped_or_given_twice_is_told(words, told):
    assert told in run(*words, status=2)[1]


def test_what_may_be_repeated_may_be(llama):
    lora_folder(llama / "a", seed=1)
    run("svd", "--tuned", "a", "--layer", "v_proj", "--layer", "layers.0.*", "--no-split", "--no-split")
    run("extract", "--tuned", "a", "--tuned", "a", "--weights", ".5", "-.25", "--rank", 2, "--dry-run")
