"""C3A against PEFT's own merge."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from support.adapters import assert_an_unknown_tensor_is_refused
from support.checkpoints import write_adapter
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import SourceError

# PEFT transforms in float32 whatever the model's dtype.
TOLERANCE = 1e-6
CASES = {
    "llama": ("llama", {"block_size": 4, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "patterns": (
        "bert",
        {"block_size": 8, "target_modules": ["query", "value"], "block_size_pattern": {"0.attention.self.query": 2}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind, peft.C3AConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "c3a"
    assert_matches(source, oracle.deltas, TOLERANCE)
    assert not source.coverage.unsupported
    assert source.deltas[0].read().base_norm > 0
    alone = spectra.open_source(oracle.adapter)
    assert_matches(alone, oracle.deltas, TOLERANCE)
    delta = alone.deltas[0]
    assert torch.equal(pickle.loads(pickle.dumps(delta)).read().to_dense(), delta.read().to_dense())


CONFIG = {"peft_type": "C3A", "block_size": 3}


def kernels(layer, tensor):
    return {f"base_model.model.model.layers.{layer}.self_attn.q_proj.c3a_kernel": tensor}


def test_entry_by_entry_in_float64(tmp_path):
    w = torch.randn(2, 4, 3, dtype=torch.float64)
    write_adapter(tmp_path, kernels(0, w), CONFIG)
    (delta,) = spectra.open_source(tmp_path)
    slow = [[w[p // 3, q // 3, (q % 3 - p % 3) % 3] / 12 for q in range(12)] for p in range(6)]
    assert torch.equal(delta.read().to_dense(), torch.tensor(slow, dtype=torch.float64))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.randn(2, 4, 2), "block_size = 3"),
        (torch.randn(2, 12), "is not (out/b, in/b, b)"),
        (torch.ones(2, 4, 3, dtype=torch.int32), "not as real numbers"),
    ],
)
def test_kernels_that_do_not_fit_are_refused_and_the_others_are_done(tmp_path, tensor, reason):
    write_adapter(tmp_path, kernels(0, tensor) | kernels(1, torch.randn(2, 4, 3)), CONFIG)
    source = spectra.open_source(tmp_path)
    assert reason in source.coverage.unsupported["model.layers.0.self_attn.q_proj.weight"]
    assert source["model.layers.1.self_attn.q_proj.weight"].read().shape == (6, 12)


def test_a_tensor_that_is_not_known_is_refused(tmp_path):
    write_adapter(tmp_path, kernels(0, torch.randn(2, 4, 3)) | kernels(1, torch.randn(2, 4, 3)), CONFIG)
    assert_an_unknown_tensor_is_refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"block_size_pattern": [1]}, "not an object"), ({"peft_type": "SHIRA"}, "says peft_type 'SHIRA', the tensors")],
)
def test_an_unusable_config_is_named(tmp_path, change, message):
    write_adapter(tmp_path, kernels(0, torch.randn(2, 4, 3)), CONFIG | change)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(tmp_path)
