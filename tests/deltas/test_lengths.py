"""‖W₀‖_F of entries whose squares float64 does not hold."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.deltas.forms import LowRank
from spectra.deltas.lengths import frobenius


@pytest.mark.parametrize("exponent", [-1060, -600, -300, 0, 300, 600, 1020])
def test_it_is_that_of_the_matrix_near_one(exponent):
    near = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round(decimals=2)
    half = exponent // 2
    far = near * 2.0**half * 2.0 ** (exponent - half)
    expected = float(near.norm()) * 2.0**half * 2.0 ** (exponent - half)
    assert frobenius(far) == pytest.approx(expected, rel=1e-3 if exponent < -1000 else 1e-13)


def test_nothing_and_what_is_no_number():
    assert frobenius(torch.zeros(3, 3)) == frobenius(torch.zeros(0, 3)) == 0.0
    assert frobenius(torch.full((2, 2), torch.inf)) == torch.inf


@pytest.mark.parametrize("exponent", [-600, 600])
def test_the_relative_norm_is_not_lost(tmp_path, exponent):
    name, generator = "model.layers.0.self_attn.q_proj.weight", torch.Generator().manual_seed(0)
    base, update = (torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in "bu")
    for folder, matrix in (("base", base), ("tuned", base + update)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text('{"model_type": "llama"}')
        save_file({name: matrix * 2.0**exponent}, tmp_path / folder / "model.safetensors")
    source = spectra.open_source(tmp_path / "tuned", tmp_path / "base")
    (row,) = spectra.summarize(list(spectra.decompose(source))).to_dict("records")
    assert row["relative_norm"] == pytest.approx(float(update.norm() / base.norm()))
    factors = LowRank(update[:, :2], torch.eye(2, 8, dtype=torch.float64))
    beside = factors.beside(base * 2.0**exponent)
    assert beside.base_norm == pytest.approx(float(base.norm()) * 2.0**exponent)
