"""VB-LoRA against PEFT's own merge, in both of its layouts."""

from __future__ import annotations

import json
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import write_adapter
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import SourceError

BANK = {"r": 3, "num_vectors": 9, "vector_length": 4}
CASES = {
    "llama": ("llama", {**BANK, "topk": 2, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "conv1d": ("gpt2", {**BANK, "topk": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "one vector": ("bert", {**BANK, "topk": 1, "target_modules": ["query"]}),
}


@pytest.mark.parametrize("only_topk", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, only_topk, tmp_path):
    kind, options = CASES[case]
    config = peft.VBLoRAConfig(**options, save_only_topk_weights=only_topk)
    oracle = make_oracle(tmp_path, kind, config)
    stored = load_file(oracle.adapter / "adapter_model.safetensors")
    assert any("topk_indices" in name for name in stored) == only_topk
    source = spectra.open_source(oracle.adapter, oracle.base, split=False)
    assert source.kind == "vblora"
    assert_matches(source, oracle.deltas)
    assert not source.coverage.unsupported
    assert {(delta.factored, delta.max_rank) for delta in source} == {(True, 3)}
    alone = spectra.open_source(oracle.adapter).deltas[0]
    assert torch.equal(pickle.loads(pickle.dumps(alone)).read().to_dense(), alone.read().to_dense())


CONFIG = {"peft_type": "VBLORA", "r": 2, "topk": 2, "num_vectors": 5, "vector_length": 3}
MODULE = "base_model.model.model.layers.{}.self_attn.q_proj"
WEIGHT = "model.layers.{}.self_attn.q_proj.weight"
NAME = MODULE.format(0) + ".vblora_logits_A"


def logits(layer, **changes):
    shapes = {"A": (2, 4, 5), "B": (3, 2, 5)} | changes
    return {f"{MODULE.format(layer)}.vblora_logits_{side}": torch.randn(shape) for side, shape in shapes.items()}


def opened(tmp_path, tensors, config=CONFIG, bank=(5, 3)):
    write_adapter(tmp_path, tensors | {"base_model.vblora_vector_bank": torch.randn(bank)}, config)
    return spectra.open_source(tmp_path)


def mixture(indices, weights):
    return {f"{NAME}_topk_indices": indices, f"{NAME}_topk_weights": weights, **only(logits(0), "B")}


def only(tensors, side):
    return {name: tensor for name, tensor in tensors.items() if name.endswith(side)}


INDICES = torch.randint(0, 5, (2, 4, 2)).to(torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (only(logits(0), "A"), "vblora_logits_B is missing"),
        (logits(0, A=(3, 4, 5)), "are not (r, in/v) and (out/v, r)"),
        (logits(0, A=(3, 4, 5), B=(3, 3, 5)), "the config says r = 2"),
        (logits(0, A=(2, 4, 6)), "from which 2 vectors can be taken"),
        ({name: tensor.int() for name, tensor in logits(0).items()}, "not as real numbers"),
        (mixture(INDICES.float(), torch.rand(2, 4, 1)), "are not 2 whole numbers"),
        (mixture(INDICES[..., :1], torch.rand(2, 4, 1)), "are not 2 whole numbers"),
        (mixture(INDICES, torch.rand(2, 4, 2)), "do not fit the indices"),
        (mixture(INDICES, torch.rand(2, 4, 1)) | logits(0), "both as logits and as the mixture"),
        ({f"{NAME}_topk_weights": torch.rand(2, 4, 1)} | only(logits(0), "B"), "topk_indices is missing"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused_and_the_others_are_done(tmp_path, tensors, reason):
    source = opened(tmp_path, logits(1) | tensors)
    assert reason in source.coverage.unsupported[WEIGHT.format(0)]
    assert source[WEIGHT.format(1)].read().shape == (9, 12)


def test_an_index_outside_the_bank_is_an_error_of_that_matrix(tmp_path):
    source = opened(tmp_path, logits(1) | mixture(INDICES + 5, torch.rand(2, 4, 1)))
    with pytest.raises(SourceError, match="points outside the bank"):
        source[WEIGHT.format(0)].read()
    assert source[WEIGHT.format(1)].read().shape == (9, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 0}, "topk = 0"),
        ({"topk": None}, "topk = None"),
        ({"peft_type": "VERA"}, "says peft_type 'VERA', the tensors"),
    ],
)
def test_an_unusable_config_is_named(tmp_path, change, message):
    with pytest.raises(SourceError, match=message):
        opened(tmp_path, logits(0), CONFIG | change)


def test_more_vectors_than_there_are_and_a_missing_bank(tmp_path):
    source = opened(tmp_path / "six", logits(0), CONFIG | {"topk": 6})
    assert "6 vectors can be taken" in source.coverage.unsupported[WEIGHT.format(0)]
    write_adapter(tmp_path / "none", logits(0), CONFIG)
    with pytest.raises(SourceError, match="vblora_vector_bank, is missing"):
        spectra.open_source(tmp_path / "none")
    (tmp_path / "six" / "adapter_config.json").write_text(json.dumps([]))
    with pytest.raises(SourceError, match="not an object"):
        spectra.open_source(tmp_path / "six")
