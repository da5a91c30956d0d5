"""The page on rounding shows the tables that the benchmarks printed, and they are of the benchmarks as they are."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import rounding

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "rounding.md").read_text()
STORED = (ROOT / "benchmarks" / "results" / "rounding.md").read_text()


def tables(text):
    return re.findall(r"(?:^\|.*\n)+", text, re.M)


def test_the_pages_tables_are_the_stored_ones():
    assert len(tables(STORED)) == 5
    assert tables(PAGE) == tables(STORED)


def test_every_family_type_and_size_has_its_row():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables(STORED)[2].splitlines()[2:]]
    assert len(rows) == 5 * len(rounding.TYPES) * len(rounding.SHARES)
    assert {row[1] for row in rows} == set(rounding.TYPES)
    assert {float(row[2]) for row in rows} == set(rounding.SHARES)
    assert all(len(row) == 3 + len(rounding.RANKS) for row in rows)


def test_no_more_is_claimed_of_a_full_fine_tune_than_is_true():
    for line in tables(STORED)[3].splitlines()[2:]:
        way, told, claimed, true = line.strip("| ").split(" | ")
        assert set(told.split(", ")) == {"2" if "two" in way else "1"}
        assert all(int(c) <= int(t) for c, t in zip(claimed.split(", "), true.split(", "), strict=True))
