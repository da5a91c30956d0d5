"""The storage-rounding floor: its parts against slow definitions, and the whole on real weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.checkpoints import write_checkpoint

import spectra
from spectra.deltas.rounding import _squared_ulp, rounding_edge, separable_edge

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("name", TYPES)
def test_ulp_is_the_distance_to_the_next_number(name):
    x = torch.cat([torch.randn(500).abs() * 10.0**e for e in range(-6, 4)] + [torch.tensor([1.0, 2.0, 0.5, 1e-7])])
    x = x.to(TYPES[name])
    integer = torch.int32 if name == "F32" else torch.int16
    following = (x.view(integer) + 1).view(TYPES[name])
    gap = following.double() - x.double()
    assert torch.equal(_squared_ulp(x[None].double(), name)[0], gap.square())


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.floats(0, 0.7))
def test_the_separable_edge_is_where_the_largest_singular_value_is(seed, spread):
    rng = np.random.default_rng(seed)
    a, b = (np.exp(spread * rng.standard_normal(size)) for size in (200, 300))
    draws = rng.uniform(-1, 1, (7, 200, 300)) * np.sqrt(3 * a[:, None] * b)
    edge = separable_edge(a * b.sum(), b * a.sum())
    assert np.median(np.linalg.norm(draws, 2, axis=(1, 2))) == pytest.approx(edge, rel=0.1)


def test_equal_variances_give_the_classical_edge():
    for m, n in ((50, 50), (30, 700), (1, 9)):
        found = separable_edge(np.full(m, n * 0.25), np.full(n, m * 0.25))
        assert found == pytest.approx(0.5 * (math.sqrt(m) + math.sqrt(n)), rel=1e-3)


def test_gaussian_weights_give_the_edge_of_the_hump_that_rounding_leaves():
    torch.manual_seed(0)
    base = (0.02 * torch.randn(512, 512)).to(torch.bfloat16).double()
    update = 1e-2 * torch.randn(512, 512, dtype=torch.float64) * 0.02
    tuned = (base + update).to(torch.bfloat16)
    hump = torch.linalg.matrix_norm(tuned.double() - base - update, 2)
    assert float(hump) <= rounding_edge(tuned.double(), "BF16") <= 1.08 * float(hump)


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_known_updates_merged_into_real_weights_are_recovered(real_pair, tmp_path, name):
    """Rank 8 at 1 % of the norm: the stored difference has full rank, the values above the edge are eight."""
    weights = load_file(real_pair[0] / "model.safetensors")
    torch.manual_seed(0)
    base, tuned = {}, {}
    for key in [key for key in weights if key.startswith("encoder.layer.") and weights[key].ndim == 2][::4]:
        base[key] = weights[key].to(TYPES[name])
        m, n = base[key].shape
        update = torch.randn(m, 8) @ torch.randn(8, n)
        tuned[key] = (base[key].double() + 0.01 * update.double() * base[key].double().norm() / update.norm()).to(
            TYPES[name]
        )
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    found = list(spectra.decompose(spectra.open_source(tmp_path / "tuned", tmp_path / "base"), top=12))
    assert len(found) == 9
    for spectrum in found:
        assert spectrum.rank > 300
        assert spectrum.signal_rank == 8
        assert 0 < spectrum.unmoved_share < 0.25
        # similarity does not compare directions that rounding made
        assert spectra.subspace_similarity(spectrum, spectrum, top=12).k_used == 8


def test_a_swamped_update_is_known_by_its_unchanged_entries(tmp_path):
    torch.manual_seed(0)
    base = torch.randn(256, 256).to(torch.bfloat16)
    update = 1e-3 * torch.randn(256, 256)
    write_checkpoint(tmp_path / "base", {"w": base})
    write_checkpoint(tmp_path / "tuned", {"w": (base.float() + update).to(torch.bfloat16)})
    (found,) = spectra.decompose(spectra.open_source(tmp_path / "tuned", tmp_path / "base"))
    assert found.unmoved_share > 0.6


def test_fp32_weights_have_an_edge_far_below_their_update(real_pair):
    base, tuned = real_pair
    (found, *_) = spectra.decompose(spectra.open_source(tuned, base).select("v_proj"))
    assert found.noise_edge < 1e-5 * found.S[0]
    assert found.signal_rank == found.rank


def test_no_edge_where_none_is_known():
    assert rounding_edge(torch.ones(3, 3), "F8_E4M3") is None
    assert rounding_edge(torch.ones(0, 3), "BF16") is None
    assert rounding_edge(torch.tensor([[1.0, math.nan]]), "BF16") is None
    assert rounding_edge(torch.zeros(4, 4), "BF16") > 0  # subnormal spacing, not zero


def test_one_outstanding_entry_raises_the_edge():
    torch.manual_seed(0)
    weights = 1e-3 * torch.randn(100, 100)
    plain = rounding_edge(weights.double(), "BF16")
    weights[3, 5] = 100.0
    assert rounding_edge(weights.double(), "BF16") >= max(plain, 2.0 ** (6 - 7) / 2)
