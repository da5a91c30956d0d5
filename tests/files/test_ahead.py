"""What is fetched before it is asked for: the right bytes, each once, and never more of them than there is room."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.errors import SourceError
from spectra.files import ahead
from spectra.files.ahead import Ahead, Wanted

CONTENT = bytes(i * 7 % 251 for i in range(4000))


class File:
    """A file that notes what is fetched of it, and by how much the fetched exceeds the read at most."""

    def __init__(self, broken=()):
        self.fetched, self.broken, self.lock = [], broken, threading.Lock()

    def fetch(self, offset, buffer):
        if any(offset <= place < offset + len(buffer) for place in self.broken):
            raise SourceError("broken")
        with self.lock:
            self.fetched.append((offset, offset + len(buffer)))
        buffer[:] = CONTENT[offset : offset + len(buffer)]
        return len(buffer)

    def wanted(self, *spans):
        return [Wanted("file", span, self.fetch) for span in spans]


def read(held, file, span):
    buffer = bytearray(span[1] - span[0])
    held.read_into("file", span[0], memoryview(buffer), file.fetch)
    return bytes(buffer)


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


def test_what_is_said_to_be_read_twice_comes_once(tiny):
    file = File()
    held = Ahead([file.wanted((0, 100)), file.wanted((0, 100), (200, 300))], room=1000)
    for span in ((0, 100), (0, 100), (200, 300)):
        assert read(held, file, span) == CONTENT[slice(*span)]
    assert file.fetched == [(0, 100), (200, 300)]
    assert not held._held
    assert read(held, file, (0, 100)) == CONTENT[:100], "once more than was said"


def test_without_room_it_is_read_again_and_right(tiny):
    file = File()
    held = Ahead([file.wanted((0, 100)), file.wanted((0, 100))], room=99)
    assert read(held, file, (0, 100)) == read(held, file, (0, 100)) == CONTENT[:100]
    assert file.fetched == [(0, 100), (0, 100)]


def test_one_matrix_is_fetched_ahead_and_no_more(tiny):
    file = File()
    spans = [(100 * i, 100 * i + 100) for i in range(8)]
    held = Ahead([file.wanted(*spans[i : i + 2]) for i in range(0, 8, 2)], room=10_000, fetches=True)
    assert sorted(settled(file, 2)) == spans[:2]
    for i, span in enumerate(spans):
        assert read(held, file, span) == CONTENT[slice(*span)]
        assert len(settled(file, min(i + 3, 8))) <= min(i + 3, 8)
    assert sorted(file.fetched) == spans, "each once"
    assert not held.stop()


def test_nothing_is_fetched_after_the_stop(tiny):
    file = File()
    held = Ahead([file.wanted((100 * i, 100 * i + 100)) for i in range(8)], room=10_000, fetches=True)
    before = settled(file, 1)
    assert not held.stop()
    read(held, file, before[0])
    assert settled(file, 0) == before


def test_what_cannot_be_fetched_ahead_is_told_to_who_reads_it(tiny):
    file = File(broken=[50])
    held = Ahead([file.wanted((0, 100)), file.wanted((100, 200))], room=10_000, fetches=True)
    settled(file, 1)
    with pytest.raises(SourceError, match="broken"):
        read(held, file, (0, 100))
    assert read(held, file, (100, 200)) == CONTENT[100:200]
    assert not held._held


def test_what_will_not_be_read_after_all_makes_room_for_the_next(tiny):
    file = File()
    spans = [(100 * i, 100 * i + 100) for i in range(4)]
    held = Ahead([file.wanted(span) for span in spans], room=10_000, fetches=True)
    assert settled(file, 1) == spans[:1]
    held.drop("file", spans[0])
    assert settled(file, 2) == spans[:2]
    held.drop("file", spans[3])
    for span in spans[1:3]:
        read(held, file, span)
    assert settled(file, 3) == spans[:3]
    assert not held._held
    assert read(held, file, spans[0]) == CONTENT[:100], "and whoever asks all the same gets it"


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3900), st.integers(1, 90)), min_size=1, max_size=4), max_size=12),
    st.integers(1, 400),
    st.booleans(),
    st.integers(1, 3),
)
def test_whatever_is_read_by_several_threads_is_right_and_within_the_room(matrices, room, fetches, readers):
    file = File()
    spans = [[(start, start + size) for start, size in matrix] for matrix in matrices]
    highest = [0]

    def watched(offset, buffer):
        highest[0] = max(highest[0], held._held)
        return file.fetch(offset, buffer)

    matrices = [[Wanted("file", span, watched) for span in matrix] for matrix in spans]
    held = Ahead([], room)
    held = Ahead(matrices, room, fetches=fetches)

    def read_all(matrix):
        return [read(held, file, span) for span in matrix]

    with ThreadPoolExecutor(readers) as pool:
        for matrix, found in zip(spans, pool.map(read_all, spans), strict=True):
            assert found == [CONTENT[slice(*span)] for span in matrix]
    held.stop()
    assert highest[0] <= room
    assert held._held == 0, "everything that was said was read"
