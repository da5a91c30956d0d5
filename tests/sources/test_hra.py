"""HRA against PEFT's own merge: rank r as factors, with and without Gram–Schmidt."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.adapters import (
    assert_needs_the_base,
    assert_one_is_refused,
    assert_recipes_keep_their_laws,
    cast,
    damaged,
    reshaped,
)
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import SourceError


class Square(torch.nn.Module):
    """A convolution with a square kernel and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.two = torch.nn.Conv2d(4, 6, 3)
        self.linear = torch.nn.Linear(8, 8)
        self.double()


CASES = {
    "llama": ("llama", {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "one": ("bert", {"r": 1, "target_modules": ["query"]}),
    "convolution": (Square, {"r": 4, "target_modules": ["two", "linear"]}),
    "more than the inputs": ("llama", {"r": 18, "target_modules": ["q_proj"]}),
}


# 18 vectors in 16 dimensions cannot be orthogonal: PEFT gives noise there, and we an error (below).
RUNS = [(case, flag) for case in CASES for flag in (False, True) if (case, flag) != ("more than the inputs", True)]


@pytest.mark.parametrize(("case", "orthogonalised"), RUNS)
def test_equals_pefts_merge_minus_base(case, orthogonalised, tmp_path):
    kind, options = CASES[case]
    config = peft.HRAConfig(**options, apply_GS=orthogonalised)
    oracle = make_oracle(tmp_path, kind if isinstance(kind, str) else kind(), config)
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "hra"
    assert oracle.deltas
    assert_matches(source, oracle.deltas)
    assert_recipes_keep_their_laws(source, oracle.base)
    assert all(delta.factored for delta in source)
    assert {delta.max_rank for delta in source} <= {options["r"], min(*source.deltas[0].shape)}


@pytest.fixture
def oracle(tmp_path):
    return make_oracle(tmp_path, "llama", peft.HRAConfig(r=4, target_modules=["q_proj"]))


def test_pairs_of_equal_reflections_cancel(oracle):
    # PEFT's start: each vector twice, so that H = I.
    def twice(tensors):
        return {"hra_u": tensors["hra_u"][:, :2].repeat_interleave(2, 1)}

    damaged(oracle.adapter, twice)
    delta = spectra.open_source(oracle.adapter, oracle.base)["model.layers.0.self_attn.q_proj.weight"]
    assert float(delta.read().to_dense().abs().max()) < 1e-15 * float(delta.read().base_norm) * 10


@pytest.mark.parametrize("change", [lambda u: u[:, :2].repeat(1, 2), lambda u: torch.ones(16, 4).double()])
def test_dependent_vectors_have_no_gram_schmidt_basis(oracle, change):
    damaged(oracle.adapter, lambda t: {"hra_u": change(t["hra_u"])}, {"apply_GS": True})
    found = {s.layer: s for s in spectra.decompose(spectra.open_source(oracle.adapter, oracle.base))}
    assert found[0].status == "unreadable"
    assert "linearly dependent" in found[0].reason
    assert found[1].status == "ok"


def test_more_vectors_than_inputs_have_no_gram_schmidt_basis(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.HRAConfig(r=18, target_modules=["q_proj"]))
    damaged(oracle.adapter, config={"apply_GS": True})
    for spectrum in spectra.decompose(spectra.open_source(oracle.adapter, oracle.base)):
        assert "linearly dependent" in spectrum.reason


def test_a_vector_of_zeros_gives_no_number(oracle):
    damaged(oracle.adapter, lambda t: {"hra_u": t["hra_u"] * torch.tensor([1.0, 0.0, 1.0, 1.0])})
    found = {s.layer: s for s in spectra.decompose(spectra.open_source(oracle.adapter, oracle.base))}
    assert found[0].status == "nonfinite"


def test_it_needs_the_base(oracle):
    assert_needs_the_base(oracle.adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cast(torch.int64, "hra_u"), "not as real numbers"),
        (reshaped("hra_u", 4, 16), "does not reflect the inputs"),
        (reshaped("hra_u", 16), "does not reflect the inputs"),
        (reshaped("hra_u", 16, 3), "the config says r = 4"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter, oracle.base), reason)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"r": 0}, "r = 0"), ({"apply_GS": None}, "apply_GS = None"), ({"peft_type": "LORA"}, "those of HRA")],
)
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter, oracle.base)


def test_the_factors_are_not_the_product(oracle):
    (delta, _) = spectra.open_source(oracle.adapter, oracle.base)
    form = delta.read()
    assert form.left.shape == (16, 4)
    assert form.right.shape == (4, 16)
    vectors = load_file(oracle.adapter / "adapter_model.safetensors")
    first = next(tensor for name, tensor in vectors.items() if ".0." in name)
    assert torch.allclose(form.right, (first / first.norm(dim=0)).T, rtol=0, atol=1e-15)
