"""The bar tells the bytes that come from servers, also while one matrix takes long."""

from __future__ import annotations

import time

import pytest

from spectra.cli import progress
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
        while not bar.said and time.monotonic() < until:
            time.sleep(0.01)
        assert bar.said[-1].startswith("3.0 MiB read, ")
        assert bar.said[-1].endswith(" MiB/s")
        told = bar.said[-1]
        time.sleep(0.1)
        assert bar.said[-1] == told, "the rate is that of the time in which bytes came"
    assert not bar.open


def test_nothing_is_told_where_nothing_comes_from_a_server(bar):
    with progress.Progress(3, "svd") as shown:
        shown.update()
        time.sleep(0.05)
    assert not bar.said


def test_a_download_of_nothing_has_no_bar(capsys):
    with progress.downloading("nothing comes"):
        pass
    assert capsys.readouterr().err == ""
