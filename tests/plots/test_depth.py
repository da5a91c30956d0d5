"""A metric over depth: the artists hold the table's numbers, each in its layer and role."""

from __future__ import annotations

import csv
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import spectra
from spectra.errors import SelectionError
from spectra.metrics import METRICS
from spectra.plots.depth import depth_grid, finding, is_wide
from spectra.plots.figures import depth_grids
from spectra.spectrum import Spectrum


def matrix(layer, role, S=(2.0, 1.0), **fields):
    return Spectrum(f"model.layers.{layer}.self_attn.{role}.weight", (2, 2), S=S, **fields)


@pytest.fixture
def run():
    """Two layers; one v_proj did not change, and one k_proj could not be done."""
    return [
        matrix(0, "q_proj", (4.0, 3.0)), matrix(1, "q_proj", (8.0, 6.0)),
        matrix(0, "k_proj", (1.0, 0.0)), matrix(1, "k_proj", (), status="nonfinite", reason="3 NaN"),
        matrix(0, "v_proj", (0.0, 0.0), status="unchanged"), matrix(1, "v_proj", (3.0, 0.0)),
    ]  # fmt: skip


def drawn(*arguments, **options):
    return spectra.plot_depth(*arguments, **options, ax=Figure().subplots())


def labels(ticks):
    return [text.get_text() for text in ticks]


def test_every_cell_is_the_tables_number(run):
    table = spectra.summarize(run).set_index("name")
    for given in (run, spectra.summarize(run), spectra.summarize(run).to_dict("records"), spectra.Spectra(run)):
        ax = drawn(given, "norm")
        image = ax.images[0].get_array().filled(np.nan)
        rows = labels(ax.get_yticklabels())
        assert rows == ["q_proj", "k_proj", "v_proj"]
        assert labels(ax.get_xticklabels()) == ["0", "1"]
        for i, role in enumerate(rows):
            for layer in (0, 1):
                wanted = table.loc[f"model.layers.{layer}.self_attn.{role}.weight", "norm"]
                assert image[i, layer] == wanted or (math.isnan(image[i, layer]) and math.isnan(wanted))


def test_a_matrix_without_a_number_is_hatched_and_a_missing_one_is_not(run):
    ax = drawn(run[:-1], "stable_rank")
    hatched = {(round(patch.get_x() + 0.5), round(patch.get_y() + 0.5)) for patch in ax.patches if patch.get_hatch()}
    assert hatched == {(1, 1), (0, 2)}
    assert "hatched: no number" in ax.get_xlabel()
    assert "hatched" not in drawn(run[:2], "norm").get_xlabel()


def test_experts_of_a_layer_are_one_cell_with_their_median():
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in (0, 1) for e in range(3)]
    experts = [Spectrum(name, (1, 1), S=[s]) for name, s in zip(names, (1.0, 2.0, 9.0, 5.0, 6.0, 7.0), strict=True)]
    grid = depth_grid(experts, "norm")
    assert grid.rows == ("up_proj, experts",)
    assert grid.values.tolist() == [[2.0, 6.0]]
    assert grid.matrices.tolist() == [[3, 3]]
    assert finding(grid) == "norm: median 5.5, largest 9 in up_proj, experts of layer 0 (one of 3)"
    figure = spectra.depth_figure(experts, ["norm"])
    assert "median of up to 3 matrices" in figure.axes[-1].get_ylabel()


def test_what_is_in_no_layer_is_told_below_and_does_not_stretch_the_scale(run):
    head = Spectrum("lm_head.weight", (2, 2), S=[1000.0, 0.0])
    ax = drawn([*run, head], "norm")
    assert ax.images[0].norm.vmax == 10.0
    assert "in no layer: lm_head 1e+03" in ax.get_xlabel()
    assert "largest 10 in q_proj of layer 1" in ax.get_title()
    assert [cell["role"] for cell in depth_grid([head], "norm").cells()] == ["lm_head"], "where there is nothing else"


def test_lines_are_the_rows_of_the_heatmap_and_stop_between_stacks(run):
    ax = drawn(run, "norm", kind="lines")
    lines = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in ax.get_lines()}
    assert lines == {"q_proj": ([0, 1], [5.0, 10.0]), "k_proj": ([0], [1.0]), "v_proj": ([0, 1], [0.0, 3.0])}
    stacks = [Spectrum(f"{s}.block.{i}.layer.0.SelfAttention.q.weight", (1, 1), S=[1.0]) for s in ("encoder", "decoder")
              for i in range(3)]  # fmt: skip
    ax = drawn(stacks, "norm", kind="lines")
    assert [line.get_xdata().tolist() for line in ax.get_lines() if len(line.get_xdata()) == 3] == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    assert {text.get_text() for text in ax.texts} == {"encoder", "decoder"}


def test_several_runs_share_rows_columns_and_scale(run):
    other = [matrix(layer, "o_proj", (20.0, 0.0)) for layer in range(3)]
    figure = spectra.depth_figure({"first": run, "second": other}, ["norm", "stable_rank"])
    panels = [ax for ax in figure.axes if ax.images]
    assert len(panels) == 4
    assert len({tuple(labels(ax.get_yticklabels())) for ax in panels}) == 1
    assert {ax.images[0].get_array().shape for ax in panels} == {(4, 3)}
    assert [ax.images[0].norm.vmax for ax in panels[:2]] == [20.0, 20.0]
    assert [ax.get_title().splitlines()[0] for ax in panels] == ["first", "second", "first", "second"]


def test_one_metric_may_be_its_name_alone(run):
    alone, listed = (spectra.depth_figure(run, metrics) for metrics in ("norm", ["norm"]))
    assert [ax.get_title() for ax in alone.axes] == [ax.get_title() for ax in listed.axes]


def test_runs_of_other_models_have_rows_and_columns_of_their_own(run):
    other = [Spectrum(f"h.{i}.attn.c_proj.weight", (1, 1), S=[1.0]) for i in range(5)]
    figure = spectra.depth_figure({"first": run, "second": other}, ["norm"])
    panels = [ax for ax in figure.axes if ax.images]
    assert [ax.images[0].get_array().shape for ax in panels] == [(3, 2), (1, 5)]
    assert len({ax.images[0].norm.vmax for ax in panels}) == 1


def test_values_over_decades_are_on_a_logarithmic_scale():
    spread = [matrix(i, "q_proj", (10.0**i, 0.0)) for i in range(3)]
    assert type(drawn(spread, "norm").images[0].norm).__name__ == "LogNorm"
    assert drawn(spread, "norm", kind="lines").get_yscale() == "log"
    assert not is_wide((0.0, 5.0))
    for values, limits in (
        ((1.0, 2.0), (0.0, 2.0)),
        ((3.0, 4.0), (3.0, 4.0)),
        ((5.0,), (0.0, 5.0)),
        ((0.0,), (0.0, 1.0)),
    ):
        alike = [matrix(i, "q_proj", (value, 0.0)) for i, value in enumerate(values)]
        norm = drawn(alike, "norm", colorbar=False).images[0].norm
        assert (norm.vmin, norm.vmax) == limits


def test_wrong_input_is_one_message(run):
    with pytest.raises(
        SelectionError, match=r"metric 'nrm' is not a column of numbers here; there are norm, .*max_rank"
    ) as wrong:
        drawn(run, "nrm")
    listed = str(wrong.value).partition("there are ")[2].split(", ")
    assert {*METRICS} <= {*listed}
    assert not {"layer", "out", "in"} & {*listed}
    with pytest.raises(SelectionError, match=r"metric 'nrm' is not .*; there are phi$"):
        drawn([{"name": "a", "layer": 1, "phi": 1.0}], "nrm")
    with pytest.raises(SelectionError, match=r"no column 'name'.*by='matrix'"):
        drawn(spectra.summarize(run, by="role"), "norm")
    with pytest.raises(SelectionError, match=r"stands in the table several times: .*such as side='right'"):
        drawn(
            pd.DataFrame([{"name": "a", "side": "left", "phi": 1.0}, {"name": "a", "side": "right", "phi": 0.0}]), "phi"
        )
    with pytest.raises(SelectionError, match=r"status' of .* is 'ok', not a number"):
        drawn(run, "status")
    with pytest.raises(SelectionError, match="there is no matrix"):
        drawn([], "norm")
    with pytest.raises(SelectionError, match="kind='bars' is not one of heatmap, lines"):
        drawn(run, "norm", kind="bars")


def test_a_run_without_any_number_is_drawn_as_such():
    ax = drawn([matrix(0, "q_proj", (), status="failed"), matrix(1, "q_proj", (), status="failed")], "norm")
    assert ax.get_title() == "norm: no matrix has a number"


def test_rows_beyond_what_is_readable_are_named():
    many = [Spectrum(f"layers.0.part{i}.weight", (1, 1), S=[1.0]) for i in range(30)]
    grid = depth_grid(many, "norm")
    assert (len(grid.rows), len(grid.left_out)) == (24, 6)


def test_results_are_drawn_beside_their_numbers(run, tmp_path):
    spectra.save(run, tmp_path / "run")
    files = spectra.draw_results(tmp_path / "run").files
    assert [path.name for path in files][-3:] == ["depth.png", "depth.pdf", "depth.csv"]
    rows = list(csv.DictReader((tmp_path / "run/depth.csv").open()))
    table = spectra.summarize(run).set_index("name")
    for row in rows:
        wanted = table.loc[f"model.layers.{row['layer']}.self_attn.{row['role']}.weight", row["metric"]]
        assert row["median"] == ("" if math.isnan(wanted) else repr(float(wanted)))
    assert {row["metric"] for row in rows} == {"norm", "stable_rank"}, "no base norm is known"


@pytest.mark.parametrize("kind", ["heatmap", "lines"])
def test_no_text_of_a_panel_runs_into_anothers(kind):
    stacks = [f"{stack}_blocks.{i}.attentions.0" for stack in ("down", "up") for i in range(4)] + [
        "mid_block.attentions.0"
    ]
    names = [f"{stack}.transformer_blocks.0.attn1.to_q.weight" for stack in stacks]
    run = [Spectrum(name, (1, 1), S=[1.0 + i]) for i, name in enumerate(names)]
    run += [Spectrum(f"an_embedding_with_a_long_name_{i}.weight", (1, 1), S=[1.0]) for i in range(6)]
    figure = spectra.depth_figure({"one": run, "two": run}, ["norm"], kind=kind)
    FigureCanvasAgg(figure).draw()
    panels = [ax for ax in figure.axes if ax.get_title()]
    texts = [text.get_window_extent() for ax in panels for text in (ax.title, ax.xaxis.label, *ax.texts)]
    for i, box in enumerate(texts):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(other) for other in texts[i + 1 :])


def test_runs_side_by_side_have_the_same_rows_in_the_same_order_whatever_each_holds():
    names = [f"h.{i}.{role}.weight" for i in range(2) for role in ("first_own", "second_own", "q_proj", "third_own")]
    full = [Spectrum(name, (2, 2), S=[1.0 + i, 1.0]) for i, name in enumerate(names)]
    fewer = [spectrum for spectrum in full if "third" in spectrum.name or "q_proj" in spectrum.name]
    for runs in ({"full": full, "fewer": fewer}, {"fewer": fewer, "full": full}):
        rows = {grid.rows for grid in depth_grids(runs, ["norm"]).values()}
        assert len(rows) == 1
        assert sorted(*rows) == ["first_own", "q_proj", "second_own", "third_own"]


def test_a_stacks_name_stands_upright_only_where_its_columns_are_too_narrow_for_it():
    def turned(*layers):
        stacks = zip(("encoder", "decoder"), layers, strict=True)
        names = [f"{s}.block.{i}.layer.0.SelfAttention.q.weight" for s, count in stacks for i in range(count)]
        ax = drawn([Spectrum(name, (1, 1), S=[1.0]) for name in names], "norm")
        return {text.get_text(): bool(text.get_rotation()) for text in ax.texts if text.get_text() in "encoder decoder"}

    assert turned(3, 3) == {"encoder": False, "decoder": False}
    assert turned(60, 4) == {"encoder": False, "decoder": True}, "four columns of many are narrow"


@pytest.mark.parametrize("size", ["column", "page", "slide"])
@pytest.mark.parametrize("layers", [12, 32, 101])
def test_the_layers_numbers_do_not_touch(size, layers):
    names = [f"model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight" for i in range(layers) for e in range(2)]
    drawn = spectra.depth_figure([Spectrum(name, (1, 1), S=[2.0]) for name in names], size=size)
    FigureCanvasAgg(drawn).draw()
    for ax in drawn.axes:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
        assert not boxes or len(boxes) > 4


def test_the_largest_of_a_cell_of_several_is_told_as_one_of_them():
    names = [f"model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight" for i in range(2) for e in range(3)]
    grid = depth_grid([Spectrum(name, (1, 1), S=[at + 1.0]) for at, name in enumerate(names)], "norm")
    assert finding(grid).endswith("largest 6 in down_proj, experts of layer 1 (one of 3)")
