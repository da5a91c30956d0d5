"""What is fetched before it is asked for: the right bytes, each once, and never more of them than one matrix."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.errors import SourceError
from spectra.files import ahead, ranges
from spectra.files.ahead import Ahead, Wanted

CONTENT = bytes(i * 7 % 251 for i in range(4000))


class File:
    """A file that notes what is fetched of it."""

    def __init__(self, broken=()):
        self.fetched, self.broken, self.lock = [], broken, threading.Lock()

    def fetch(self, path, stamp, offset, buffer):
        if any(offset <= place < offset + len(buffer) for place in self.broken):
            raise SourceError("broken")
        with self.lock:
            self.fetched.append((offset, offset + len(buffer)))
        buffer[: len(buffer)] = CONTENT[offset : offset + len(buffer)]
        return len(buffer)

    def wanted(self, *spans):
        return [Wanted("file", span, (4000, "v1"), self.fetch) for span in spans]


def read(held, span):
    buffer = bytearray(span[1] - span[0])
    return bytes(buffer) if held.read_into(("file", span), memoryview(buffer)) else None


def done(held, *spans):
    for span in spans:
        held.done(("file", span))


def left():
    return sorted(ranges.folder().iterdir()) if ranges.folder().exists() else []


def settled(file, count):
    """What has been fetched, once it is so much and nothing more comes."""
    until = time.monotonic() + 30
    while len(file.fetched) < count and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    return list(file.fetched)


@pytest.fixture
def tiny(monkeypatch):
    """Bounds of a size that tests can see: tensors of more than 10 bytes are large, 40 bytes may be a run."""
    monkeypatch.setattr(ahead, "SMALL", 10)
    monkeypatch.setattr(ahead, "_LONGEST", 40)


def test_what_matrices_share_comes_once_and_stays_until_the_last_is_done(tiny):
    file = File()
    held = Ahead([file.wanted((0, 100)), file.wanted((0, 100), (200, 300))])
    for span in ((0, 100), (0, 100), (200, 300), (200, 300)):
        assert read(held, span) == CONTENT[slice(*span)]
    assert file.fetched == [(0, 100), (200, 300)]
    done(held, (0, 100))
    assert held.has(("file", (0, 100)))
    assert len(left()) == 2
    done(held, (0, 100), (200, 300))
    assert left() == []
    assert read(held, (0, 100)) == CONTENT[:100], "once more than was said"
    held.stop()
    assert left() == []


def test_one_matrix_is_fetched_ahead_and_no_more(tiny):
    file = File()
    spans = [(100 * i, 100 * i + 100) for i in range(8)]
    held = Ahead([file.wanted(*spans[i : i + 2]) for i in range(0, 8, 2)], fetches=True)
    assert sorted(settled(file, 2)) == spans[:2]
    for i, span in enumerate(spans):
        assert read(held, span) == CONTENT[slice(*span)]
        assert len(settled(file, min(i + 3, 8))) <= min(i + 3, 8)
    assert sorted(file.fetched) == spans, "each once"
    assert not held.stop()


def test_nothing_is_fetched_after_the_stop(tiny):
    file = File()
    held = Ahead([file.wanted((100 * i, 100 * i + 100)) for i in range(8)], fetches=True)
    before = settled(file, 1)
    assert not held.stop()
    assert read(held, before[0]) is None
    assert settled(file, 0) == before
    assert left() == []


def test_what_cannot_be_fetched_ahead_is_told_to_who_reads_it(tiny):
    file = File(broken=[50])
    held = Ahead([file.wanted((0, 100)), file.wanted((100, 200))], fetches=True)
    settled(file, 1)
    with pytest.raises(SourceError, match="broken"):
        read(held, (0, 100))
    assert read(held, (100, 200)) == CONTENT[100:200]
    assert not held._unread
    held.stop()
    assert left() == []


def test_what_will_not_be_read_after_all_makes_room_for_the_next(tiny):
    file = File()
    spans = [(100 * i, 100 * i + 100) for i in range(4)]
    held = Ahead([file.wanted(span) for span in spans], fetches=True)
    assert settled(file, 1) == spans[:1]
    done(held, spans[0])
    assert settled(file, 2) == spans[:2]
    done(held, spans[3])
    for span in spans[1:3]:
        read(held, span)
    assert settled(file, 3) == spans[:3]
    assert not held._unread
    assert read(held, spans[0]) == CONTENT[:100], "and whoever asks all the same gets it"
    held.stop()


def test_what_a_run_that_was_broken_off_had_fetched_is_not_fetched_again(tiny):
    file = File()
    first = Ahead([file.wanted((0, 100), (200, 300))])
    read(first, (0, 100))
    first.stop(keep=True)
    assert len(left()) == 1
    second = Ahead([file.wanted((0, 100), (200, 300))])
    for span in ((0, 100), (200, 300)):
        assert read(second, span) == CONTENT[slice(*span)]
    assert file.fetched == [(0, 100), (200, 300)]
    second.stop()
    assert left() == []


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3900), st.integers(1, 90)), min_size=1, max_size=4), max_size=12),
    st.booleans(),
    st.integers(1, 3),
)
def test_whatever_is_read_by_several_threads_is_right_and_comes_once(matrices, fetches, readers):
    file = File()
    spans = [[(start, start + size) for start, size in matrix] for matrix in matrices]
    highest = [0]

    def watched(path, stamp, offset, buffer):
        highest[0] = max(highest[0], held._unread)
        return file.fetch(path, stamp, offset, buffer)

    matrices = [[Wanted("file", span, (4000, "v1"), watched) for span in matrix] for matrix in spans]
    held = Ahead([])
    held = Ahead(matrices, fetches=fetches)

    def read_all(matrix):
        found = [read(held, span) for span in matrix]
        done(held, *set(matrix))
        return found

    with ThreadPoolExecutor(readers) as pool:
        for matrix, found in zip(spans, pool.map(read_all, spans), strict=True):
            assert found == [CONTENT[slice(*span)] for span in matrix]
    held.stop()
    assert highest[0] <= held._limit
    assert held._unread == 0, "everything that was said was read"
    assert len(file.fetched) == len(set(file.fetched)), "each once"
    assert left() == []
