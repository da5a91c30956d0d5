"""Every format's update is formed and solved on a card as on the CPU, and no tensor is left in the other memory."""

from __future__ import annotations

import numpy as np
import pytest
from support.card import card_of
from support.examples import EXAMPLES

import spectra


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_the_update_is_the_same_on_a_card(kind, tmp_path, monkeypatch):
    oracle = EXAMPLES[kind](tmp_path)
    source = spectra.open_source(oracle.adapter, oracle.base)
    expected = {spectrum.name: spectrum for spectrum in spectra.decompose(source, top=2, device="cpu")}
    with card_of(monkeypatch) as card:
        found = {spectrum.name: spectrum for spectrum in spectra.decompose(source, top=2, device="cuda")}
    assert (card.misuses, card.used) == ([], 0)
    assert card.counts["uploads"] >= len(expected) == len(found)
    for name, spectrum in found.items():
        there = expected[name]
        assert (spectrum.status, spectrum.method, spectrum.k) == (there.status, there.method, there.k)
        np.testing.assert_allclose(spectrum.S, there.S, atol=1e-7 * there.S[0])
