"""`inspect` from Python: what lies at a path, without reading a tensor."""

from __future__ import annotations

import json

import pytest
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import lora_folder, run

import spectra
from spectra.errors import NotFoundError
from spectra.files.tensors import TensorRef
from spectra.printing import strict


@pytest.fixture
def pair(tmp_path, monkeypatch):
    base = llama_tensors()
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", nudged(base))
    monkeypatch.setattr(TensorRef, "read", None)
    return tmp_path


def test_full_weights_alone_are_listed_and_are_no_update(pair):
    found = spectra.inspect(pair / "tuned")
    assert (found.kind, found.source) == ("checkpoint", None)
    stored = {name for name, tensor in llama_tensors().items() if tensor.ndim == 2}
    assert {row["name"] for row in found.matrices} == stored
    assert "coverage" not in found.to_dict()


def test_with_a_base_it_is_the_source(pair):
    found = spectra.inspect(pair / "tuned", pair / "base")
    source = spectra.open_source(pair / "tuned", pair / "base")
    assert [row["name"] for row in found.matrices] == list(source.names)
    assert sum(row["matrices"] for row in found.by_role) == len(source)
    v_proj = next(row for row in found.by_role if row["role"] == "v_proj")
    assert v_proj == {"role": "v_proj", "shape": (8, 16), "max_rank": 8, "status": "ok", "matrices": 2}
    document = found.to_dict()
    tensors = llama_tensors().values()
    assert document["tensors"] == len(tensors)
    assert document["parameters"] == sum(tensor.numel() for tensor in tensors)
    assert document["bytes"] == 4 * document["parameters"]
    assert document["coverage"]["skipped"] == dict(source.coverage.skipped)


def test_an_adapter_needs_no_base_and_the_command_prints_the_same(pair):
    folder = lora_folder(pair / "lora", seed=1)
    found = spectra.inspect(folder)
    assert {row["max_rank"] for row in found.matrices} == {4}
    assert json.loads(run("inspect", folder, "--json")[0]) == strict(found.to_dict())
    assert repr(found) == f"Inspection({folder}, lora, 4 tensors)"
    assert "<td" in found._repr_html_()


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(NotFoundError, match="was not found"):
        spectra.inspect(tmp_path / "nothing")
