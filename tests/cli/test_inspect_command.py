"""`spectra inspect` as a user meets it."""

from __future__ import annotations

from support.command_line import lora_folder, run, strict

import spectra


def test_inspect_reads_headers_only(llama, monkeypatch):
    monkeypatch.setattr(spectra.files.tensors.TensorRef, "read", None)
    out, _ = run("inspect", "ckpt")
    assert "checkpoint (llama)" in out
    assert "pass --base" in out
    out, _ = run("inspect", "ckpt", "--base", "llama-7b")
    assert "skipped: model.norm.weight: a vector, not a matrix" in out
    document = strict(run("inspect", lora_folder(llama / "a", seed=1), "--json")[0])
    assert document["kind"] == "lora"
    assert document["dtypes"] == {"F32": 4}
    assert {matrix["max_rank"] for matrix in document["matrices"]} == {4}
