"""The hub of the tests about models on servers."""

from __future__ import annotations

import pytest
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.hub_server import HubServer
from support.remote_models import SHARDS, TOKEN, larger

from spectra.files import patience


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The hub with org/base and org/tuned, three shards each, whose copies lie in `base` and `tuned`."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(patience, "PATIENCE", 2.0)
    base = larger(llama_tensors())
    write_checkpoint(tmp_path / "base", base, shards=SHARDS)
    write_checkpoint(tmp_path / "tuned", nudged(base), shards=SHARDS)
    with HubServer() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        running.add("org/base", tmp_path / "base")
        running.add("org/tuned", tmp_path / "tuned")
        yield running
