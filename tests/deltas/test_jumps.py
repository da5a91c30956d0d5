"""Whether there was a second rounding is told by jumps of the update's squares where the step jumps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.deltas.grids import GRIDS
from spectra.deltas.jumps import _kinds, hides_jumps, jump

BF16 = GRIDS["BF16"]


def seen(delta, base):
    steps = BF16.squared_steps(base) / 12
    return jump(*(part.flatten().numpy() for part in (delta.square(), base.abs(), steps, steps)))


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("follows", [0.0, 0.002])
def test_the_share_is_that_of_the_second_rounding_though_the_update_grows_with_the_weight(second, follows):
    torch.manual_seed(0)
    W = 0.04 * torch.randn(512, 512, dtype=torch.float64)
    update = (5e-4 + follows * W.abs()) * torch.randn(512, 512, dtype=torch.float64)
    base = BF16.round(W)
    found = seen(BF16.round((W if second else base) + update) - base, base)
    assert found.error < 0.6
    assert abs(found.share - second) < 2 * found.error + 0.1


def test_nothing_is_told_of_few_entries_of_updates_below_a_step_or_of_a_single_step():
    torch.manual_seed(0)
    base = BF16.round(0.04 * torch.randn(128, 128, dtype=torch.float64))
    update = 1e-3 * torch.randn(128, 128, dtype=torch.float64)
    assert seen(update, base) is not None
    assert seen(update[:20], base[:20]) is None
    assert seen(0.01 * update, base) is None
    assert seen(update, torch.full_like(base, 0.05)) is None


def test_the_share_is_that_of_weighted_least_squares():
    torch.manual_seed(0)
    base = BF16.round(0.04 * torch.randn(128, 128, dtype=torch.float64)).flatten()
    squares = (1e-3 * torch.randn(128 * 128, dtype=torch.float64)).square()
    steps = BF16.squared_steps(base) / 12
    rows, wanted = [], []
    for step in steps.unique():
        mine = steps == step
        if mine.sum() >= 64:
            weight = 1 / squares[mine].mean()
            size = base[mine].abs()
            rows.append(torch.stack([torch.ones_like(size), size, size**2, steps[mine]], 1) * weight)
            wanted.append((squares[mine] - steps[mine]) * weight)
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)[:, None], driver="gelsd").solution[3, 0]
    sizes, once = base.abs().numpy(), steps.numpy()
    assert jump(squares.numpy(), sizes, once, once).share == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("constant", [False, True])
def test_what_hides_the_jumps_is_an_update_in_which_the_fit_tells_nothing(constant):
    torch.manual_seed(0)
    base = BF16.round(0.04 * torch.randn(724, 724, dtype=torch.float64))
    most = float(BF16.squared_steps(base).max() / 12)
    update = torch.ones_like(base) if constant else torch.randn_like(base)
    update *= (1.1e5 * most) ** 0.5
    assert hides_jumps(float(update.square().mean()), most)
    assert not hides_jumps(0.5 * float(update.square().mean()), most)
    assert seen(BF16.round(base + update) - base, base).error > 0.75


def test_kinds_are_those_of_sorting():
    torch.manual_seed(0)
    for more in (2.0 ** torch.randint(-30, -20, (4096,)).double(), torch.randint(1, 40, (4096,)) / 7.0):
        expected = np.unique(more.double().numpy(), return_inverse=True)
        assert all(np.array_equal(*pair) for pair in zip(_kinds(more.double().numpy()), expected, strict=True))
