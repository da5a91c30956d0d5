"""`spectra plot` as a user meets it: several runs in one figure, and the numbers beside it."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from support import reading
from support.command_line import lora_folder, run, table, titles

import spectra
from spectra.errors import SelectionError


def test_a_histogram_has_room_for_seven_roles_and_names_what_it_leaves_out(tmp_path):
    roles = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    values = {role: [1.0] if role == "lm_head" else [3.0, 2.0, 1.0] for role in roles}
    found = [spectra.Spectrum(f"layers.0.{role}.weight", (3, 3), S=S, max_rank=len(S)) for role, S in values.items()]
    spectra.save(found, tmp_path / "run")
    _, notes = run("plot", tmp_path / "run")
    assert "not drawn, to keep the figure readable: lm_head; draw them with layers= (--layer)" in notes
    with (tmp_path / "run" / "histogram.csv").open() as file:
        assert {row["curve"] for row in csv.DictReader(file)} == set(roles[:7])


def test_plot_redraws_and_overlays_without_computing(llama, monkeypatch):
    for tuned in ("ckpt", "models/llama-7b"):
        name = tuned.split("/")[-1]
        lora_folder(llama / f"lora-{name}", seed=3)
        run("svd", "--tuned", f"lora-{name}", "--out", f"run-{name}", "--no-figures")
    reading.refuse(monkeypatch)
    out, _ = run("plot", "run-ckpt", "--per-layer")
    assert out.split() == [f"run-ckpt/histogram.{kind}" for kind in ("png", "pdf", "csv")]
    out, _ = run("plot", "run-ckpt", "run-llama-7b", "--label", "a", "--label", "b", "--out", "both")
    assert out.split() == [f"both/{name}.{kind}" for name in ("histogram", "depth") for kind in ("png", "pdf", "csv")]
    _, err = run("plot", "run-ckpt", "run-llama-7b", "--label", "a", status=2)
    assert "1 labels for 2" in err
    _, err = run("plot", "nowhere", status=1)
    assert "nowhere does not exist; make them with" in err


def test_kinds_of_figures_that_are_asked_for(tmp_path):
    found = [spectra.Spectrum(f"layers.{i}.v_proj.weight", (3, 3), S=[3.0, 2.0, 1.0]) for i in range(2)]
    for name in ("one", "two"):
        spectra.save(found, tmp_path / name)
    out, _ = run("plot", tmp_path / "one", "--kind", "scree", "--kind", "kept", "--format", "svg")
    assert [line.rsplit("/")[-1] for line in out.split()] == ["scree.svg", "scree.csv", "kept.svg", "kept.csv"]
    rows = table(tmp_path / "one" / "scree.csv")
    assert [float(row["median"]) for row in rows] == [3.0, 2.0, 1.0]
    assert {row["curve"] for row in rows} == {"v_proj"}
    out, _ = run("plot", tmp_path / "one", tmp_path / "two", "--kind", "kept", "--out", tmp_path / "both")
    assert {row["update"] for row in table(tmp_path / "both" / "kept.csv")} == {"one", "two"}
    _, err = run("plot", tmp_path / "one", "--kind", "skree", status=2)
    assert "'scree'" in err
    with pytest.raises(SelectionError, match="'skree' is not one of the figures histogram, depth, scree, kept"):
        spectra.draw_results(tmp_path / "one", kinds=["skree"])


def test_what_of_a_kind_cannot_be_drawn_is_said(tmp_path):
    spectra.save([spectra.Spectrum("layers.0.v_proj.weight", (2, 2), "unchanged", S=[0.0, 0.0])], tmp_path)
    out, notes = run("plot", tmp_path, "--kind", "kept", "--kind", "scree")
    assert out == ""
    assert "no kept: no matrix changed" in notes
    assert "no scree: there is no nonzero singular value" in notes


def test_several_comparisons_are_one_figure_of_labelled_panels(compared, drawn):
    command = ["plot", "sim-a", "sim-c", "--label", "LoRA r = 36", "--label", "seed 1", "--out", "new/fig4"]
    out, _ = run(*command, "--layer", "v_proj", "--title", "to full fine-tuning")
    assert out.split() == [f"new/fig4/similarity{end}" for end in (".png", ".pdf", "_grid.csv")]
    (figure,) = drawn
    assert titles(figure) == ["LoRA r = 36: v_proj", "seed 1: v_proj"]
    assert figure.get_suptitle() == "to full fine-tuning"
    panels = [ax for ax in figure.axes if ax.images]
    assert [ax.get_ylabel().replace("\n", " ") for ax in panels] == ["i: top directions of a", "i: top directions of c"]
    assert {ax.get_xlabel().replace("\n", " ") for ax in panels} == {"j: top directions of full"}
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


def test_the_kept_numbers_are_the_drawn_ones_and_options_reach_them(llama, drawn):
    run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--out", "run", "--no-figures")
    run("plot", "run", "--bins", 20, "--close-up", 0.25, "--title", "mine", "--layer", "v_proj", "--layer", "q_proj")
    figure, depth = drawn
    assert figure.get_suptitle() == depth.get_suptitle() == "mine"
    assert "close-up: the largest values, σ ≥ " in " ".join(figure.axes[1].get_title().split())
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
        *("similarity.png", "similarity.pdf", "similarity_grid.csv", "histogram.png", "histogram.pdf", "histogram.csv"),
        *("depth.png", "depth.pdf", "depth.csv"),
    ]
    assert titles(drawn[0]) == ["sim-a: v_proj", "sim-c: v_proj"]
    assert drawn[1].get_suptitle() == "", "titles say what is found, and not a folder"


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


def test_per_layer_at_many_layers_draws_pages_on_the_same_bins(tmp_path, drawn, monkeypatch):
    from spectra.plots import figures

    pages = []
    save = figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, *rest: [pages.append(figure), save(figure, *rest)][1])
    names = [f"layers.{i}.{role}.weight" for i in range(8) for role in ("v_proj", "q_proj")]
    spectra.save(
        [spectra.Spectrum(name, (3, 3), S=[3.0 + i, 2.0, 1.0]) for i, name in enumerate(names)], tmp_path / "run"
    )
    out, notes = run("plot", tmp_path / "run", "--per-layer", "--format", "svg", "--format", "pdf")
    written = [line.rsplit("/", 1)[1] for line in out.split()]
    assert written == [
        *("histogram-q_proj-layers-0-to-3.svg", "histogram-q_proj-layers-4-to-7.svg"),
        *("histogram-v_proj-layers-0-to-3.svg", "histogram-v_proj-layers-4-to-7.svg"),
        *("histogram.pdf", "histogram.csv"),
    ]
    assert "not drawn" not in notes
    assert (tmp_path / "run/histogram.pdf").read_bytes().count(b"/Type /Page ") == 4
    assert len({figure.axes[0].get_xlim() for figure in pages}) == 1
    assert pages[0].get_suptitle() == "q_proj, layers 0 to 3"
    assert len({row["curve"] for row in table(tmp_path / "run/histogram.csv")}) == 16
    out, _ = run("plot", tmp_path / "run", "--per-layer", "--layer", "0-2.v_proj", "--format", "svg", "--out", tmp_path)
    assert [line.rsplit("/", 1)[1] for line in out.split()] == ["histogram.svg", "histogram.csv"]


def test_a_models_folder_is_never_proposed_for_results(llama):
    _, err = run("plot", "ckpt", status=1)
    assert err == (
        "Error: ckpt holds a model (config.json) and no results; make them with decompose(…, out='results/ckpt') or "
        "spectra svd … --out results/ckpt\n"
    )
    before = sorted(path.name for path in (llama / "ckpt").iterdir())
    _, err = run("svd", "--base", "llama-7b", "--tuned", "ckpt", "--out", "ckpt", status=1)
    assert "ckpt is a model's folder (it holds config.json): choose another directory (out=, --out)" in err
    for command in (["alignment", "ckpt"], ["interference", "ckpt", "ckpt"]):
        _, err = run(*command, "--base", "llama-7b", "--out", "ckpt", status=2)
        assert "ckpt is a model's folder (it holds config.json)" in err
    assert sorted(path.name for path in (llama / "ckpt").iterdir()) == before
