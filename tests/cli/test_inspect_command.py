"""`spectra inspect` as a user meets it."""

from __future__ import annotations

import torch
from support.checkpoints import write_adapter
from support.command_line import lora_folder, run, strict

import spectra


def test_inspect_reads_headers_only(llama, monkeypatch):
    monkeypatch.setattr(spectra.files.tensors.TensorRef, "read", None)
    out, _ = run("inspect", "ckpt")
    assert "checkpoint (llama)" in out
    assert out.endswith("ckpt: these are full weights, so ΔW needs the model it started from: pass base= (--base)\n")
    out, _ = run("inspect", "ckpt", "--base", "llama-7b")
    assert "skipped: model.norm.weight: a vector, not a matrix" in out
    document = strict(run("inspect", lora_folder(llama / "a", seed=1), "--json")[0])
    assert document["kind"] == "lora"
    assert document["dtypes"] == {"F32": 4}
    assert {matrix["max_rank"] for matrix in document["matrices"]} == {4}


def test_an_adapter_that_needs_its_base_is_no_full_weights(llama):
    module = "base_model.model.model.layers.{}.self_attn.k_proj.ia3_l"
    tensors = {module.format(layer): torch.ones(8, 1) for layer in range(2)}
    config = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    write_adapter(llama / "ia3", tensors, config)
    out, _ = run("inspect", "ia3")
    assert out.splitlines()[-1] == "ia3: ΔW of (IA)³ depends on the base weights: pass base= (--base)"
    assert [line.split() for line in out.splitlines() if line.startswith("k_proj")] == [
        ["k_proj", "2", "?", "–", "needs", "the", "base"]
    ]
    assert "ia3_l" not in out
    document = strict(run("inspect", "ia3", "--json")[0])
    assert [row["name"] for row in document["matrices"]] == [
        f"model.layers.{layer}.self_attn.k_proj.weight" for layer in range(2)
    ]
    assert "pass base=" in document["needs"]
    assert "k_proj         2  8×16" in run("inspect", "ia3", "--base", "llama-7b")[0]
