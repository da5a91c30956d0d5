"""WaveFT with the Haar wavelet, its default, and without a transform, against PEFT's own merge."""

from __future__ import annotations

import peft
import pytest
import torch
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


class OddSides(torch.nn.Module):
    """Linear layers with an odd number of inputs, of outputs, and of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = torch.nn.Linear(7, 6), torch.nn.Linear(6, 9), torch.nn.Linear(5, 7)
        self.double()


CASES = {
    "haar": ("llama", {"n_frequency": 40, "scaling": 3.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "few": ("bert", {"n_frequency": 3, "random_loc_seed": 5, "target_modules": ["query"]}),
    "no transform": ("llama", {"n_frequency": 30, "use_idwt": False, "target_modules": ["q_proj", "down_proj"]}),
    "no transform, any wavelet": (
        "llama",
        {"n_frequency": 9, "use_idwt": False, "wavelet_family": "sym4", "target_modules": ["q_proj"]},
    ),
    "conv1d": ("gpt2", {"n_frequency": 50, "fan_in_fan_out": True, "target_modules": ["c_fc", "c_proj"]}),
    "odd sides": (OddSides, {"n_frequency": 20, "target_modules": ["a", "b", "c"]}),
    "pattern": (
        "llama",
        {"n_frequency": 9, "n_frequency_pattern": {"v_proj": 4}, "target_modules": ["q_proj", "v_proj"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind if isinstance(kind, str) else kind(), peft.WaveFTConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "waveft"
    assert oracle.deltas
    # PEFT's Haar filters are written with 16 digits, four of which are multiplied.
    assert_matches(source, oracle.deltas, 1e-12)
    assert_recipes_keep_their_laws(source, None if kind == "gpt2" else oracle.base)
    assert not source.coverage.unsupported


@pytest.fixture
def oracle(tmp_path):
    return make_oracle(tmp_path, "llama", peft.WaveFTConfig(n_frequency=30, target_modules=["q_proj"]))


def test_it_needs_the_base(oracle):
    assert_needs_the_base(oracle.adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cast(torch.int32, "waveft_spectrum"), "not as real numbers"),
        (reshaped("waveft_spectrum", 5, 6), "does not fit"),
        (reshaped("waveft_spectrum", 257), "does not fit"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter, oracle.base), reason)


def test_another_wavelet_is_refused(oracle):
    damaged(oracle.adapter, config={"wavelet_family": "db2"})
    reasons = spectra.open_source(oracle.adapter, oracle.base).coverage.unsupported
    assert len(reasons) == 2
    assert all("the wavelet 'db2'" in reason for reason in reasons.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"random_loc_seed": "777"}, "random_loc_seed = '777'"),
        ({"random_loc_seed": -1}, "random_loc_seed = -1"),
        ({"random_loc_seed": 2**70}, "is no seed"),
        ({"scaling": None}, "scaling = None"),
        ({"use_idwt": None}, "use_idwt = None"),
        ({"peft_type": "FOURIERFT"}, "those of WaveFT"),
    ],
)
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter, oracle.base)
