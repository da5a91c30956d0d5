"""Tables of spectra and similarities: a row per matrix, and a row per role."""

from __future__ import annotations

import numpy as np
import pytest

import spectra
from spectra.errors import SelectionError, TruncatedSpectrumError
from spectra.metrics import METRICS
from spectra.metrics.signal import of_signal
from spectra.metrics.similarity import SubspaceSimilarity, pool
from spectra.results.similarities import NotCompared
from spectra.results.tables import role_rows, row, to_csv, without_vectors
from spectra.spectrum import Spectrum

rng = np.random.default_rng(5)


def several() -> list[Spectrum]:
    """Two roles; one matrix unchanged, one failed, one of which only the top is there."""
    full = [
        Spectrum(f"layers.{i}.{role}.weight", (4, 4), S=np.sort(rng.random(4))[::-1])
        for i in range(3)
        for role in ("q_proj", "v_proj")
    ]
    return [
        *full,
        Spectrum("layers.3.v_proj.weight", (4, 4), "unchanged", S=np.zeros(4), unmoved_share=1.0),
        Spectrum("layers.4.v_proj.weight", (4, 4), "failed", reason="x"),
        Spectrum("layers.5.v_proj.weight", (4, 4), S=[1.0], norm=1.5),
        Spectrum("layers.0.o_proj.weight", (4, 4), "unreadable"),
    ]


def test_summarize_is_tidy():
    table = spectra.summarize(
        [Spectrum("layers.1.v_proj.weight", (2, 3), S=[2.0, 1.0]), Spectrum("b", (), "unreadable")]
    )
    assert list(table["status"]) == ["ok", "unreadable"]
    assert table.loc[0, "layer"] == 1
    assert table.loc[0, "stable_rank"] == pytest.approx(1.25)
    assert np.isnan(table.loc[1, "stable_rank"])


def test_a_roles_row_is_what_pandas_makes_of_its_matrices():
    found = several()
    table = spectra.summarize(found)
    by_role = spectra.summarize(found, by="role").set_index("role")
    done = table[table["status"].isin(["ok", "unchanged"])]
    assert list(by_role.index) == ["q_proj", "v_proj"], "a role of which nothing is done has no numbers"
    assert by_role["matrices"].to_dict() == done.groupby("role").size().to_dict() == {"q_proj": 3, "v_proj": 5}
    assert by_role["unchanged_matrices"].to_dict() == {"q_proj": 0, "v_proj": 1}
    medians = table[table["status"] == "ok"].groupby("role")[list(METRICS)].median()
    for name in METRICS:
        assert by_role[name].astype(float).tolist() == pytest.approx(medians[name].tolist(), nan_ok=True), name


def test_a_column_without_any_value_is_none():
    rows = role_rows([row(Spectrum("layers.0.v_proj.weight", (4, 4), S=[1.0], norm=2.0))], ["norm", "effective_rank"])
    assert rows == [{"role": "v_proj", "matrices": 1, "unchanged_matrices": 0, "norm": 2.0, "effective_rank": None}]


def similarities() -> list[SubspaceSimilarity]:
    grids = [np.full((2, 2), value) for value in (0.25, 0.75, 1.0)]
    names = ["layers.0.v_proj.weight", "layers.1.v_proj.weight", "layers.0.q_proj.weight"]
    return [
        SubspaceSimilarity(name, "left", 2, grid, grid / 8, np.array([0.1, 0.2]))
        for name, grid in zip(names, grids, strict=True)
    ]


def test_similarities_make_a_row_each_or_one_per_role_and_side():
    found = similarities()
    table = spectra.summarize_similarity([*found, NotCompared("b", "only in the first update", one_sided=True)])
    assert list(table["name"]) == [item.name for item in found]
    assert list(table["phi"]) == [0.25, 0.75, 1.0]
    by_role = spectra.summarize_similarity(iter(found), by="role")
    assert list(zip(by_role["name"], by_role["side"], by_role["phi"], strict=True)) == [
        ("q_proj", "left", 1.0),
        ("v_proj", "left", 0.5),
    ]


def test_pooling_by_role_is_pooling_each_role():
    found = similarities()
    second, first = spectra.pool_by_role(found)
    expected = pool(found[:2], "v_proj")
    assert (first.name, first.note) == (expected.name, expected.note)
    assert np.array_equal(first.grid, expected.grid)
    assert second.name == "q_proj"


@pytest.mark.parametrize("table", [spectra.summarize, spectra.summarize_similarity])
def test_by_is_one_of_two(table):
    with pytest.raises(SelectionError, match="by='layer' is not one of matrix, role"):
        table([], by="layer")


def test_a_row_is_made_once_and_of_the_metrics_that_are_asked_for():
    spectrum, calls = Spectrum("a", (1, 1), S=[2.0]), []
    metric = {"mine": lambda it: calls.append(it) or 1.0}
    plain = row(spectrum, {})
    assert "mine" not in plain
    assert row(spectrum, metric)["mine"] == 1.0
    row(spectrum, metric)["mine"] = 5.0  # the caller's own
    assert row(spectrum, metric)["mine"] == 1.0
    assert len(calls) == 1
    assert row(spectrum, {"mine": lambda it: 3.0})["mine"] == 3.0
    assert row(spectrum, {}) == plain


def test_what_was_measured_is_not_measured_again_for_fewer_columns_or_without_vectors():
    calls = []
    metrics = {name: lambda it, name=name: calls.append(name) or 1.0 for name in ("first", "second")}
    spectrum = Spectrum("a", (2, 2), S=[2.0, 1.0], U=np.eye(2), Vh=np.eye(2))
    whole = row(spectrum, metrics)
    some = row(spectrum, {"second": metrics["second"]})
    assert some == {column: value for column, value in whole.items() if column != "first"}
    bare = without_vectors(spectrum)
    assert (bare.U, bare.Vh, bare.k) == (None, None, 2)
    assert row(bare, metrics) == row(spectrum, metrics) == whole
    assert calls == ["first", "second"]
    assert without_vectors(bare) is bare


@pytest.mark.parametrize("edge", [None, 0.3, 5.0])
def test_every_metric_of_a_row_is_the_function_of_that_name(edge):
    some = [
        Spectrum("a", (9, 7), S=np.sort(rng.random(7))[::-1], base_norm=3.0, noise_edge=edge, noise_energy=0.1),
        Spectrum("b", (9, 7), S=[2.0, 1.0], max_rank=2, resolution=0.5, noise_edge=edge),
        Spectrum("c", (9, 7), S=[0.7, 0.1], norm=0.8, noise_edge=edge),
        Spectrum("d", (9, 7), "unchanged", S=np.zeros(7), noise_edge=edge),
        Spectrum("e", (9, 7), norm=1.0, max_rank=0, noise_edge=edge),
    ]
    for spectrum in some:
        for name, metric in METRICS.items():
            try:
                wanted = metric(spectrum)
            except TruncatedSpectrumError:
                wanted = np.nan
            assert np.array_equal(row(spectrum)[name], wanted, equal_nan=True), (spectrum.name, name)


def test_where_all_is_signal_nothing_is_measured_twice():
    calls = []
    plain = lambda it: calls.append(it) or 1.5  # noqa: E731
    metrics = {"mine": plain, "signal_mine": of_signal(plain)}
    assert row(Spectrum("a", (2, 2), S=[2.0, 1.0]), metrics)["signal_mine"] == 1.5
    assert len(calls) == 1
    row(Spectrum("a", (2, 2), S=[2.0, 1.0], noise_edge=1.5, noise_energy=0.1), metrics)
    assert [len(it.S) for it in calls] == [2, 2, 1]


def test_cells_of_a_table_are_blank_where_there_is_no_number():
    rows = [
        {"name": "a\x1bb", "x": 1.5, "n": None, "mixed": "t"},
        {"name": "c", "x": float("nan"), "n": 3, "mixed": 0.1},
        {"name": "c", "x": 0.1, "n": True},
    ]
    assert to_csv(rows).splitlines() == ["name,x,n,mixed", "a\\x1bb,1.5,,t", "c,,3,0.1", "c,0.1,True,"]


@pytest.mark.parametrize("sign", "=+-@")
def test_no_cell_is_a_formula(sign):
    rows = [{"name": f"{sign}cmd|x.weight", "norm": -1.0}, {"name": "a.weight", "norm": 2.0}]
    named = to_csv(rows).splitlines()
    assert named[1:] == [f"\\x{ord(sign):02x}cmd|x.weight,-1.0", "a.weight,2.0"]
    mixed = to_csv([{"name": None}, *rows[:1]]).splitlines()
    assert mixed[2].startswith("\\x")
