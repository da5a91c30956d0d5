"""BOFT against PEFT's own merge, with one butterfly factor as on a CPU and with several as on a GPU."""

from __future__ import annotations

import peft
import peft.tuners.boft.layer
import pytest
import torch
from support.adapters import (
    assert_an_unknown_tensor_is_refused,
    assert_needs_the_base,
    assert_one_is_refused,
    assert_recipes_keep_their_laws,
    cast,
    damaged,
    reshaped,
    without,
)
from support.peft_oracle import assert_matches, make_oracle

import spectra
from spectra.errors import SourceError

ON = {"target_modules": ["q_proj", "down_proj"]}


class Square(torch.nn.Module):
    """A convolution with a square kernel and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.two = torch.nn.Conv2d(4, 6, 3)
        self.linear = torch.nn.Linear(8, 8)
        self.double()


CASES = {
    "by size": ("llama", {"boft_block_size": 4, **ON}),
    "by number": ("bert", {"boft_block_size": 0, "boft_block_num": 2, "target_modules": ["query", "output.dense"]}),
    "odd size": (
        "bert",
        {"boft_block_size": 3, "target_modules": ["1.output.dense"], "exclude_modules": ".*attention.*"},
    ),
    "convolution": (Square, {"boft_block_size": 4, "target_modules": ["two", "linear"]}),
    "factor ignored on a CPU": ("llama", {"boft_block_size": 4, "boft_n_butterfly_factor": 2, **ON}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind if isinstance(kind, str) else kind(), peft.BOFTConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "boft"
    assert oracle.deltas
    assert_matches(source, oracle.deltas)
    assert_recipes_keep_their_laws(source, oracle.base)
    assert not source.coverage.unsupported


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """PEFT builds several factors only where its CUDA extension is; this stands in for the extension's one function."""

    class BlockDiagonal:
        @staticmethod
        def apply(blocks):
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft.tuners.boft.layer, "FastBlockDiag", BlockDiagonal)


@pytest.mark.parametrize(
    ("factors", "size", "targets"),
    [(2, 4, ["q_proj", "down_proj"]), (3, 2, ["q_proj", "down_proj"]), (4, 2, ["v_proj"])],
)
def test_several_butterfly_factors(tmp_path, as_on_a_gpu, factors, size, targets):
    config = peft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=targets)
    oracle = make_oracle(tmp_path, "llama", config)
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert_matches(source, oracle.deltas)
    assert_recipes_keep_their_laws(source, oracle.base)


@pytest.fixture
def oracle(tmp_path):
    return make_oracle(tmp_path, "llama", peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]))


def test_it_needs_the_base(oracle):
    assert_needs_the_base(oracle.adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("boft_s"), "boft_s is missing"),
        (without("boft_R"), "boft_R is missing"),
        (cast(torch.int32, "boft_R"), "not as real numbers"),
        (reshaped("boft_R", 4, 4, 4), "is not (factors, blocks, size, size)"),
        (reshaped("boft_R", 1, 4, 4, 3), "is not (factors, blocks, size, size)"),
        (reshaped("boft_R", 0, 4, 4, 4), "is not (factors, blocks, size, size)"),
        (reshaped("boft_R", 1, 3, 4, 4), "do not fit the base weight"),
        (reshaped("boft_s", 15, 1), "do not fit the base weight"),
        (reshaped("boft_R", 4, 4, 4, 4), "4 butterfly factors do not pair its blocks"),
        (reshaped("boft_R", 1, 2, 8, 8), "the config says boft_block_size = 4"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter, oracle.base), reason)


def test_a_tensor_that_is_not_known_is_refused(oracle):
    assert_an_unknown_tensor_is_refused(oracle.adapter, oracle.base)


def test_a_contradicting_config_is_named(oracle):
    damaged(oracle.adapter, config={"peft_type": "OFT"})
    with pytest.raises(SourceError, match="those of BOFT"):
        spectra.open_source(oracle.adapter, oracle.base)
