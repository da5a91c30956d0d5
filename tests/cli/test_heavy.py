"""Importing torch without the garbage collector: it is back afterwards, whatever happened."""

from __future__ import annotations

import gc

import pytest

from spectra.cli.heavy import heavy_imports


@pytest.mark.parametrize("problem", [None, ImportError])
def test_the_collector_is_off_inside_and_on_afterwards(problem):
    try:
        with heavy_imports():
            assert not gc.isenabled()
            if problem:
                raise problem
    except ImportError:
        assert problem
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
