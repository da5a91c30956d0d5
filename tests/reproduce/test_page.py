"""What the page about the reproduction says is what its numbers say."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from reproduce.tiny import ROOT

from spectra.reproduce.page import tables
from spectra.reproduce.plan import FULL

PICTURES = ROOT / "figures" / "reproduction"
PAGE = (ROOT / "docs" / "reproduction.md").read_text()


def test_the_pages_tables_are_made_of_the_numbers():
    made = tables(PICTURES)
    assert (PICTURES / "tables.md").read_text() == made
    for table in re.findall(r"(?:^\|.*\n)+", made, re.M):
        assert table in PAGE


def test_every_link_of_the_page_leads_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)", PAGE)
    assert len(targets) >= 6
    for target in targets:
        assert (ROOT / "docs" / target).exists(), target


def test_the_numbers_are_of_the_plan_in_the_code():
    runs = pd.read_csv(PICTURES / "runs.csv").set_index("name")
    planned = [*FULL.main_runs(), *FULL.sensitivity_runs()]
    assert list(runs.index) == [run.name for run in planned]
    for run in planned:
        assert runs.loc[run.name, "steps"] == run.steps
        assert runs.loc[run.name, "lr"] == pytest.approx(run.lr, rel=1e-4)


def test_the_kept_values_give_the_kept_summaries():
    values = pd.read_csv(PICTURES / "values.csv.gz")
    spectra = pd.read_csv(PICTURES / "spectra.csv")
    last = spectra[spectra["step"] == FULL.steps].set_index(["run", "role"])
    for (run, role), group in values.groupby(["run", "role"]):
        shares = group.groupby("name")["sigma"].apply(lambda sigma: (sigma**2).max() / (sigma**2).sum())
        assert last.loc[(run, role), "top_1_share"] == pytest.approx(shares.median(), rel=1e-3)
        assert last.loc[(run, role), "matrices"] == len(shares)
