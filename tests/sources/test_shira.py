"""SHiRA against PEFT's own merge."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from support.checkpoints import write_adapter, write_checkpoint
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import BaseRequiredError, SourceError

CASES = {
    "llama": ("llama", {"r": 2, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "bert": ("bert", {"r": 1, "target_modules": ["query", "dense"], "random_seed": 5}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.ShiraConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "shira"
    assert_matches(source, oracle.deltas)
    assert not source.coverage.unsupported
    assert not source.coverage.tuned_only
    delta = source.deltas[0]
    assert torch.equal(pickle.loads(pickle.dumps(delta)).read().to_dense(), delta.read().to_dense())
    with pytest.raises(BaseRequiredError, match="shapes of the weights"):
        spectra.open_source(oracle.adapter)


CONFIG = {"peft_type": "SHIRA", "r": 1}
WEIGHT = "model.layers.{}.self_attn.q_proj.weight"


def entries(layer, weight, indices):
    module = f"base_model.model.{WEIGHT.format(layer).removesuffix('.weight')}"
    stored = {"shira_weight": weight, "shira_indices": indices}
    return {f"{module}.{slot}": tensor for slot, tensor in stored.items() if tensor is not None}


def opened(tmp_path, tensors, config=CONFIG):
    write_adapter(tmp_path / "adapter", tensors, config)
    weights = {WEIGHT.format(layer): torch.randn(4, 5) for layer in (0, 1)}
    return spectra.open_source(tmp_path / "adapter", write_checkpoint(tmp_path / "base", weights))


def test_positions_as_windows_saves_them_and_one_that_occurs_twice(tmp_path):
    (delta,) = opened(
        tmp_path, entries(0, torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[0.0, 3.0, 0.0], [1.0, 4.0, 1.0]]))
    )
    expected = torch.zeros(4, 5, dtype=torch.float64)
    expected[0, 1], expected[3, 4] = 5.0, 2.0
    assert torch.equal(delta.read().to_dense(), expected)
    assert delta.max_rank == 3


PLACES = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("weight", "indices", "reason"),
    [
        (torch.randn(2), None, "shira_indices of"),
        (None, PLACES, "shira_weight is missing"),
        (torch.randn(3), PLACES, "two numbers for each"),
        (torch.randn(2, 1), PLACES, "two numbers for each"),
        (torch.ones(2, dtype=torch.int64), PLACES, "not as real numbers"),
        (torch.randn(2), PLACES.bool(), "not as positions"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused_and_the_others_are_done(tmp_path, weight, indices, reason):
    source = opened(tmp_path, entries(0, weight, indices) | entries(1, torch.randn(2), PLACES.clone()))
    assert reason in source.coverage.unsupported[WEIGHT.format(0)]
    assert source[WEIGHT.format(1)].read().shape == (4, 5)


@pytest.mark.parametrize("place", [[4, 0], [0, 5], [-1, 0]])
def test_a_position_outside_the_weight_is_an_error_of_that_matrix(tmp_path, place):
    outside = torch.tensor(place, dtype=torch.int32)[:, None]
    source = opened(tmp_path, entries(0, torch.randn(1), outside) | entries(1, torch.randn(2), PLACES))
    with pytest.raises(SourceError, match="points outside"):
        source[WEIGHT.format(0)].read()
    assert {s.name: s.status for s in spectra.decompose(source)} == {
        WEIGHT.format(0): "unreadable",
        WEIGHT.format(1): "ok",
    }


def test_another_declared_type_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="says peft_type 'LORA', the tensors"):
        opened(tmp_path, entries(0, torch.randn(2), PLACES), {"peft_type": "LORA"})
