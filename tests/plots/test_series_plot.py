"""The curves along training: their artists, and the figure that a stored series gets."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from support.checkpoints import llama_tensors, nudged, write_checkpoint

import spectra
from spectra.errors import SelectionError, StoreError
from spectra.plots.series import series_curves


def table(roles=("q_proj", "v_proj")):
    rows = [
        {"step": step, "name": f"layers.{layer}.{role}.weight", "role": role, "status": "ok", "norm": step + layer,
         "phi_to_last": 0.5, "phi_to_last_chance": 0.1}
        for step in (10, 30)
        for role in roles
        for layer in (0, 1, 5)
    ]  # fmt: skip
    failed = {"step": 20, "name": "", "role": "", "status": "unreadable", "norm": np.nan}
    return pd.DataFrame([*rows, failed])


def test_a_curve_per_role_is_the_median_in_a_band_of_quartiles():
    ax = spectra.plot_series(table(), metric="norm", ax=Figure().subplots())
    curve, other = ax.get_lines()
    assert (curve.get_label(), other.get_label()) == ("q_proj", "v_proj")
    assert curve.get_xydata().tolist() == [[10, 11], [30, 31]]
    (band, _) = ax.collections
    assert (band.get_datalim(ax.transData).y0, band.get_datalim(ax.transData).y1) == (10.5, 33.0)
    assert ax.get_xlabel() == "step"


def test_shares_reach_from_0_to_1_and_chance_is_dotted():
    ax = spectra.plot_series(table(), metric="phi_to_last", ax=Figure().subplots())
    dotted = [line for line in ax.get_lines() if line.get_linestyle() == ":"]
    assert [line.get_ydata().tolist() for line in dotted] == [[0.1, 0.1]] * 2
    assert ax.get_ylim() == (0, 1.03)


def test_a_figure_has_a_panel_for_each_metric_that_has_values_and_one_legend():
    figure = spectra.series_figure(table(), title="run")
    assert [ax.get_ylabel().replace("\n", " ") for ax in figure.axes if ax.get_visible()] == [
        "‖ΔW‖_F",
        "φ(k, k) to the last checkpoint",
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "q_proj", "v_proj", "quartiles over layers", "by chance",
    ]  # fmt: skip
    assert figure.axes[0].get_title().split() == ["median", "11", "at", "step", "10,", "31", "at", "step", "30"]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["10", "30"]


def test_many_checkpoints_have_whole_numbers_below_them():
    close = pd.concat([table().assign(step=table()["step"] + more) for more in range(7)])
    ax = spectra.plot_series(close, metric="norm", ax=Figure().subplots())
    assert 2 < len(ax.get_xticks()) < 8
    assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_what_is_not_there_is_refused():
    with pytest.raises(SelectionError, match="'sigma' is not a metric along training"):
        spectra.plot_series(table(), metric="sigma")
    nothing = table().assign(norm=np.nan)
    with pytest.raises(SelectionError, match="no checkpoint has a value of norm"):
        spectra.plot_series(nothing, metric="norm")
    with pytest.raises(SelectionError, match="no checkpoint has an update"):
        spectra.series_figure(table()[table()["status"] != "ok"])


def test_a_stored_series_is_redrawn_with_its_numbers_beside_it(tmp_path):
    base = write_checkpoint(tmp_path / "base", llama_tensors())
    for step in (1, 2):
        write_checkpoint(tmp_path / f"step-{step}", nudged(llama_tensors(), seed=step, size=step * 0.01))
    found = spectra.series([tmp_path / "step-1", tmp_path / "step-2"], base, top=2, out=tmp_path / "kept")
    drawn = spectra.draw_results(tmp_path / "kept")
    assert {path.name for path in drawn.files} == {"series.png", "series.pdf", "series_curves.csv"}
    assert "not drawn" in drawn.notes[0], "nine roles are there"
    curves = pd.read_csv(tmp_path / "kept/series_curves.csv")
    assert len(curves) == 2 * 9
    role = found[(found["role"] == "q_proj") & (found["step"] == 2)]
    line = curves[(curves["role"] == "q_proj") & (curves["step"] == 2)].iloc[0]
    assert line["norm"] == pytest.approx(role["norm"].median())
    assert [row["norm"] for row in series_curves(found)] == pytest.approx(list(curves["norm"]))
    few = spectra.draw_results(tmp_path / "kept", tmp_path / "few", layers="q_proj")
    assert few.notes == ()
    assert set(pd.read_csv(tmp_path / "few/series_curves.csv")["role"]) == {"q_proj"}
    both = spectra.draw_results(
        [tmp_path / "kept", tmp_path / "kept"], tmp_path / "both", labels=["a", "b"], layers="q_proj"
    )
    assert {path.name for path in both.files} >= {"series-a.png", "series-b.png"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("name\n\n", "it lacks the column step"),
        ("", "No columns"),
        ("\x00\n\xff", "damaged"),
        (None, "Unable to parse"),
    ],
)
def test_a_damaged_table_is_one_message(tmp_path, content, why):
    base = write_checkpoint(tmp_path / "base", llama_tensors())
    write_checkpoint(tmp_path / "step-1", nudged(llama_tensors()))
    spectra.series([tmp_path / "step-1"], base, layers="q_proj", top=2, out=tmp_path / "kept")
    table = tmp_path / "kept" / "series.csv"
    if content is None:
        frame = pd.read_csv(table)
        content = frame.assign(norm="many").to_csv(index=False)
    table.write_text(content, encoding="latin-1")
    with pytest.raises(StoreError, match=f"series.csv is damaged.*{why}|series.csv is {why}"):
        spectra.draw_results(tmp_path / "kept")
