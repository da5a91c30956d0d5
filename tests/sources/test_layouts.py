"""Layouts that people have of formats with an example of their own: right, listed without reading, small."""

from __future__ import annotations

import pickle

import pytest
from support.layouts import LAYOUTS
from support.peft_oracle import assert_matches

import spectra
from spectra.files.tensors import TensorRef


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_update_is_the_oracles_and_listing_reads_nothing(layout, tmp_path, monkeypatch):
    oracle = LAYOUTS[layout](tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(TensorRef, "read", None)
        source = spectra.open_source(oracle.adapter, oracle.base)
        str(source.coverage)
    assert not source.coverage.unsupported
    unchanged = {delta.name for delta in source if delta.name not in oracle.deltas}
    assert all(not delta.read().to_dense().any() for delta in source if delta.name in unchanged)
    assert not unchanged or layout == "lora-in-a-dump"
    changed = [delta for delta in source if delta.name in oracle.deltas]
    assert_matches(changed, oracle.deltas)
    for delta in changed:
        packed = pickle.dumps(delta)
        assert len(packed) < 10_000
        assert pickle.loads(packed) == delta
