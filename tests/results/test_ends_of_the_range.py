"""Updates and bases near the ends of float64, whose squares leave it: the numbers are those of the same near 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.checkpoints import write_checkpoint

import spectra
from spectra.deltas.delta import WeightDelta
from spectra.deltas.separable import separable_edges

NAME = "model.layers.0.self_attn.v_proj.weight"
EXPONENTS = [-1030, -600, 600, 1000]
OF_SIZE = {"norms", "sti_raw"}


def matrices():
    generator = torch.Generator().manual_seed(0)
    base, update = (torch.randn((9, 7), generator=generator, dtype=torch.float64) for _ in range(2))
    return [(it * 2**30).round() / 2**30 for it in (base, update / 8)]  # sums and their multiples are exact


def aligned(folder, base, update):
    write_checkpoint(folder / "base", {NAME: base})
    write_checkpoint(folder / "tuned", {NAME: base + update})
    return spectra.alignment(spectra.open_source(folder / "tuned", folder / "base"), k=3).iloc[0]


def shifted(matrix, exponent):
    half = exponent // 2
    return matrix * 2.0**half * 2.0 ** (exponent - half)


def same(found, expected):
    return np.allclose(np.asarray(found, float), np.asarray(expected, float), rtol=1e-7, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_alignment_of_both_at_an_end(exponent, tmp_path):
    base, update = matrices()
    plain = aligned(tmp_path / "near", base, update)
    found = aligned(tmp_path / "far", shifted(base, exponent), shifted(update, exponent))
    assert found["status"] == "ok", found["reason"]
    for column in spectra.ALIGNMENT:
        assert same(found[column], plain[column]), column


@pytest.mark.parametrize("exponent", [-600, 600])
def test_alignment_of_an_update_that_is_nothing_like_its_base(exponent, tmp_path):
    """Half of the base is zero, and there the update is tiny beside the rest, or huge."""
    base, update = matrices()
    base[:, 3:], update[:, :3] = 0, 0
    found = aligned(tmp_path, base, shifted(update, exponent))
    assert found["status"] == "ok", found["reason"]
    U = np.linalg.svd(base.numpy())[0][:, :3]
    expected = np.linalg.norm(U.T @ update.numpy()) ** 2 / np.linalg.norm(update.numpy()) ** 2
    assert found["left_in_top"] == pytest.approx(expected)
    assert found["right_in_top"] == pytest.approx(0, abs=1e-20)


def deltas(*updates):
    return [[WeightDelta.from_tensor(NAME, update)] for update in updates]


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_interference_at_an_end(exponent):
    one, two = matrices()
    plain = spectra.interference(deltas(one, two)).iloc[0]
    found = spectra.interference(deltas(*(shifted(it, exponent) for it in (one, two)))).iloc[0]
    assert found["status"] == "ok", found["reason"]
    for column in spectra.INTERFERENCE:
        back = shifted(np.asarray(found[column], float), -exponent) if column in OF_SIZE else found[column]
        assert same(back, plain[column]), column


def test_interference_of_two_sizes_that_have_nothing_in_common():
    one, two = matrices()
    found = spectra.interference(deltas(one, shifted(two, -700))).iloc[0]
    cosine = float((one * two).sum() / one.norm() / two.norm())
    assert found["cosines"][0][1] == pytest.approx(cosine)
    assert found["norm_ratio"] == pytest.approx(1)
    assert found["norms"][1] == pytest.approx(math.ldexp(float(two.norm()), -700))


def test_an_update_that_is_more_times_its_base_than_float64_holds(tmp_path):
    base, update = matrices()
    write_checkpoint(tmp_path / "base", {NAME: shifted(base, -400)})
    write_checkpoint(tmp_path / "tuned", {NAME: shifted(update, 900)})
    (found,) = spectra.decompose(spectra.open_source(tmp_path / "tuned", tmp_path / "base"), out=tmp_path / "out")
    row = spectra.summarize([found]).iloc[0]
    assert row["status"] == "ok", row["reason"]
    assert row["norm"] == pytest.approx(math.ldexp(float(update.norm()), 900))
    assert row["relative_norm"] == math.inf
    kept = spectra.summarize(spectra.load(tmp_path / "out")).iloc[0]
    assert kept["relative_norm"] == math.inf or math.isnan(kept["relative_norm"])
    aligned = spectra.alignment(spectra.open_source(tmp_path / "tuned", tmp_path / "base"), k=3).iloc[0]
    assert aligned["status"] == "ok", aligned["reason"]


def test_the_edge_of_errors_whose_sums_have_products_beyond_float64():
    rows, columns = np.linspace(1, 3, 8)[None], np.linspace(1, 2, 6)[None]
    rows, columns = rows / rows.sum(), columns / columns.sum()
    plain = separable_edges(rows, columns)[0]
    assert separable_edges(rows * 2.0**600, columns * 2.0**600)[0] == pytest.approx(plain * 2.0**300)
