"""The bar tells the bytes that come from servers, also while one matrix takes long."""

from __future__ import annotations

import re
import time

import pytest
import torch

import spectra
from spectra.cli import progress
from spectra.deltas.at_work import Account, at_work, in_hands
from spectra.deltas.delta import WeightDelta
from spectra.engine import decompose
from spectra.engine.solvers import dense
from spectra.files import http


class Bar:
    """What tqdm does, written down."""

    disable = False

    def __init__(self):
        self.said, self.open = [], True

    def set_postfix_str(self, text, refresh):
        self.said.append(text)

    def refresh(self):
        assert self.open

    def update(self):
        pass

    def close(self):
        self.open = False


@pytest.fixture
def bar(monkeypatch):
    made = Bar()
    monkeypatch.setattr(progress, "_bar", lambda total, what: made)
    monkeypatch.setattr(progress, "_EVERY", 0.01)
    return made


def test_bytes_are_told_before_the_first_matrix_is_done(bar):
    with progress.Progress(3, "svd"):
        http.count(3 * 2**20)
        until = time.monotonic() + 20
        while not any(bar.said) and time.monotonic() < until:
            time.sleep(0.01)
        assert re.fullmatch(r"3\.0 MiB read, [0-9,.]+ MiB/s", bar.said[-1])
        told = bar.said[-1]
        time.sleep(0.1)
        assert bar.said[-1] == told, "the rate is that of the time in which bytes came"
    assert not bar.open


def test_no_bytes_are_told_where_nothing_comes_from_a_server(bar):
    with progress.Progress(3, "svd") as shown:
        shown.update()
        time.sleep(0.05)
    assert bar.said
    assert not any("MiB" in words for words in bar.said)


def large_and_small():
    return [WeightDelta.from_tensor(name, torch.eye(size)) for name, size in (("small", 8), ("large", 64))]


def test_the_matrix_at_work_is_told_while_it_is_read_and_solved(bar, monkeypatch):
    said = []
    with progress.Progress(2, "svd", costs=True) as shown:

        def looked(inner):
            def wrapped(*given, **named):
                shown._tell()
                said.append(bar.said[-1])
                return inner(*given, **named)

            return wrapped

        recipe = type(large_and_small()[0].recipe)
        monkeypatch.setattr(recipe, "read", looked(recipe.read))
        monkeypatch.setattr(dense, "gram_values", looked(dense.gram_values))
        for _ in spectra.decompose(large_and_small(), executor=None):
            shown.update()
    assert {"reading large (64×64)", "solving large (64×64)"} <= {words.split(", ")[-1] for words in said}
    assert at_work() == []


def test_the_time_left_is_told_before_the_first_matrix_is_done(bar, monkeypatch):
    monkeypatch.setattr(progress, "_LONG", 0.0)
    monkeypatch.setattr(decompose, "_PROBE", 64)
    with progress.Progress(2, "svd", costs=True) as shown:
        stream = decompose.decompose_indexed(large_and_small())
        monkeypatch.setattr(decompose, "_pace", lambda work: 1000.0)  # operations per second
        next(stream)
        account = shown._account
    assert account.pace == 1000.0
    fresh = Account(account.costs, account.total, pace=1000.0)
    assert fresh.left() == pytest.approx(account.total / 1000.0, abs=0.1)


def test_a_plan_tells_the_time_by_what_each_matrix_costs():
    account = Account({"large": 9.0, "small": 1.0}, 10.0, start=time.monotonic() - 90)
    assert account.left() is None, "nothing was measured and nothing is done"
    account.finish("large")
    assert account.left() == pytest.approx(10, abs=0.5), "by their number it would be 90"
    account.finish("a matrix of no cost")
    assert account.done == 9.0


def test_those_that_others_are_at_work_on_count_for_half():
    account = Account({"a": 1.0, "b": 1.0}, 2.0, start=time.monotonic() - 30)
    with in_hands("solving", "b", (2, 2)):
        account.finish("a")
    assert account.left() == pytest.approx(10, abs=0.5)  # 1.5 of 2 in 30 s


def test_the_pace_is_that_of_a_matrix_which_is_solved():
    work = decompose.Work(None, False, "cpu")
    assert 1e6 < decompose._pace(work) < 1e15


def test_what_was_read_is_in_hands_no_more_whoever_read_it():
    delta = WeightDelta.from_tensor("a", torch.eye(2))
    delta.read()
    assert at_work() == []
    with in_hands("solving", "a", (2, 2)):
        delta.read()
        assert [one.doing for one in at_work()] == ["solving"]
    with pytest.raises(KeyboardInterrupt), in_hands("reading", "a", (2, 2)):
        raise KeyboardInterrupt
    assert at_work() == []


def test_a_hostile_name_is_printed_and_a_long_one_is_cut():
    with in_hands("reading", "\x1b[31m" + "x" * 50 + "\x1b[0m", (2, 3)):
        words = progress._in_hands(at_work())
    assert "\x1b" not in words
    assert words.startswith("reading …x")
    assert words.endswith("(2×3)")


def test_a_download_of_nothing_has_no_bar(capsys):
    with progress.downloading("nothing comes"):
        pass
    assert capsys.readouterr().err == ""
