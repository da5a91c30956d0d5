"""The verdicts of a merge over layer × role: the worst of a cell, with a sign and its count."""

from __future__ import annotations

import json

import pytest
from matplotlib.colors import to_hex

import spectra
from spectra.errors import SelectionError


def rows(*verdicts):
    return [
        {"name": f"layers.{i // 2}.{'qv'[i % 2]}_proj.weight", "verdict": verdict} for i, verdict in enumerate(verdicts)
    ]


def test_a_cell_is_the_verdict_of_its_matrix():
    figure = spectra.verdicts_figure(rows("exact", "rounded", "damaged", "exact"))
    ax = figure.axes[0]
    shown = [[to_hex(colour) for colour in line] for line in ax.images[0].get_array().tolist()]
    assert shown == [["#009e73", "#d55e00"], ["#56b4e9", "#009e73"]]
    assert sorted(text.get_text() for text in ax.texts) == ["=", "=", "×", "≈"]
    assert ax.get_title() == "3 of 4 matrices as merged"
    assert [text.get_text() for text in figure.legends[0].texts] == [
        "=  exact: 2 matrices", "≈  rounded: 1 matrix", "×  damaged: 1 matrix",
    ]  # fmt: skip


def test_experts_that_share_a_cell_show_the_worst():
    names = [f"layers.0.block_sparse_moe.experts.{e}.w1.weight" for e in range(3)]
    given = [
        {"name": name, "verdict": verdict}
        for name, verdict in zip(names, ("exact", "not applied", "rounded"), strict=True)
    ]
    ax = spectra.verdicts_figure(given).axes[0]
    assert [text.get_text() for text in ax.texts] == ["0"]


def test_a_stored_merge_is_drawn_with_its_numbers_beside_it(tmp_path):
    (tmp_path / "verify.json").write_text(json.dumps({"matrices": rows("exact", "rounded")}))
    files = spectra.draw_results(tmp_path, formats=["svg"], layers="v_proj").files
    assert [path.name for path in files] == ["verdicts.svg", "verdicts.csv"]
    assert files[1].read_text().splitlines() == ["name,verdict", "layers.0.v_proj.weight,rounded"]


def test_nothing_to_draw_is_said():
    with pytest.raises(SelectionError, match="no matrix was verified"):
        spectra.verdicts_figure([])
