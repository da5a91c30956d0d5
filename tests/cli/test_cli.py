"""The command line as a user meets it: the mission's commands, outputs, messages, exit statuses."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.checkpoints import llama_tensors, nudged, write_adapter, write_checkpoint

import spectra
from spectra.cli import main


def run(*arguments, status=0):
    """stdout and stderr of a command that ends with this status and without a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


def strict(text):
    def refuse(token):
        raise AssertionError(f"{token} is not strict JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """`llama-7b` and `ckpt/`: a LLaMA-shaped base that the alias finds, and a sharded fine-tune."""
    base = llama_tensors()
    write_checkpoint(tmp_path / "models" / "llama-7b", base, shards=2)
    write_checkpoint(tmp_path / "ckpt", nudged(base), shards=3)
    monkeypatch.setenv("SPECTRA_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lora_folder(folder, seed, rank=4):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, 16, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(8, rank, generator=generator)
    return write_adapter(folder, tensors, {"peft_type": "LORA", "r": rank, "lora_alpha": 8})


def test_the_missions_first_command(llama):
    out, err = run("svd", "--base", "llama-7b", "--tuned", "ckpt/", "--layer", "v_proj")
    lines = out.splitlines()
    assert len(lines) == 3
    assert "model.layers.1.self_attn.v_proj.weight" in lines[2]
    assert "8×16" in lines[1]
    assert "effective_rank" in lines[0]
    assert "skipped" in err


def test_the_missions_second_command(llama):
    lora_folder(llama / "a", seed=1)
    lora_folder(llama / "b", seed=2)
    out, _ = run("similarity", "a/", "b/", "--top", "30")
    assert "left" in out
    assert "k clamped from 30 to 4" in out


def test_values_agree_with_float64_numpy_on_the_real_pair(real_pair, tmp_path):
    base, tuned = real_pair
    run("svd", "--base", base, "--tuned", tuned, "--top", 30, "--out", tmp_path / "run", "--no-figures")
    stored = spectra.load(tmp_path / "run")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    assert len(stored) == 40
    checked = 0
    for found in stored:
        if found.role == "embed_tokens":
            continue  # 30522×384: its oracle takes longer than all others together
        delta = after[found.name].double().numpy() - before[found.name].double().numpy()
        U, S, Vh = np.linalg.svd(delta, full_matrices=False)
        if not S.any():
            assert found.status == "unchanged"
            continue
        assert np.abs(found.S - S).max() <= 1e-7 * S[0]
        k = found.k
        assert np.abs((found.U * found.S[:k]) @ found.Vh - (U[:, :k] * S[:k]) @ Vh[:k]).max() <= 1e-6 * S[0]
        checked += 1
    assert checked == 38
    assert stored["pooler.dense.weight"].status == "unchanged"


def test_out_holds_what_the_contract_says(llama):
    out, err = run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--out", "run", "--top", 3)
    assert "figure: run/histogram.png" in err
    for name in ("summary.csv", "run.json", "histogram.png", "histogram.pdf"):
        assert (llama / "run" / name).stat().st_size > 0
    rows = list(csv.DictReader((llama / "run" / "summary.csv").open()))
    assert len(rows) == 16
    assert all(row["status"] == "ok" and float(row["stable_rank"]) >= 1 for row in rows)
    assert "role" in out.splitlines()[0]
    again, _ = run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--out", "run", "--top", 3)
    assert again == out


def test_json_is_one_strict_document_and_nothing_else(llama):
    out, _ = run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--layer", "q_proj", "--json")
    document = strict(out)
    assert document["kind"] == "checkpoint"
    assert len(document["matrices"]) == 2
    matrix = document["matrices"][0]
    assert len(matrix["singular_values"]) == 16
    assert matrix["norm"] == pytest.approx(np.linalg.norm(matrix["singular_values"]))
    assert document["coverage"]["skipped"]


def test_json_has_null_where_there_is_no_number(llama):
    tensors = load_file(llama / "models/llama-7b/model-00001-of-00002.safetensors")
    tensors |= load_file(llama / "models/llama-7b/model-00002-of-00002.safetensors")
    write_checkpoint(llama / "same", tensors)
    out, _ = run("svd", "--base", "llama-7b", "--tuned", "same", "--layer", "q_proj", "--json")
    (matrix, _) = strict(out)["matrices"]
    assert matrix["status"] == "unchanged"
    assert matrix["stable_rank"] is None
    assert matrix["norm"] == 0


def test_similarity_stores_draws_and_prints_json(llama):
    write_checkpoint(llama / "other", nudged(llama_tensors(), seed=9))
    arguments = ["similarity", "ckpt", "other", "--base", "llama-7b", "--layer", "v_proj", "--top", 5, "--side", "both"]
    _, err = run(*arguments, "--out", "sim")
    assert "figure: sim/similarity.png" in err
    rows = list(csv.DictReader((llama / "sim" / "similarity.csv").open()))
    assert {(row["side"], row["k_used"]) for row in rows} == {("left", "5"), ("right", "5")}
    assert 0 <= float(rows[0]["phi"]) <= 1
    document = strict(run(*arguments, "--json")[0])
    assert len(document["matrices"]) == 4
    assert np.shape(document["matrices"][0]["grid"]) == (5, 5)


def test_similarity_resumes_and_is_never_replaced_by_less(llama, monkeypatch):
    write_checkpoint(llama / "other", nudged(llama_tensors(), seed=9))
    arguments = ["similarity", "ckpt", "other", "--base", "llama-7b", "--out", "sim", "--no-figures"]
    first, _ = run(*arguments, "--layer", "v_proj", "--top", 5)
    with monkeypatch.context() as patch:
        patch.setattr(spectra.deltas.delta.WeightDelta, "read", None)
        assert run(*arguments, "--layer", "v_proj", "--top", 5)[0] == first
    _, err = run(*arguments, "--layer", "v_proj", "--top", 2, status=1)
    assert "different: top" in err
    run(*arguments, "--layer", "q_proj", "--top", 5)
    assert len(list(csv.DictReader((llama / "sim" / "similarity.csv").open()))) == 4


def test_another_layer_joins_a_run_on_shards(llama):
    for layer in ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"):
        run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--layer", layer, "--out", "run", "--no-figures")
    assert len(spectra.load("run")) == 2


def test_similarity_of_stored_runs_equals_that_of_their_sources(llama):
    write_checkpoint(llama / "other", nudged(llama_tensors(), seed=9))
    for tuned in ("ckpt", "other"):
        run("svd", "--base", "llama-7b", "--tuned", tuned, "--top", 5, "--out", f"run-{tuned}", "--no-figures")
    stored = strict(run("similarity", "run-ckpt", "run-other", "--top", 5, "--json")[0])
    fresh = strict(run("similarity", "ckpt", "other", "--base", "llama-7b", "--top", 5, "--json")[0])
    by_name = {matrix["name"]: matrix for matrix in fresh["matrices"]}
    assert len(stored["matrices"]) == len(by_name) == 16
    for matrix in stored["matrices"]:
        assert np.allclose(matrix["grid"], by_name[matrix["name"]]["grid"], atol=1e-9)
    _, err = run("similarity", "run-ckpt", "other", "--base", "llama-7b", status=2)
    assert "two of a kind" in err


def test_a_histogram_has_room_for_seven_roles_and_names_what_it_leaves_out(tmp_path):
    roles = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    values = {role: [1.0] if role == "lm_head" else [3.0, 2.0, 1.0] for role in roles}
    found = [spectra.Spectrum(f"layers.0.{role}.weight", (3, 3), S=S, max_rank=len(S)) for role, S in values.items()]
    spectra.save(found, tmp_path / "run")
    _, notes = run("plot", tmp_path / "run")
    assert "not drawn, to keep the figure readable: lm_head; draw them with --layer" in notes
    with (tmp_path / "run" / "histogram.csv").open() as file:
        assert {row["curve"] for row in csv.DictReader(file)} == set(roles[:7])


def test_plot_redraws_and_overlays_without_computing(llama, monkeypatch):
    for tuned in ("ckpt", "models/llama-7b"):
        name = tuned.split("/")[-1]
        lora_folder(llama / f"lora-{name}", seed=3)
        run("svd", "--tuned", f"lora-{name}", "--out", f"run-{name}", "--no-figures")
    monkeypatch.setattr(spectra.deltas.delta.WeightDelta, "read", None)
    out, _ = run("plot", "run-ckpt", "--per-layer")
    assert out.split() == [f"run-ckpt/histogram.{kind}" for kind in ("png", "pdf", "csv")]
    out, _ = run("plot", "run-ckpt", "run-llama-7b", "--label", "a", "--label", "b", "--out", "both")
    assert out.split() == [f"both/histogram.{kind}" for kind in ("png", "pdf", "csv")]
    _, err = run("plot", "run-ckpt", "run-llama-7b", "--label", "a", status=2)
    assert "1 labels for 2" in err
    _, err = run("plot", "nowhere", status=1)
    assert "holds no results" in err


def test_inspect_reads_headers_only(llama, monkeypatch):
    monkeypatch.setattr(spectra.files.tensors.TensorRef, "read", None)
    out, _ = run("inspect", "ckpt")
    assert "checkpoint (llama)" in out
    assert "pass base= (--base)" in out
    out, _ = run("inspect", "ckpt", "--base", "llama-7b")
    assert "skipped: model.norm.weight: a vector, not a matrix" in out
    document = strict(run("inspect", lora_folder(llama / "a", seed=1), "--json")[0])
    assert document["kind"] == "lora"
    assert document["dtypes"] == {"F32": 4}
    assert {matrix["max_rank"] for matrix in document["matrices"]} == {4}


MESSAGES = {
    "missing path": (["svd", "--tuned", "no/such"], 1, "'no/such' was not found. Tried:"),
    "no base": (["svd", "--tuned", "ckpt"], 1, "pass base= (--base)"),
    "wrong folder": (["svd", "--base", "llama-7b", "--tuned", "models"], 1, "did you mean one of them"),
    "no such layer": (["svd", "--base", "llama-7b", "--tuned", "ckpt", "--layer", "w_proj"], 1, "v_proj (2)"),
    "bad size": (["svd", "--base", "llama-7b", "--tuned", "ckpt", "--memory", "many"], 1, "write it as 4GiB"),
    "too little memory": (["svd", "--base", "llama-7b", "--tuned", "ckpt", "--memory", "1KB"], 1, "raise --memory"),
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


def test_broken_matrices_are_listed_and_the_others_done(llama):
    tensors = nudged(llama_tensors())
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = float("nan")
    tensors["model.layers.1.self_attn.v_proj.weight"] = torch.zeros(4, 16)
    write_checkpoint(llama / "bad", tensors)
    out, err = run("svd", "--base", "llama-7b", "--tuned", "bad", "--layer", "self_attn", "--json", status=1)
    status = {matrix["name"]: matrix["status"] for matrix in strict(out)["matrices"]}
    assert list(status.values()).count("ok") == 6
    assert status["model.layers.0.self_attn.v_proj.weight"] == "nonfinite"
    assert status["model.layers.1.self_attn.v_proj.weight"] == "shape_mismatch"
    assert "1 entries are NaN or infinite" in err
    assert "2 of 8 matrices could not be done" in err


def test_a_missing_shard_costs_only_its_own_matrices(llama):
    (llama / "ckpt" / "model-00002-of-00003.safetensors").unlink()
    out, err = run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--json", status=1)
    status = [matrix["status"] for matrix in strict(out)["matrices"]]
    assert set(status) == {"ok", "unreadable"}
    assert "model-00002-of-00003.safetensors is missing; download it again" in err


def test_k_larger_than_the_rank_is_clamped_and_said(llama):
    lora_folder(llama / "a", seed=1, rank=4)
    _, err = run("svd", "--tuned", "a", "--top", 30)
    assert "top 30 is more than the rank allows: 4 kept (2 matrices)" in err


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


def test_progress_is_quiet_in_a_pipe(llama):
    result = subprocess.run(
        [sys.executable, "-m", "spectra", "svd", "--base", "llama-7b", "--tuned", "ckpt", "--layer", "v_proj"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "%|" not in result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_a_single_file_is_a_source(llama):
    save_file(llama_tensors(), llama / "base.safetensors")
    torch.save({"state_dict": nudged(llama_tensors())}, llama / "tuned.pt")
    out, _ = run("svd", "--base", "base.safetensors", "--tuned", "tuned.pt", "--layer", "v_proj")
    assert len(out.splitlines()) == 3


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
    save = spectra.plots.save_figure
    monkeypatch.setattr(
        spectra.plots, "save_figure", lambda figure, *rest: [figures.append(figure), save(figure, *rest)][1]
    )
    return figures


def titles(figure):
    """The first line of each panel's title, row by row."""
    return [ax.get_title().splitlines()[0] for ax in figure.axes if ax.images]


def table(path):
    return list(csv.DictReader(path.open(encoding="utf-8")))


def test_several_comparisons_are_one_figure_of_labelled_panels(compared, drawn):
    command = ["plot", "sim-a", "sim-c", "--label", "LoRA r = 36", "--label", "seed 1", "--out", "new/fig4"]
    out, _ = run(*command, "--layer", "v_proj", "--title", "to full fine-tuning")
    assert out.split() == [f"new/fig4/similarity{end}" for end in (".png", ".pdf", "_grid.csv")]
    (figure,) = drawn
    assert titles(figure) == ["LoRA r = 36: v_proj", "seed 1: v_proj"]
    assert figure.get_suptitle() == "to full fine-tuning"
    panels = [ax for ax in figure.axes if ax.images]
    assert [ax.get_ylabel() for ax in panels] == ["i: top directions of a", "i: top directions of c"]
    assert {ax.get_xlabel() for ax in panels} == {"j: top directions of full"}
    assert all("mean over 2 matrices" in ax.get_title() and "chance 0." in ax.get_title() for ax in panels)
    rows = table(compared / "new/fig4/similarity_grid.csv")
    for ax, title in zip(panels, titles(figure), strict=True):
        phi = [float(row["phi"]) for row in rows if row["panel"] == title]
        assert np.array_equal(np.reshape(phi, (4, 4)), ax.images[0].get_array())


def test_rows_of_panels_line_up_by_role_and_side(compared, drawn):
    run("plot", "sim-a", "sim-b", "sim-c", "--out", "out")
    (figure,) = drawn
    panels = [ax for ax in figure.axes if ax.get_subplotspec()]
    shown = [ax.get_title().splitlines()[0] if ax.get_visible() else "" for ax in panels]
    assert shown == [
        *("sim-a: q_proj, left", "sim-b: q_proj, left", ""),
        *("", "sim-b: q_proj, right", ""),
        *("sim-a: v_proj, left", "sim-b: v_proj, left", "sim-c: v_proj, left"),
        *("", "sim-b: v_proj, right", ""),
    ]


def test_layer_filters_comparisons_and_says_what_there_is(compared, drawn):
    run("plot", "sim-a", "--layer", "layers.1.*")
    assert titles(drawn[0]) == ["q_proj, left", "v_proj, left"]
    assert not any("mean over" in ax.get_title() for ax in drawn[0].axes)
    assert len(table(compared / "sim-a/similarity.csv")) == 4, "the table of the comparison is not the figure's"
    run("plot", "sim-a", "--label", "LoRA", "--layer", "q_proj")
    assert titles(drawn[1]) == ["LoRA: q_proj"]
    _, err = run("plot", "sim-a", "sim-c", "--layer", "q_proj", "--out", "none", status=1)
    assert "sim-c: layer pattern 'q_proj' matches none of the 2 matrices that are there; roles: v_proj (2)" in err
    assert not (compared / "none").exists()


def test_similarity_and_svd_keep_the_numbers_of_their_figures(llama, compared):
    _, err = run("similarity", "a", "full", "--base", "llama-7b", "--top", 3, "--layer", "v_proj", "--out", "sim")
    assert "sim/similarity_grid.csv" in err
    assert [(row["i"], row["j"]) for row in table(llama / "sim/similarity_grid.csv")][:4] == [
        *(("1", "1"), ("1", "2"), ("1", "3"), ("2", "1"))
    ]
    _, err = run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--layer", "v_proj", "--out", "run")
    assert "run/histogram.csv" in err
    rows = table(llama / "run/histogram.csv")
    assert list(rows[0]) == ["panel", "curve", "left", "right", "height", "count"]
    assert sum(int(row["count"]) for row in rows if row["panel"] == "all values") == 16
    assert {row["curve"] for row in rows} == {"v_proj"}


def test_the_kept_numbers_are_the_drawn_ones_and_options_reach_them(llama, drawn):
    run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--out", "run", "--no-figures")
    run("plot", "run", "--bins", 20, "--close-up", 0.25, "--title", "mine", "--layer", "v_proj", "--layer", "q_proj")
    (figure,) = drawn
    assert figure.get_suptitle() == "mine"
    assert "first 25%" in figure.axes[1].get_title()
    rows = table(llama / "run/histogram.csv")
    for panel, ax, bins in zip(("all values", "close-up"), figure.axes, (20, 10), strict=True):
        outlines = [patch for patch in ax.patches if patch.get_label().split(":")[0] in ("q_proj", "v_proj")]
        assert len(outlines) == 2
        for patch in outlines:
            mine = [row for row in rows if (row["panel"], row["curve"]) == (panel, patch.get_label().split(":")[0])]
            assert len(mine) == bins
            values, edges, _ = patch.get_data()
            assert [float(row["height"]) for row in mine] == values.tolist()
            assert [float(row["left"]) for row in mine] + [float(mine[-1]["right"])] == edges.tolist()


def test_spectra_and_comparisons_in_one_command(compared, drawn):
    run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--out", "run", "--no-figures")
    out, _ = run("plot", "run", "sim-a", "sim-c", "--layer", "v_proj", "--out", "out")
    assert [path.split("/")[1] for path in out.split()] == [
        *("similarity.png", "similarity.pdf", "similarity_grid.csv", "histogram.png", "histogram.pdf", "histogram.csv")
    ]
    assert titles(drawn[0]) == ["sim-a: v_proj", "sim-c: v_proj"]
    assert drawn[1].get_suptitle() == "run"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sim-a", "sim-c", "--label", "same", "--label", "same"], "2 directories are called 'same'"),
        (["sim-a", "sim-a"], "2 directories are called 'sim-a'"),
        (["sim-a", "--close-up", "0"], "--close-up"),
        (["sim-a", "--close-up", "1.5"], "--close-up"),
    ],
)
def test_wrong_use_of_plot(compared, arguments, words):
    _, err = run("plot", *arguments, status=2)
    assert words in err


def test_updates_of_one_folder_name_are_told_apart_by_the_folder_above(llama, drawn):
    for run_name, seed in (("lora", 1), ("full", 2)):
        write_checkpoint(llama / run_name / "step-9", nudged(llama_tensors(), seed=seed))
    run("similarity", "lora/step-9", "full/step-9", "--base", "llama-7b", "--layer", "v_proj", "--out", "sim")
    assert drawn[0].axes[0].get_ylabel() == "i: top directions of lora"
    assert drawn[0].axes[0].get_xlabel() == "j: top directions of full"
