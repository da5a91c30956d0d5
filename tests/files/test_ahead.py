"""Runs of small neighbours: what is fetched together is what each alone would have been."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectra.files import ahead
from spectra.files.ahead import Ahead, runs

DATA = bytes(i * 37 % 251 for i in range(4000))
SPANS = st.lists(
    st.tuples(st.integers(0, 3000), st.integers(1, 300)).map(lambda pair: (pair[0], sum(pair))),
    max_size=30,
    unique=True,
)


class File:
    """What is fetched from a file that holds DATA."""

    def __init__(self) -> None:
        self.fetched: list[tuple[int, int]] = []

    def __call__(self, offset: int, buffer: memoryview) -> int:
        found = DATA[offset : offset + len(buffer)]
        buffer[: len(found)] = found
        self.fetched.append((offset, offset + len(buffer)))
        return len(found)


def read(there: Ahead, file: File, span: tuple[int, int]) -> bytes:
    content = bytearray(span[1] - span[0])
    there.read_into("file", span[0], memoryview(content), file)
    return bytes(content)


@given(SPANS)
def test_every_span_has_its_own_bytes_and_nothing_is_left(spans):
    there, file = Ahead({"file": spans}), File()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda span: read(there, file, span), spans))
    assert found == [DATA[start:stop] for start, stop in spans]
    assert there._held == 0
    assert read(there, file, (5, 9)) == DATA[5:9]


@given(SPANS)
def test_runs_are_short_of_gaps(spans):
    for run in runs(spans):
        assert len(run) > 1
        assert all(0 <= b[0] - a[1] <= ahead._GAP for a, b in itertools.pairwise(run))


def test_neighbours_come_in_one_request_and_a_second_reading_asks_again():
    there, file = Ahead({"file": [(0, 10), (10, 30), (30, 31), (1000, 1010)]}), File()
    assert [read(there, file, span) for span in [(10, 30), (0, 10), (30, 31)]] == [DATA[10:30], DATA[:10], DATA[30:31]]
    assert file.fetched == [(0, 31)]
    read(there, file, (0, 10))
    assert file.fetched == [(0, 31), (0, 10)]


def test_no_more_is_held_than_is_allowed(monkeypatch):
    monkeypatch.setattr(ahead, "_HELD", 25)
    there, file = Ahead({"file": [(0, 10), (10, 20), (500, 510), (510, 520)]}), File()
    read(there, file, (0, 10))
    assert read(there, file, (500, 510)) == DATA[500:510]
    assert file.fetched == [(0, 20), (500, 510)]


def test_a_run_that_cannot_be_had_is_an_error_each_time_and_holds_nothing():
    def broken(offset: int, buffer: memoryview) -> int:
        raise OSError

    there = Ahead({"file": [(0, 10), (10, 20)]})
    for _ in range(2):
        with pytest.raises(OSError):  # noqa: PT011 (the fault itself)
            there.read_into("file", 0, memoryview(bytearray(10)), broken)
    assert there._held == 0
