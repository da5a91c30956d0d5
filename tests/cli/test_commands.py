"""What all commands have in common: messages and exit statuses, help, and a quick start."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import llama_tensors, nudged, write_adapter, write_checkpoint
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


@pytest.mark.parametrize("given", [None, "3"])
def test_numpys_threads_do_not_compete_with_torchs_unless_they_are_asked_for(tmp_path, given):
    """OpenBLAS reads it when numpy is loaded, so it has to be there before a command loads what it needs."""
    lora_folder(tmp_path / "a", seed=0)
    code = (
        "import os, sys\nfrom spectra.cli import main\nassert 'numpy' not in sys.modules\n"
        f"try: main(['heads', {str(tmp_path / 'a')!r}], standalone_mode=False)\nexcept BaseException: pass\n"
        "print(os.environ['OPENBLAS_NUM_THREADS'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    environment |= {"OPENBLAS_NUM_THREADS": given} if given else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == (given or "1")


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
    """A ratio of processor times: these machines are shared. Importing torch would make it 20."""

    def spent():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def best(code):
        times = []
        for _ in range(3):
            start = spent()
            fresh(code)
            times.append(spent() - start)
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
        (["svd", "ft", "b"], "unexpected extra argument (b): the model it started from is an option: --base b"),
        (["alignment", "ft", "b"], "the model it started from is an option: --base b"),
        (["inspect", "ft", "b"], "the model it started from is an option: --base b"),
        (["heads", "x", "y"], "is an option: --base y. Two adapters are compared by spectra similarity"),
        (["svd", "ft", "b", "--base", "c"], "it takes one at a time; of several updates: spectra similarity"),
        (["svd", "ft", "b", "c"], "unexpected extra arguments (b c): it takes one at a time"),
        (["verify", "--base", "b", "--adapter", "a", "--merged", "m", "x"], "options: --base B --adapter A --merged M"),
    ],
)
def test_what_is_mistyped_or_given_twice_is_told(words, told):
    assert told in run(*words, status=2)[1]


def test_what_may_be_repeated_may_be(llama):
    lora_folder(llama / "a", seed=1)
    run("svd", "--tuned", "a", "--layer", "v_proj", "--layer", "layers.0.*", "--no-split", "--no-split")
    run("extract", "--tuned", "a", "--tuned", "a", "--weights", ".5", "-.25", "--rank", 2, "--dry-run")


@pytest.mark.parametrize("command", ["svd", "alignment", "extract"])
def test_tuned_is_an_argument_or_an_option(llama, command):
    rest = ["--base", "llama-7b", "--layer", "v_proj", *(["--rank", 2, "--dry-run"] if command == "extract" else [])]
    assert run(command, "ckpt", *rest) == run(command, "--tuned", "ckpt", *rest)
    assert "TUNED is missing" in run(command, *rest, status=2)[1]
    if command != "extract":
        assert "TUNED is given twice, as a and as --tuned ckpt" in run(command, "a", "--tuned", "ckpt", status=2)[1]


def test_several_updates_are_added_up_however_they_are_written(llama):
    lora_folder(llama / "a", seed=1)
    lora_folder(llama / "b", seed=2)
    rest = ["--weights", ".5", "-.5", "--rank", 2, "--dry-run"]
    assert run("extract", "a", "b", *rest) == run("extract", "--tuned", "a", "--tuned", "b", *rest)


def test_quiet_and_verbose(llama):
    pair = ["ckpt", "--base", "llama-7b", "--layer", "v_proj"]
    out, err = run("svd", *pair)
    assert "and 1 more" in err
    assert run("svd", *pair, "-q") == (out, "")
    loud, told = run("svd", *pair, "--verbose")
    assert loud == out
    for name in ("layers.0.input_layernorm", "layers.1.input_layernorm", "model.norm"):
        assert name in told
    assert told.splitlines()[-1].startswith("took ")
    assert "opposites" in run("svd", *pair, "-q", "-v", status=2)[1]
    write_checkpoint(llama / "other", llama_tensors(seed=9))
    assert run("svd", "ckpt", "--base", "other", "-q")[1].startswith("warning: 16 of 16 matrices are unrelated")


def test_a_shell_completes_commands_options_and_paths(monkeypatch):
    from click.shell_completion import BashComplete

    complete = BashComplete(main, {}, "spectra", "_SPECTRA_COMPLETE").get_completions
    assert {item.value for item in complete([], "s")} == {"svd", "similarity", "series"}
    assert [item.value for item in complete(["svd"], "--ba")] == ["--base"]
    for words in (["svd"], ["svd", "--base"], ["verify", "--merged"], ["inspect"], ["plot"]):
        assert [item.type for item in complete(words, "mod")] == ["file"], words


def test_the_module_runs_and_says_its_version():
    import spectra

    result = subprocess.run([sys.executable, "-m", "spectra", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"spectra, version {spectra.__version__}\n"


def test_stored_results_are_no_model(llama):
    lora_folder(llama / "a", seed=1)
    run("svd", "a", "--out", "results", "--no-figures")
    assert (
        "it holds stored results: spectra plot and spectra similarity take them" in run("svd", "results", status=1)[1]
    )


def test_a_stored_series_and_stored_pairs_are_no_model(llama):
    for step in (1, 2, 3):
        lora_folder(llama / f"step-{step}", seed=step)
    run("series", "step-1", "--out", "run", "--no-figures")
    run("similarity", "step-1", "step-2", "step-3", "--out", "pairs", "--no-figures")
    for place in ("run", "pairs"):
        assert "it holds stored results of a series or of pairs" in run("inspect", place, status=1)[1]


@pytest.fixture
def saved_whole(llama):
    """A LoRA whose config saves the head whole: its update needs the base, the factors none."""
    folder = lora_folder(llama / "lora", seed=0)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.ones(32, 16)
    write_adapter(folder, tensors, config | {"modules_to_save": ["lm_head"]})
    return llama


LEFT_UNDONE = "not done: lm_head.weight: saved whole, so ΔW needs the base weight: pass base= (--base)"


@pytest.mark.parametrize(
    "words",
    [
        ("svd", "lora"),
        ("similarity", "lora", "lora", "--top", "2"),
        ("interference", "lora", "lora"),
        ("extract", "lora", "--rank", "1", "--dry-run"),
        ("series", "lora", "--step", "1"),
    ],
    ids=lambda words: words[0],
)
def test_what_lacks_the_base_is_said_once_and_in_the_exit_status(saved_whole, words):
    out, err = run(*words, status=1)
    assert len(out.splitlines()) > 1
    assert LEFT_UNDONE in err
    assert "skipped" not in err
    assert LEFT_UNDONE not in run(*words, "--layer", "v_proj")[1]
    assert LEFT_UNDONE not in run(*words, "--base", "llama-7b")[1]


def test_a_pattern_that_means_only_what_lacks_the_base_says_so(saved_whole):
    told = run("svd", "lora", "--layer", "lm_head", status=1)[1]
    assert told == "Error: lora: lm_head.weight: saved whole, so ΔW needs the base weight: pass base= (--base)\n"
    assert "did you mean lm_head" in run("svd", "lora", "--layer", "lm_haed", status=1)[1]


def test_a_tied_head_is_answered_with_the_embedding_and_a_head_that_is_there_is_not(llama):
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    for name, held in (("tied", tensors), ("tied-tuned", nudged(tensors))):
        write_checkpoint(llama / name, held, config={"model_type": "llama", "tie_word_embeddings": True})
    for pattern in ("lm_head", "q_proj,lm_head.weight"):
        _, err = run("svd", "tied-tuned", "--base", "tied", "--layer", pattern, status=1)
        assert err.endswith("tied to the embedding is not stored by itself: it is model.embed_tokens.weight\n")
    for pattern, pair in (("w_proj", ("tied-tuned", "tied")), ("lm_haed", ("ckpt", "llama-7b"))):
        _, err = run("svd", pair[0], "--base", pair[1], "--layer", pattern, status=1)
        assert "tied" not in err.replace("tied-tuned", "")


def test_heads_each_beside_a_plain_lora_is_no_option_that_is_ignored(llama):
    lora_folder(llama / "one", seed=1)
    lora_folder(llama / "other", seed=2)
    heads = {}
    for name, tensor in load_file(llama / "one/adapter_model.safetensors").items():
        if "lora_B" in name:
            heads |= {f"{name.removesuffix('.weight')}{i}.weight": (1 + i) * tensor for i in range(2)}
        else:
            heads[name] = tensor
    config = json.loads((llama / "one/adapter_config.json").read_text()) | {"lora_nums": 2}
    write_adapter(llama / "several", heads, config)
    _, err = run("similarity", "several", "one", "--heads", "each")
    assert "ignored" not in err
    assert "heads='each' was ignored: there are no heads" in run("similarity", "one", "other", "--heads", "each")[1]


def test_an_adapter_without_heads_is_refused_without_a_word_of_options_that_nobody_gave(llama):
    lora_folder(llama / "lora", seed=0)
    _, err = run("heads", "lora", status=1)
    assert err.startswith("Error: no module has two heads to compare: give an adapter of several heads")
    assert err.count("\n") == 1
    assert "--heads" not in err


@pytest.mark.parametrize(
    "words", [("alignment", "ckpt"), ("interference", "ckpt", "step-9"), ("series", "step-9"), ("svd", "ckpt"),
              ("alignment", "ckpt", "--intruders-only")],
)  # fmt: skip
def test_an_unrelated_base_is_a_warning_that_q_does_not_silence(llama, words):
    write_checkpoint(llama / "other", llama_tensors(seed=77))
    write_checkpoint(llama / "step-9", nudged(llama_tensors(), seed=9))
    _, err = run(*words, "--base", "other", "--layer", "v_proj", "-q")
    assert "unrelated to the base" in err
    assert "unrelated" not in run(*words, "--base", "llama-7b", "--layer", "v_proj", "-q")[1]
