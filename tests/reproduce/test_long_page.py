"""What the page about the long experiment says is what its stored numbers say, and the rule judges those."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from reproduce.tiny import ROOT

from spectra.reproduce.long import LONG, figures
from spectra.reproduce.long.numbers import Numbers
from spectra.reproduce.long.page import tables, verdicts
from spectra.reproduce.long.rule import overall

PICTURES = ROOT / "figures" / "long-training"
PAGE = (ROOT / "docs" / "long-training.md").read_text()


@pytest.fixture(scope="module")
def numbers():
    return Numbers.load(PICTURES)


def test_the_pages_tables_and_verdicts_are_made_of_the_numbers(numbers):
    made = tables(numbers, LONG)
    assert (PICTURES / "tables.md").read_text() == made
    blocks = re.findall(r"(?:^[|*].*\n)+", made, re.M)
    assert len(blocks) >= 4
    for block in blocks:
        assert block in PAGE


def test_the_verdict_in_the_first_lines_is_the_rules(numbers):
    word = overall(verdicts(numbers.summary, LONG), LONG.steps)
    assert f"**{word}**" in PAGE.partition("\n## ")[0]


def test_the_ratios_in_the_first_lines_are_the_rules(numbers):
    lead = PAGE.partition("\n## ")[0]
    for verdict in verdicts(numbers.summary, LONG)[:2]:
        ratios = re.findall(r"(\d\.\d\d) times", verdict.reason)
        assert len(ratios) == 2
        for ratio in ratios:
            assert ratio in lead, verdict


def test_every_link_of_the_page_leads_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)", PAGE)
    assert len(targets) >= 5
    for target in targets:
        assert (ROOT / "docs" / target).exists(), target


def test_the_numbers_are_of_the_plan_in_the_code(numbers):
    planned = {run.name: run for run in LONG.runs()}
    rows = numbers.summary.drop_duplicates("run").set_index("run")
    for name, row in rows.iterrows():
        run = planned[name]
        assert (row["label"], row["lr"]) == (run.label, pytest.approx(run.lr))
        assert (row["init_seed"], row["data_seed"]) == (run.init_seed, run.data_seed)
    assert set(numbers.summary["step"]) <= set(LONG.snapshots)


def test_the_summary_is_the_mean_over_the_matrices(numbers):
    means = numbers.matrices.groupby(["run", "step"])["rank_90"].agg(["mean", "size"])
    stored = numbers.summary[numbers.summary["step"] > 0].set_index(["run", "step"])["rank_90"]
    pd.testing.assert_series_equal(means["mean"].reindex(stored.index), stored, check_names=False, rtol=1e-4)
    assert set(means["size"]) == {28}


def test_no_legend_is_wider_than_its_figure(numbers, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, target: drawn.append(figure))
    figures.draw_all(numbers, tmp_path)
    legends = [(figure, legend) for figure in drawn for legend in figure.legends]
    assert len(legends) == 5
    for figure, legend in legends:
        figure.draw_without_rendering()
        box = legend.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_the_intruders_that_the_page_counts_are_those_of_the_numbers(numbers):
    counts = (28 * numbers.directions.set_index(["run", "step"])["intruders"]).round(2)
    assert [tuple(counts[run].loc[[400, 800]]) for run in ("lora", "multilora", "rlora")] == [(2, 5), (2, 3), (4, 6)]
    assert (counts["full"] == 0).all()
    assert "LoRA has 2 at step 400 and 5 at step 800, MultiLoRA 2 and 3, R-LoRA 4 and 6" in PAGE
