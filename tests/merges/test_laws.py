"""Laws of the verdicts on thousands of random matrices: no right merge is called wrong, no wrong one right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.deltas.delta import WeightDelta
from spectra.deltas.recipes import Difference
from spectra.files.tensors import TensorRef
from spectra.merges.bounds import arithmetics, reach, share
from spectra.merges.change import Change
from spectra.merges.fit import fit, spread
from spectra.merges.judge import verdict_on
from spectra.merges.report import AS_IT_SHOULD_BE
from spectra.merges.weights import Weights, kept_in

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def weights_of(base: torch.Tensor, merged: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Weights:
    change = Change([WeightDelta.from_factors("a.weight", left, right)], base)
    return Weights(base, merged, change, kept_in(merged))


def verdict(weights: Weights) -> str:
    return verdict_on(weights, fit(weights)).word


@st.composite
def cases(draw, least: int = 1, sizes: tuple[float, float] = (-6.0, 2.0)) -> tuple[Case, torch.dtype, torch.dtype]:
    """W₀ as stored, B (s in it) and A in float32, and the types of W₀ and of M."""
    rows, columns, r = draw(st.integers(least, 40)), draw(st.integers(least, 40)), draw(st.integers(1, 8))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    base = torch.randn(rows, columns) * 0.05
    if draw(st.booleans()):
        base *= torch.randn(rows, columns).abs() ** 3  # heavy tails: rows differ, and some entries are next to nothing
    left, right = torch.randn(rows, r), torch.randn(r, columns)
    left *= 0.05 * 10 ** draw(st.floats(*sizes)) / r**0.5
    stored, kept = draw(st.sampled_from([(BF16, BF16), (F16, F16), (F32, F32), (F32, BF16), (F32, F16), (BF16, F32)]))
    return (base.to(stored), left, right), stored, kept


ORDERS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]] = {
    "float32": lambda W, B, A, t: (W.float() + B @ A).to(t),
    "cast first": lambda W, B, A, t: (W.to(t).float() + B @ A).to(t),
    "update cast": lambda W, B, A, t: W.to(t) + (B @ A).to(t),
    "float64": lambda W, B, A, t: (W.double() + B.double() @ A.double()).to(t),
    "every step": lambda W, B, A, t: W.to(t) + (B.to(t).float() @ A.to(t).float()).to(t),
    "by columns": lambda W, B, A, t: (W.float() + sum(B[:, i : i + 1] * A[i] for i in range(B.shape[1]))).to(t),
    "last first": lambda W, B, A, t: (W.float() + B.flip(1) @ A.flip(0)).to(t),
}


@pytest.mark.parametrize(
    "entries",
    [
        (0.0003185272216796875, -4.485068075155141e-06, 1.4927128553390503),
        (-0.00054168701171875, 0.00027361660613678396, -0.3715275526046753),
        (-0.74609375, -3.5703341960906982, 0.023504946380853653),
        (-0.000263214111328125, 2.3036667698761448e-05, -0.12423001974821091),
    ],
)
def test_one_entry_that_falls_to_the_other_side_of_an_edge_is_no_other_scale(entries):
    base, left, right = (torch.tensor([[entry]]) for entry in entries)
    merged = ORDERS["every step"](base.to(BF16), left, right, BF16)
    assert verdict(weights_of(base.to(BF16), merged, left, right)) in (*AS_IT_SHOULD_BE, "too small to tell")


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=300)
@given(case=cases())
def test_a_right_merge_is_never_called_wrong(order, case):
    (base, left, right), _, kept = case
    merged = ORDERS[order](base, left, right, kept)
    if not torch.isfinite(merged).all():
        return
    weights = weights_of(base, merged, left, right)
    found = verdict(weights)
    assert found in (*AS_IT_SHOULD_BE, "too small to tell")
    if order in ("float32", "float64"):
        assert (found in AS_IT_SHOULD_BE) == weights.tells()


@settings(max_examples=300)
@given(case=cases(least=8, sizes=(-2.0, 1.0)), s=st.floats(-4, 4))
def test_the_scale_is_found(case, s):
    (base, left, right), _, kept = case
    weights = weights_of(base, (base.float() + s * (left @ right)).to(kept), left, right)
    found = fit(weights)
    assert found.scale == pytest.approx(s, abs=8 * found.rounding + 1e-5)
    if abs(s - 1) > 0.1 and abs(s) > 0.1 and found.rounding < 0.01:
        assert verdict_on(weights, found).word == "scaled"
    # An order that forms ΔW in 16 bits may round s by two units of that type; what each entry is off besides, as if by
    # chance, hides five standard errors of s.
    units = 2 * max(torch.finfo(base.dtype).eps, torch.finfo(kept).eps)
    hidden = max(units, *(reach(weights, how) for how in arithmetics(weights))) + 6 * spread(weights, found.scale)
    if abs(s - 1) > max(0.02, hidden) and found.rounding < 1:
        assert verdict_on(weights, found).word not in AS_IT_SHOULD_BE


@settings(max_examples=300)
@given(case=cases(least=8, sizes=(-2.0, 1.0)))
def test_one_wrong_large_entry_is_damage(case):
    (base, left, right), _, kept = case
    merged = (base.float() + left @ right).to(kept)
    merged.view(-1)[merged.abs().argmax()] *= -1
    weights = weights_of(base, merged, left, right)
    if fit(weights).rounding < 0.3:
        found = verdict_on(weights, fit(weights))
        assert found.word == "damaged"
        assert found.cause.startswith("not as merged: 1 of ")
    else:
        assert verdict(weights) not in AS_IT_SHOULD_BE


@pytest.mark.parametrize(
    ("shape", "rank", "seed", "size"),
    [((8, 12), 1, 1210335137, 0.0), ((8, 8), 1, 1165156946, -1.0), ((8, 9), 1, 151280260, -1.0)],
)
def test_entries_that_only_a_less_likely_order_gets_wrong_are_not_called_damage(shape, rank, seed, size):
    """Bounds so wide that the wrong entry tells nothing hold all others that tell, and are wrong about two to four."""
    torch.manual_seed(seed)
    base = torch.randn(shape) * 0.05 * torch.randn(shape).abs() ** 3
    left, right = torch.randn(shape[0], rank) * 0.05 * 10**size, torch.randn(rank, shape[1])
    merged = (base + left @ right).to(BF16)
    merged.view(-1)[merged.abs().argmax()] *= -1
    weights = weights_of(base, merged, left, right)
    assert max(share(weights, how) for how in arithmetics(weights)) == 1.0
    assert verdict_on(weights, fit(weights)).cause.startswith("not as merged: 1 of ")


@settings(max_examples=200)
@given(case=cases(least=8, sizes=(-3.0, 1.0)))
def test_a_weight_without_the_update_is_not_applied(case):
    (base, left, right), _, kept = case
    found = verdict(weights_of(base, base.to(kept), left, right))
    same = torch.equal((base.float() + left @ right).to(kept), base.to(kept))
    assert found == ("too small to tell" if same else "not applied")


@settings(max_examples=100)
@given(case=cases(least=16, sizes=(-2.0, 0.0)), size=st.floats(0.02, 1.0))
def test_noise_is_not_rounding(case, size):
    (base, left, right), _, kept = case
    noise = size * base.float().std() * torch.randn(base.shape)
    weights = weights_of(base, (base.float() + left @ right + noise).to(kept), left, right)
    assert verdict(weights) in ("damaged", "different")


@settings(max_examples=100)
@given(case=cases(least=16, sizes=(-2.0, 0.5)))
def test_another_base_is_unrelated(case):
    (base, left, right), _, kept = case
    other = torch.randn(base.shape) * base.float().std()
    weights = weights_of(base, (other + left @ right).to(kept), left, right)
    assert verdict(weights) == "unrelated base"


def test_an_update_of_zero_asks_for_the_base():
    base = torch.randn(4, 4)
    left, right = torch.zeros(4, 2), torch.randn(2, 4)
    assert verdict(weights_of(base, base, left, right)) == "exact"
    assert verdict(weights_of(base, base + 1, left, right)) == "different"
    assert fit(weights_of(base, base, left, right)).scale is None


def test_tiny_updates_do_not_underflow_in_the_sums():
    base, left, right = torch.zeros(4, 4, dtype=BF16), torch.full((4, 1), 1e-15), torch.full((1, 4), 1e-15)
    weights = weights_of(base, (left @ right).to(BF16), left, right)
    assert fit(weights).scale == pytest.approx(1, rel=1e-2)
    assert verdict(weights) == "exact"


def test_a_float32_file_with_16_bit_values_was_merged_in_16_bits():
    torch.manual_seed(0)
    base, left, right = torch.randn(16, 16), torch.randn(16, 2) * 0.1, torch.randn(2, 16)
    merged = (base.to(BF16).float() + left @ right).to(BF16).float()
    weights = weights_of(base, merged, left, right)
    assert kept_in(merged) == [BF16, F32]
    assert "W₀ cast" in verdict_on(weights, fit(weights)).replay


def test_the_sums_of_float64_weights_leave_them_alone():
    torch.manual_seed(0)
    base, left, right = torch.randn(5, 6, dtype=F64), torch.randn(5, 2), torch.randn(2, 6)
    merged = base + left.double() @ right.double()
    before = merged.clone()
    weights = weights_of(base, merged, left, right)
    assert fit(weights).residual == pytest.approx(0, abs=1e-14)
    assert torch.equal(merged, before)
    assert verdict(weights) == "exact"


def test_the_base_is_as_it_was_after_the_errors_of_a_weight_saved_whole_are_bounded():
    base = torch.randn(3, 4)
    before = base.clone()
    refs = (TensorRef("x", name, "F32", (3, 4), "safetensors", (0, 0)) for name in ("tuned", "base"))
    change = Change([WeightDelta("w", (3, 4), Difference(*refs), 3)], base)
    assert not change.magnitudes().any()
    assert torch.equal(base, before)
