"""The pause in looking for garbage ends as it began."""

from __future__ import annotations

import gc

import pytest

import spectra
from spectra.garbage import not_looked_for


@pytest.mark.parametrize("before", [True, False])
def test_it_is_as_it_was_afterwards_whatever_happened_inside(before):
    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with not_looked_for(), not_looked_for():
            assert not gc.isenabled()
        assert gc.isenabled() == before
        with pytest.raises(ZeroDivisionError), not_looked_for():
            raise ZeroDivisionError
        assert gc.isenabled() == before
    finally:
        (gc.enable if was else gc.disable)()


def test_a_table_of_spectra_that_are_computed_on_the_way_is_made_with_garbage_looked_for():
    seen = []

    def stream():
        for name in "ab":
            seen.append(gc.isenabled())
            yield spectra.Spectrum(name, (2, 2), S=[4.0, 3.0])

    assert len(spectra.summarize(stream())) == 2
    assert seen == [True, True]
