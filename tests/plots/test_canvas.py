"""A figure is drawn once for each format that it is saved in, and afterwards it is what it was."""

from __future__ import annotations

import errno
import os
from io import BytesIO

import pytest
from matplotlib.figure import Figure

from spectra import plots
from spectra.errors import StoreError
from spectra.plots.canvas import ShownFigure
from spectra.plots.figures import _DPI, save_figure
from spectra.plots.style import look
from spectra.spectrum import Spectrum


def histogram():
    return plots.histogram_figure([Spectrum("layers.0.v_proj.weight", (3, 3), S=[3.0, 2.0, 1.0])])


@pytest.fixture
def figure():
    return histogram()


@pytest.fixture
def drawn(monkeypatch):
    """A line for each drawing, those that matplotlib makes for the layout alone included."""
    seen = []
    draw = Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda self, renderer: seen.append(type(renderer)) or draw(self, renderer))
    return seen


def test_png_and_pdf_are_two_drawings(figure, drawn, tmp_path):
    engine = figure.get_layout_engine()
    assert engine is not None
    save_figure(figure, tmp_path / "it")
    assert len(drawn) == 2
    assert figure.get_layout_engine() is engine
    figure.savefig(BytesIO(), format="pdf")
    assert len(drawn) == 4, "matplotlib's way draws one that has an engine twice"


@pytest.mark.parametrize(
    ("formats", "drawings"), [(["png"], 1), (["png", "svg", "pdf"], 3), (["pdf"], 2), (["svg", "png"], 3)]
)
def test_only_a_first_format_other_than_png_takes_one_drawing_more(figure, drawn, tmp_path, formats, drawings):
    save_figure(figure, tmp_path / "it", formats)
    assert len(drawn) == drawings


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_what_is_saved_is_what_matplotlib_saves(tmp_path, kind):
    (written,) = save_figure(histogram(), tmp_path / "it", [kind])
    wanted = BytesIO()
    with look():
        histogram().savefig(wanted, format=kind, dpi=_DPI, metadata={"CreationDate": None} if kind == "pdf" else None)
    assert written.read_bytes() == wanted.getvalue()


@pytest.mark.parametrize("formats", [["png", "pdf"], ["pdf", "png"]])
def test_the_engine_is_back_when_writing_fails(figure, tmp_path, monkeypatch, formats):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    engine, canvas, dpi = figure.get_layout_engine(), figure.canvas, figure.dpi
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match="No space left on device"):
        save_figure(figure, tmp_path / "it", formats)
    assert figure.get_layout_engine() is engine
    assert (figure.canvas, figure.dpi) == (canvas, dpi)


def test_the_figure_is_itself_again_when_its_layout_fails(figure, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no layout")

    engine, canvas, dpi = figure.get_layout_engine(), figure.canvas, figure.dpi
    monkeypatch.setattr(type(engine), "execute", broken)
    with pytest.raises(ValueError, match="no layout"):
        save_figure(figure, tmp_path / "it")
    assert figure.get_layout_engine() is engine
    assert (figure.canvas, figure.dpi) == (canvas, dpi)


def test_a_figure_without_an_engine_gets_none(drawn, tmp_path):
    figure = ShownFigure(text=8, layout="none")
    figure.subplots().plot([1, 2])
    save_figure(figure, tmp_path / "it")
    assert len(drawn) == 2
    assert figure.get_layout_engine() is None
