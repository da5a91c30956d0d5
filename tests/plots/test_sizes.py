"""Every figure at every size: no word is cut off, tiny or over another, and no legend covers data."""

from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from support.looked_at import drawn, flaws

import spectra
from spectra.cli.options import SIZES as OPTION
from spectra.errors import SelectionError
from spectra.merges.report import VERDICTS
from spectra.metrics.similarity import pool
from spectra.plots.sizes import SIZES, arranged
from spectra.results.pairs import Pair, Pairs
from spectra.spectrum import Spectrum

rng = np.random.default_rng(5)
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LONG = "a-folder-with-a-long-name/checkpoint-1200"


def spectra_of(names, rank=24):
    return [Spectrum(name, (24, 24), S=np.sort(rng.lognormal(-3, 1, rank))[::-1], base_norm=9.0, noise_edge=1e-3)
            for name in names]  # fmt: skip


def run(layers=12, roles=ROLES):
    return spectra_of(f"model.layers.{i}.{role}.weight" for i in range(layers) for role in roles)


def unet():
    stacks = [f"{way}_blocks.{i}.attentions.{j}" for way in ("down", "up") for i in range(3) for j in range(2)]
    inside = [
        f"{stack}.transformer_blocks.0.attn{n}.{role}.weight"
        for stack in [*stacks, "mid_block.attentions.0"]
        for n in (1, 2)
        for role in ("to_q", "to_k")
    ]
    return spectra_of([*inside, "time_embedding.linear_1.weight"])


def mixture():
    return spectra_of(f"model.layers.{i}.block_sparse_moe.experts.{e}.w{w}.weight"
                      for i in range(32) for e in range(2) for w in (1, 2, 3))  # fmt: skip


def similarity(name, k=8):
    bases = [np.linalg.qr(rng.standard_normal((24, 24)))[0] for _ in range(4)]
    one, other = (Spectrum(name, (24, 24), S=np.arange(24, 0, -1.0), U=u, Vh=v) for u, v in (bases[:2], bases[2:]))
    return spectra.subspace_similarity(one, other, top=k)


def compared(count):
    panels = [similarity(f"layers.{i}.v_proj.weight") for i in range(count)]
    return {f"MultiLoRA n = {i}, r = 12, another seed: v_proj": pool([panel, panel], "v_proj")
            for i, panel in enumerate(panels)}  # fmt: skip


def pairs(count):
    labels = [f"runs/{place}-{LONG}" for place in range(count)]
    return Pairs(Pair(a, b, similarity(f"layers.{i}.{role}.weight")) for i in range(3) for role in ROLES[:3]
                 for n, a in enumerate(labels) for b in labels[:n])  # fmt: skip


def opposed(count):
    square = np.eye(count)
    square[0, 3] = square[3, 0] = -0.8
    square[-1] = square[:, -1] = np.nan
    return square


def rows(updates=4):
    square = 0.2 * np.ones((updates, updates)) + 0.8 * np.eye(updates)
    one = {"mean_cosine": 0.2, "norm_ratio": 1.2, "sti": 3.0, "mean_sar": 0.5, "sar_chance": 0.1, "shared": 0.4,
           "shared_null": 0.3, "cosines": square.tolist()}  # fmt: skip
    return [{"name": f"layers.{i}.{role}.weight", "role": role, "layer": i, **one} for i in range(12) for role in ROLES]


def aligned():
    done = {"status": "ok", "cosines": np.eye(10).tolist(), "intruders": 2, "out": 64, "in": 64,
            "left_deciles": [0.3, *[0.07] * 9, 0.07], "right_deciles": [0.1] * 10}  # fmt: skip
    done["left_deciles"] = [0.37, *[0.07] * 9]
    return pd.DataFrame({**done, "name": f"{role}.{i}", "role": role} for i in range(4) for role in ROLES)


def trained():
    names = ("norm", "stable_rank", "top_1_share", "effective_rank", "phi_to_last", "phi_to_previous", "start_left",
             "start_right")  # fmt: skip
    return pd.DataFrame({"name": f"{role}.{i}", "role": role, "step": step, "status": "ok",
                         **dict.fromkeys(names, step / 2000)}
                        for step in range(250, 2001, 250) for i in range(3) for role in ROLES)  # fmt: skip


FIGURES = {
    "histogram, seven curves": lambda **size: spectra.histogram_figure({r: run(2, [r]) for r in ROLES}, **size),
    "histogram, long names": lambda **size: spectra.histogram_figure({LONG: run(2), f"b-{LONG}": run(1)}, **size),
    "depth, one run": lambda **size: spectra.depth_figure(run(), **size),
    "depth, deep": lambda **size: spectra.depth_figure(run(80), **size),
    "depth, two runs": lambda **size: spectra.depth_figure({"full": run(), LONG: run(12, ROLES[:2])}, **size),
    "depth, four runs": lambda **size: spectra.depth_figure({f"{i}-{LONG}": run() for i in range(4)}, **size),
    "depth, lines": lambda **size: spectra.depth_figure(run(), kind="lines", **size),
    "depth, UNet": lambda **size: spectra.depth_figure(unet(), **size),
    "depth, mixture": lambda **size: spectra.depth_figure(mixture(), **size),
    "similarity, two under a title": lambda **size: spectra.similarity_figure(
        compared(2), labels=(LONG, "full"), title="a title", **size
    ),
    "similarity, eight": lambda **size: spectra.similarity_figure(compared(8), labels=(LONG, "full"), **size),
    "cosines, negative and missing": lambda **size: spectra.cosines_figure(
        [row | {"cosines": opposed(9).tolist()} for row in rows()[:7]], [f"{i}-{LONG}" for i in range(9)], **size
    ),
    "interference, twenty roles": lambda **size: spectra.roles_over_depth_figure(
        [row | {"role": f"role_{i}_of_a_stranger", "layer": i % 3} for i, row in enumerate(rows()[:20])], **size
    ),
    "verdicts, one": lambda **size: spectra.verdicts_figure(
        [{"name": "layers.0.q_proj.weight", "verdict": "untouched but changed"}], title="a title", **size
    ),
    "kept energy, few ranks": lambda **size: spectra.kept_energy_figure(
        {"full": run(12), "LoRA": spectra_of((f"layers.{i}.v_proj.weight" for i in range(2)), rank=8)}, **size
    ),
    "similarity": lambda **size: spectra.similarity_figure(compared(1), **size),
    "similarity, ten": lambda **size: spectra.similarity_figure(compared(10), labels=(LONG, "full"), **size),
    "pairs": lambda **size: spectra.pairs_figure(pairs(4), **size),
    "pairs, many": lambda **size: spectra.pairs_figure(pairs(12), by="layer", **size),
    "cosines": lambda **size: spectra.cosines_figure(rows(), [f"{i}-{LONG}" for i in range(4)], **size),
    "interference": lambda **size: spectra.roles_over_depth_figure(rows(), **size),
    "heads": lambda **size: spectra.heads_figure(
        [row | {"cosine": 0.1, "update_cosine": 0.2, "norm": 1.0} for row in rows()], **size
    ),
    "tops": lambda **size: spectra.tops_figure(aligned(), **size),
    "deciles": lambda **size: spectra.deciles_figure(aligned(), **size),
    "verdicts": lambda **size: spectra.verdicts_figure(
        [row | {"verdict": VERDICTS[(3 * i) % len(VERDICTS)]} for i, row in enumerate(rows())], **size
    ),
    "scree": lambda **size: spectra.scree_figure({"full": run(2), f"LoRA of {LONG}": run(1)}, **size),
    "scree, roles": lambda **size: spectra.scree_figure({r: run(2, [r]) for r in ROLES}, **size),
    "kept energy": lambda **size: spectra.kept_energy_figure({"full": run(2), f"LoRA of {LONG}": run(1)}, **size),
    "kept energy, one": lambda **size: spectra.kept_energy_figure(run(2), **size),
    "series": lambda **size: spectra.series_figure(trained(), **size),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off_tiny_or_over_something_else(name, size):
    figure = FIGURES[name](size=size)
    assert flaws(figure, least=0.69 * SIZES[size].least) == []
    assert figure.get_figwidth() <= SIZES[size].width + 0.01


@pytest.mark.parametrize("title", ["", "a title", "a title of so many words that it takes several lines of a column"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_squares_leave_no_space_blank_above_or_below(count, size, title):
    figure = spectra.similarity_figure(compared(count), labels=(LONG, "full"), title=title, size=size)
    words = drawn(figure)
    assert min(box.y0 for box in words.values()) < 0.15 * figure.dpi
    assert max(box.y1 for box in words.values()) > figure.bbox.y1 - 0.15 * figure.dpi
    panels = [box.y1 for ax in figure.axes if ax.images for text, box in words.items() if text is ax.title]
    titles = [box.y0 for text, box in words.items() if text.get_text().replace("\n", " ") == title]
    assert not titles or titles[0] - max(panels) < 0.15 * figure.dpi


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("labels", [("full fine-tuning", "LoRA"), ROLES])
def test_no_line_of_a_histograms_words_is_a_single_one(labels, size):
    figure = spectra.histogram_figure({label: run(1, [ROLES[0]]) for label in labels}, size=size)
    for ax in figure.axes:
        for words in (ax.get_xlabel(), *ax.get_title().split(";\n")):
            lines = words.splitlines()
            assert min(map(len, lines)) > 0.5 * max(map(len, lines)), lines
            assert not any(line.endswith(("-", "from", "to", "σ", "≥")) for line in lines), lines


@pytest.mark.parametrize("title", ["short", "a title of many words that no column of a paper holds in one line, " * 3])
@pytest.mark.parametrize("size", SIZES)
def test_a_title_is_as_wide_as_the_figure_allows(size, title):
    assert flaws(spectra.histogram_figure(run(2), title=title, size=size)) == []


def test_every_figure_and_what_draws_them_takes_a_size():
    drawing = [name for name in spectra.__all__ if name.endswith("_figure") or name.startswith("draw_")]
    for name in drawing:
        assert inspect.signature(getattr(spectra, name)).parameters["size"].default == "page", name
    assert {name.removesuffix("_figure") for name in drawing if name.endswith("_figure")} == {
        "cosines", "deciles", "depth", "heads", "histogram", "kept_energy", "pairs", "roles_over_depth", "scree",
        "series", "similarity", "squares", "tops", "verdicts",
    }, "a new figure needs its line in FIGURES, too"  # fmt: skip


def test_the_option_names_the_sizes():
    assert tuple(SIZES) == OPTION
    with pytest.raises(SelectionError, match=r"size='poster' is not one of column, page, slide \(--size\)"):
        spectra.histogram_figure(run(1), size="poster")


def test_the_same_words_are_larger_on_a_slide_and_the_users_settings_stay():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    texts = [spectra.histogram_figure(run(2), size=size).axes[0].title.get_fontsize() for size in SIZES]
    assert texts == sorted(texts)
    assert texts[2] > 1.5 * texts[1]
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (6, 3)])
def test_panels_stand_in_even_rows(count, columns):
    layout = arranged("page", count, (15, 15))
    assert (layout.columns, layout.rows * layout.columns) == (columns, count)


def test_what_an_eye_would_find_is_found():
    figure = Figure(figsize=(3, 2))
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], label="a curve")
    ax.set_title("a title that is much longer than the figure is wide, and so is cut off at both of its ends")
    ax.legend(loc="center")
    found = " ".join(flaws(figure, least=20))
    for flaw in ("leaves the figure: 'a title", "smaller than 20 points: 'a curve'", "a legend over data"):
        assert flaw in found


@pytest.mark.parametrize("draw", [
    lambda: spectra.plot_scree({"full fine-tuning": run(2), f"LoRA of {LONG}": run(1)}),
    lambda: spectra.plot_kept_energy(run(2), label=LONG),
    lambda: spectra.plot_histogram({role: run(2, [role]) for role in ROLES[:4]}),
    lambda: spectra.plot_depth(run(), "norm", kind="lines"),
    lambda: spectra.plot_depth(unet(), "stable_rank"),
    lambda: spectra.plot_similarity(similarity("layers.0.v_proj.weight")),
    lambda: spectra.plot_square(0.5 * np.ones((4, 4)), labels=[f"{i}-{LONG}"[:24] for i in range(4)]),
    lambda: spectra.plot_series(trained(), metric="phi_to_last"),
    lambda: spectra.plot_deciles(aligned()),
    lambda: spectra.plot_cosines(np.eye(10), title="layers.0.v_proj.weight"),
    lambda: spectra.plot_roles_over_depth(rows(), column="norm_ratio", chance=1.0),
])  # fmt: skip
def test_nor_is_it_in_a_plot_alone(draw):
    import matplotlib.pyplot as plt

    assert flaws(draw().figure) == []
    plt.close("all")
