"""What the figures show, by their artists; and the conventions that every plot keeps."""

from __future__ import annotations

import errno
import inspect
import os
import subprocess
import sys
from itertools import islice, pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import spectra
from spectra import plots
from spectra.errors import SelectionError, StoreError
from spectra.plots.figures import save_figure, save_pages
from spectra.plots.histogram import pool_values
from spectra.plots.style import COLOURS, MARKS, curves
from spectra.spectrum import Spectrum

rng = np.random.default_rng(0)


def spectrum(S, name="layers.0.v_proj.weight", **fields):
    return Spectrum(name, (len(S), len(S)), S=np.sort(np.asarray(S, float))[::-1], **fields)


def heights(ax):
    """Label → heights and edges of the drawn curves."""
    return {patch.get_label(): patch.get_data() for patch in lines(ax)}


def lines(ax):
    """The outlines of the drawn curves, without their fills."""
    return [patch for patch in ax.patches if patch.get_label() and not patch.get_label().startswith("_")]


@pytest.fixture
def similarity():
    vectors = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    a, b = (
        Spectrum("layers.0.v_proj.weight", (20, 20), S=np.arange(20, 0, -1.0), U=u, Vh=u.T)
        for u in (np.eye(20), vectors)
    )
    return spectra.subspace_similarity(a, b, top=12)


def test_the_histogram_counts_every_resolved_value_once():
    S = np.exp(-rng.normal(5, 1, 200))
    ax = spectra.plot_histogram([spectrum(S[:100]), spectrum(S[100:], "layers.1.v_proj.weight")], stat="count")
    ((values, edges, _),) = heights(ax).values()
    assert values.sum() == 200
    assert np.array_equal(values, np.histogram(-np.log(S), edges)[0])
    assert len(edges) == 101
    plt.close("all")


def test_large_values_are_at_the_left_and_the_axis_says_natural_log():
    ax = spectra.plot_histogram([spectrum([1.0, 0.5, 0.01])], bins=10)
    low, high = ax.get_xlim()
    assert low < -np.log(1.0) < -np.log(0.01) < high
    assert "−ln σ" in ax.get_xlabel()
    plt.close("all")


def test_curves_are_rows_that_share_bins_and_heights_and_cover_nothing():
    ax = spectra.plot_histogram({"a": [spectrum([1.0, 0.5])], "b": [spectrum([0.1, 0.001])], "c": [spectrum([0.3])]})
    drawn = heights(ax)
    edges = [data.edges for data in drawn.values()]
    assert all(np.array_equal(edges[0], other) for other in edges)
    assert all(values.sum() == pytest.approx(100) for values, _, _ in drawn.values())
    assert len({str(patch.get_edgecolor()) for patch in lines(ax)}) == 3
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b", "c"], "from the top"
    boxes = [patch.get_window_extent() for patch in lines(ax)]
    assert all(below.y1 < above.y0 + 1e-6 for above, below in pairwise(boxes))
    per_unit = [box.height / values.max() for box, (values, _, _) in zip(boxes, drawn.values(), strict=True)]
    assert per_unit == pytest.approx([per_unit[0]] * 3)
    plt.close("all")


def test_the_climb_counts_how_many_values_of_a_matrix_are_at_least_as_large():
    S = np.exp(-rng.normal(5, 1, 60))
    groups = {"a": [spectrum(S[:30]), spectrum(S[30:], "layers.1.v_proj.weight")], "b": [spectrum(S[:10])]}
    ax = spectra.plot_histogram(groups, stat="at_least", close_up=0.5, bins=12)
    (first, edges, _), (second, _, _) = heights(ax).values()
    for right, of_a, of_b in zip(edges[1:], first, second, strict=True):
        assert of_a == np.count_nonzero(np.exp(-right) <= S) / 2
        assert of_b == np.count_nonzero(S[:10] >= np.exp(-right))
    assert {str(patch.get_linestyle()) for patch in lines(ax)} == {"solid"}, "dashed steps are noise"
    downwards = sorted(ax.texts, key=lambda text: -text.get_position()[1])
    ends = {"a": first[-1], "b": second[-1]}
    assert [text.get_text() for text in downwards] == sorted(ends, key=lambda name: -ends[name]), "names at the ends"
    assert (ax.get_yscale(), ax.get_ylabel()) == ("log", "values per matrix ≥ σ")
    plt.close("all")


def test_the_title_says_what_the_numbers_say_and_the_axis_has_sigma_itself():
    ax = spectra.plot_histogram({"a": [spectrum([2.0, 1.0, 0.5])], "b": [spectrum([0.25])]})
    assert ax.get_title() == "largest σ 2 in a;\nmedians from 0.25 (b) to 1 (a)"
    ax.figure.canvas.draw()
    told = [text.get_text().replace("−", "-").split("\n") for text in ax.get_xticklabels()]
    assert len(told) > 3
    assert all(float(sigma) == pytest.approx(np.exp(-float(x)), rel=0.06) for x, sigma in told)
    plt.close("all")


@pytest.mark.parametrize("size", [(6, 4), (3.5, 3), (9, 2.5)])
def test_the_legend_covers_no_data_and_no_words(size):
    figure = plt.figure(figsize=size, layout="constrained")
    ax = spectra.plot_histogram({"a": [spectrum([1.0, 0.5])], "b": [spectrum([0.1])]}, ax=figure.subplots())
    FigureCanvasAgg(figure).draw()
    legend = ax.get_legend().get_window_extent()
    others = [ax.get_window_extent(), ax.xaxis.label.get_window_extent()]
    assert not any(legend.overlaps(other) for other in others)
    plt.close("all")


def test_what_is_left_out_is_in_the_legend():
    found = pool_values(
        [
            spectrum([1.0, 1e-9, 0.0], resolution=1e-7),
            spectrum([0.0, 0.0], status="unchanged"),
            Spectrum("x", (2, 2), "nonfinite"),
            Spectrum("y", (9, 9), S=[1.0], norm=2.0),
        ],
        "mine",
    )
    assert len(found.x) == 2
    assert (found.zero, found.unresolved, found.missing, found.truncated) == (3, 1, 1, True)
    for words in ("mine: 2 values of 3 matrices", "3 zero", "1 unresolved", "1 matrix without", "top of the spectra"):
        assert words in found.legend


def test_the_legend_says_what_is_drawn_unless_it_is_not_wanted():
    curves = {"a": [spectrum([1.0, 0.5, 0.0])], "b": [spectrum([0.1])]}
    texts = [text.get_text() for text in spectra.plot_histogram(curves).get_legend().get_texts()]
    assert texts == ["a: 2 values of 1 matrix; left out: 1 zero", "b: 1 value of 1 matrix"]
    assert spectra.plot_histogram(curves, legend=False).get_legend() is None
    plt.close("all")


def test_the_rounding_edge_is_shaded_where_it_falls_into_the_picture():
    S = np.exp(-np.linspace(2, 8, 50))
    ax = spectra.plot_histogram([spectrum(S, noise_edge=np.exp(-5.0))])
    (line,) = ax.lines
    assert line.get_xdata()[0] == pytest.approx(5.0)
    assert "rounding" in line.get_label()
    bare = spectra.plot_histogram([spectrum(S, noise_edge=np.exp(-50.0))])
    assert not bare.lines
    plt.close("all")


def test_the_close_up_is_the_left_end():
    S = np.exp(-np.linspace(0, 10, 1000))
    figure = spectra.histogram_figure({"full": [spectrum(S)]}, title="t", close_up=0.05)
    whole, near = figure.axes
    assert near.get_xlim()[1] == pytest.approx(0.5, abs=0.05)
    assert whole.get_xlim()[1] > 10
    assert near.get_ylabel() == "values per matrix ≥ σ"
    with pytest.raises(SelectionError, match="not a share"):
        spectra.plot_histogram([spectrum(S)], close_up=3.0)


def test_the_close_up_means_the_same_for_a_curve_of_few_values():
    """Of 200 possible values per matrix the first 5 % are ten: a full update's ten largest, a LoRA's first ten."""
    full = [spectrum(np.exp(-np.linspace(0, 10, 200)))] * 3
    lora = [spectra.Spectrum("a.weight", (200, 300), S=np.exp(-np.linspace(1, 4, 16)), max_rank=16)]
    few = [spectra.Spectrum("a.weight", (200, 300), S=np.exp(-np.linspace(1, 6, 4)), max_rank=4)]
    for curve, last in ((full, 10 * 9 / 199), (lora, 1 + 3 * 9 / 15), (few, 6.0)):
        panel = spectra.plots.histogram.bin_pooled([spectra.plots.histogram.pool_values(curve)], close_up=0.05)
        low = -np.log(curve[0].S[0])
        assert panel.edges[-1] == pytest.approx(last + 0.02 * (last - low))


def test_the_climbs_axis_of_less_than_a_decade_has_numbers_as_people_write_them():
    run = [Spectrum(f"layers.{i}.q_proj.weight", (8, 8), S=np.linspace(2.0, 0.5, 8) * (1 + i)) for i in range(4)]
    figure = spectra.histogram_figure({"q_proj": run})
    FigureCanvasAgg(figure).draw()
    texts = [label.get_text() for ax in figure.axes for label in ax.get_yticklabels(which="both")]
    assert not any("e" in text for text in texts)
    assert any(text.startswith("0.") for text in texts)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(SelectionError, match="no nonzero singular value"):
        spectra.plot_histogram([spectrum([0.0], status="unchanged")])
    with pytest.raises(SelectionError, match="stat='area'"):
        spectra.plot_histogram([spectrum([1.0])], stat="area")
    with pytest.raises(SelectionError, match="no similarity"):
        spectra.similarity_figure([])


def test_the_heatmap_is_the_grid_with_i_downwards(similarity):
    ax = spectra.plot_similarity(similarity)
    (image,) = ax.images
    assert np.array_equal(image.get_array(), similarity.grid)
    assert image.get_clim() == (0, 1)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert ax.get_xlabel().startswith("j")
    assert "left, φ(12, 12)" in ax.get_title()
    assert "chance 0.60" in ax.get_title()
    bar = ax.images[0].colorbar
    assert bar.ax.get_ylabel() == "φ(i, j)   (line: by chance)"
    plt.close("all")


def test_panels_share_one_scale(similarity):
    figure = spectra.similarity_figure({"a": similarity, "b": similarity, "c": similarity, "d": similarity})
    images = [image for ax in figure.axes for image in ax.images]
    assert len(images) == 4
    assert {image.get_clim() for image in images} == {(0, 1)}
    assert sum("φ" in ax.get_ylabel() for ax in figure.axes) == 1


def test_a_clamped_comparison_says_so_in_the_picture(similarity):
    from dataclasses import replace

    ax = spectra.plot_similarity(replace(similarity, note="k clamped from 30 to 12: the first update has 12 resolved"))
    assert "k clamped from 30" in ax.get_title().replace("\n", " ")
    plt.close("all")


def test_figures_are_saved_as_png_and_vector_and_are_the_same_twice(tmp_path, similarity):
    for name in ("one", "two"):
        plots.save_figure(spectra.similarity_figure([similarity]), tmp_path / name, formats=("png", "pdf", "svg"))
    for kind, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        content = (tmp_path / f"one.{kind}").read_bytes()
        assert content.startswith(magic)
        assert content == (tmp_path / f"two.{kind}").read_bytes()


def test_the_rows_are_the_heights_that_are_drawn():
    groups = {name: [spectrum(np.exp(-rng.normal(5, 1, 60)))] for name in ("a", "b")}
    panels = plots.histogram_panels({**groups, "none": [spectrum([0.0], status="unchanged")]}, bins=16, close_up=0.1)
    figure = plots.draw_panels(panels)
    for panel, ax, name in zip(panels, figure.axes, ("all values", "close-up"), strict=True):
        rows = panel.rows()
        assert {row["panel"] for row in rows} == {name}
        assert dict.fromkeys(row["curve"] for row in rows) == dict.fromkeys("ab")
        for label, (values, edges, _) in heights(ax).items():
            mine = [row for row in rows if row["curve"] == label[0]]
            assert [row["height"] for row in mine] == values.tolist()
            assert [(row["left"], row["right"]) for row in mine] == list(pairwise(edges.tolist()))
            x = -np.log(groups[label[0]][0].S)
            assert [row["count"] for row in mine] == np.histogram(x, edges)[0].tolist()
    whole, near = (panel.rows() for panel in panels)
    assert all(row["height"] == pytest.approx(row["count"] * 100 / 60) for row in whole)
    for name in "ab":
        counts = [row["count"] for row in near if row["curve"] == name]
        assert [row["height"] for row in near if row["curve"] == name] == np.cumsum(counts).tolist(), "one matrix each"


def test_the_rows_are_the_cells_of_the_heatmaps(similarity):
    panels = {"one": similarity, "empty": None, "two": similarity}
    figure = spectra.similarity_figure(panels)
    rows = plots.grid_rows(panels)
    assert len(rows) == 2 * 12 * 12
    for name, ax in zip(("one", "two"), [ax for ax in figure.axes if ax.images], strict=True):
        mine = {(row["i"], row["j"]): row for row in rows if row["panel"] == name}
        image = ax.images[0].get_array()
        assert all(row["phi"] == image[i - 1, j - 1] and row["side"] == "left" for (i, j), row in mine.items())
        assert mine[3, 7]["chance"] == 7 / 20


def places(figure):
    """(row, column) of every panel that shows something."""
    specs = [ax.get_subplotspec() for ax in figure.axes if ax.images]
    return [(spec.rowspan.start, spec.colspan.start) for spec in specs]


def test_panels_stand_in_even_rows_or_in_the_columns_that_are_asked_for(similarity):
    def figure(count, **options):
        return spectra.similarity_figure({str(i): similarity for i in range(count)}, **options)

    assert places(figure(4)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert places(figure(5)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert places(figure(5, columns=5)) == [(0, i) for i in range(5)]
    holes = spectra.similarity_figure({"a": None, "b": similarity, "c": similarity, "d": None}, columns=2)
    assert places(holes) == [(0, 1), (1, 0)]
    assert [ax.get_visible() for ax in holes.axes[:4]] == [False, True, True, False]
    with pytest.raises(SelectionError, match="columns=0"):
        figure(2, columns=0)
    with pytest.raises(SelectionError, match="no similarity"):
        spectra.similarity_figure({"a": None})


def test_every_panel_may_have_its_own_labels(similarity):
    labels = {"a": ("LoRA", "full"), "b": ("MultiLoRA", "full")}
    figure = spectra.similarity_figure({"a": similarity, "b": similarity}, labels=labels)
    assert [ax.get_ylabel().replace("\n", " ") for ax in figure.axes if ax.images] == [
        f"i: top directions of {a}" for a, _ in labels.values()
    ]
    with pytest.raises(SelectionError, match="no pair for the panel 'c'; it has 'a', 'b'"):
        spectra.similarity_figure({"c": similarity}, labels=labels)


@pytest.mark.parametrize("columns", [None, 5])
def test_no_text_is_cut_off_or_runs_into_another_panels(similarity, columns):
    from dataclasses import replace

    clamped = replace(
        similarity, side="right", note="mean over 30 matrices; k clamped from 30 to 12 by the lowest of them"
    )
    names = [
        f"MultiLoRA n = {n}, r = 12, α = 12, another seed: {role}" for role in ("k_proj", "v_proj") for n in range(5)
    ]
    figure = spectra.similarity_figure(
        dict.fromkeys(names, clamped),
        title="similarity to full fine-tuning",
        labels=("a-folder-with-a-long-name-28", "full-fine-tuning-step-240"),
        columns=columns,
    )
    FigureCanvasAgg(figure).draw()
    panels = [ax for ax in figure.axes if ax.images]
    texts = [text.get_window_extent() for ax in panels for text in (ax.title, ax.xaxis.label, ax.yaxis.label)]
    texts += [ax.get_window_extent() for ax in panels]
    for i, box in enumerate(texts):
        assert figure.bbox.min[0] <= box.x0 < box.x1 <= figure.bbox.max[0]
        assert figure.bbox.min[1] <= box.y0 < box.y1 <= figure.bbox.max[1]
        assert not any(box.overlaps(other) for other in texts[i + 1 :])


def test_a_long_legend_is_set_in_one_column():
    for label, columns in (("short", 3), ("a run with a name that fills the line of a legend" * 2, 1)):
        runs = {f"{label} {i}": [spectrum([1.0, 0.5])] for i in range(4)}
        figure = spectra.histogram_figure(runs)
        FigureCanvasAgg(figure).draw()
        assert figure.legends[0]._ncols == columns
        assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1


AXES_LEVEL = [getattr(plots, name) for name in plots.__all__ if name.startswith("plot_")]


@pytest.mark.parametrize("plot", AXES_LEVEL)
def test_every_plot_takes_data_first_the_rest_by_keyword_and_ax(plot):
    parameters = list(inspect.signature(plot).parameters.values())
    assert parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    data = 2 if parameters[1].name == "metric" else 1  # what of the data is drawn may be said beside it
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters[data:])
    assert inspect.signature(plot).parameters["ax"].default is None


def test_plots_draw_where_they_are_told_and_return_it(similarity):
    before = plt.get_fignums()
    ax = Figure().subplots()
    assert spectra.plot_histogram([spectrum([1.0, 0.5])], ax=ax) is ax
    other = Figure().subplots()
    assert spectra.plot_similarity(similarity, ax=other) is other
    assert plt.get_fignums() == before
    assert isinstance(spectra.plot_histogram([spectrum([1.0])]), Axes)
    assert len(plt.get_fignums()) == len(before) + 1
    plt.close("all")


def test_no_global_setting_is_left_behind(similarity):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    spectra.histogram_figure([spectrum([1.0, 0.5])])
    spectra.similarity_figure([similarity])
    assert dict(mpl.rcParams) == before


def test_every_pair_of_curves_differs_without_colour():
    styles = list(islice(curves(), len(COLOURS) * len(MARKS)))
    assert len({mark for _, mark in styles[: len(MARKS)]}) == len(MARKS)
    assert len(set(styles)) == len(styles), "nor do two share both"
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (tuple(bytes.fromhex(c[1:])) for c in COLOURS[:2])]
    assert abs(grey[0] - grey[1]) > 20


def test_a_figure_shows_itself_in_a_notebook_without_pyplot():
    code = (
        "import sys; from spectra import Spectrum, histogram_figure;"
        "figure = histogram_figure([Spectrum('a', (2, 2), S=[2.0, 1.0])]);"
        "assert 'matplotlib.pyplot' not in sys.modules;"
        "assert figure._repr_png_().startswith(b'\\x89PNG')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_layout_is_found_once_for_all_formats_and_the_figure_keeps_its_engine(tmp_path, monkeypatch):
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    found = []
    execute = ConstrainedLayoutEngine.execute
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lambda *a: found.append(1) or execute(*a))
    figure = plots.histogram_figure([Spectrum("layers.0.v_proj.weight", (3, 3), S=[3.0, 2.0, 1.0])])
    engine = figure.get_layout_engine()
    written = plots.save_figure(figure, tmp_path / "histogram", ("png", "pdf", "svg"))
    assert len(found) == 1
    assert [path.stat().st_size > 1000 for path in written] == [True] * 3
    assert figure.get_layout_engine() is engine


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
@pytest.mark.parametrize("save", [save_figure, lambda figure, path, kinds: save_pages([("1", figure)], path, kinds)])
def test_a_full_disk_is_one_message_and_leaves_what_was_there(tmp_path, monkeypatch, kind, save):
    """Matplotlib's own writer of pdf ends in an AttributeError there."""
    figure = Figure()
    figure.subplots().plot([1, 2])
    (before,) = save(figure, tmp_path / "it", [kind])
    was = before.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match="No space left on device"):
        save(figure, tmp_path / "it", [kind])
    assert before.read_bytes() == was
    assert [path.name for path in tmp_path.iterdir()] == [before.name]
