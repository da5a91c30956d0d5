"""A pair whose weights have nothing to do with each other is said, counted and, where it is cheap, explained."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import llama_tensors, nudged, write_checkpoint

import spectra
from spectra.results.relation import unrelated
from spectra.results.tables import row

Q = "model.layers.0.self_attn.q_proj.weight"


def _warning(tmp_path, change):
    base = llama_tensors()
    folders = [write_checkpoint(tmp_path / name, item) for name, item in (("base", base), ("tuned", change(base)))]
    source = spectra.open_source(folders[1], folders[0])
    rows = [row(spectrum) for spectrum in spectra.decompose(source)]
    return unrelated(source, rows), {line["name"]: line for line in rows}


def test_a_fine_tune_has_a_cosine_near_one_and_no_warning(tmp_path):
    said, rows = _warning(tmp_path, nudged)
    assert said == ""
    base, tuned = llama_tensors()[Q].double(), nudged(llama_tensors())[Q].double()
    expected = torch.nn.functional.cosine_similarity(base.flatten(), tuned.flatten(), dim=0)
    assert rows[Q]["base_cosine"] == pytest.approx(float(expected), abs=1e-12)
    assert "unrelated" not in rows[Q]["note"]


def test_a_transposed_square_weight_is_told(tmp_path):
    said, rows = _warning(tmp_path, lambda base: base | {Q: base[Q].T.contiguous()})
    assert said.startswith(f"1 of {len(rows)} matrices is unrelated to the base")
    assert Q in said
    assert "transposed" in said
    assert "no update here" in rows[Q]["note"]


def test_another_model_is_counted(tmp_path):
    def other(base):
        generator = torch.Generator().manual_seed(7)
        return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}

    said, rows = _warning(tmp_path, other)
    assert "another model" in said
    assert said.startswith(f"{len(rows)} of {len(rows)} matrices are unrelated")


def test_an_adapter_may_change_a_weight_as_it_likes(tmp_path):
    delta = spectra.WeightDelta.from_tensor("a.weight", torch.eye(2))
    assert unrelated(spectra.Source("lora", (delta,)), [{"name": "a.weight", "base_cosine": -1.0}]) == ""


def test_whatever_is_made_of_a_wrong_base_says_so(tmp_path):
    """Two models against one wrong base agree in everything: what they share is the base."""
    base = llama_tensors(layers=1)
    folders = [write_checkpoint(tmp_path / name, nudged(base, seed)) for seed, name in enumerate(("a", "b"))]
    right = write_checkpoint(tmp_path / "right", base)
    wrong = write_checkpoint(tmp_path / "wrong", llama_tensors(layers=1, seed=9))
    for where, expected in ((right, False), (wrong, True)):
        one, other = (spectra.open_source(folder, where).select("v_proj") for folder in folders)
        (compared,) = spectra.compare(one, other, top=2)
        assert ("first and second update unrelated to the base" in compared.note) == expected
        assert ("unrelated" in spectra.pool_by_role([compared])[0].note) == expected
        plan = spectra.extract(one, tmp_path / f"lora-{where.name}", rank=2)
        for frame in (spectra.alignment(one, k=2), spectra.interference([one, other]), plan):
            assert ("unrelated to the base weight" in frame["note"][0]) == expected
        by_energy = spectra.extract(one, tmp_path / f"energy-{where.name}", energy=0.5)
        assert ("unrelated to the base weight" in by_energy["note"][0]) == expected
