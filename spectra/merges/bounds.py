"""What the arithmetic of a merge allows: every entry of M lies between two stored numbers.

Rounding to a storage type is monotone. So where ΔW is known up to δ, M = fl(W₀ + ΔW ± δ) lies between
fl(W₀ + ΔW − δ) and fl(W₀ + ΔW + δ). Where ΔW is smaller than a unit in the last place of W₀ this is nearly always
one number, and a merge that rounds as it should is told from one with another s. Where W₀ and ΔW cancel, units in the
last place of M mean nothing and δ is what counts: it is relative to |s||B||A|.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.lazy import torch
from spectra.merges.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor

# Roundings of a 16-bit merge, in units: of each factor, of their product, of its multiple. Updates whose arithmetic is
# not followed have more, and those that are made of W₀ most.
_HALF_STEPS, _HALF_STEPS_UNKNOWN, _HALF_STEPS_FROM_BASE = 4, 8, 16
_SUM_STEPS = 2  # roundings of a sum before it is stored


@dataclass(frozen=True)
class Arithmetic:
    """One way to compute a merge, as far as its rounding goes.

    Attributes:
        kept: the type in which the sum was kept.
        cast: whether W₀ was cast to it first.
        formed: the type in which ΔW was formed.
        steps: how many roundings in that type an entry of ΔW has.
    """

    kept: torch.dtype
    cast: bool
    formed: torch.dtype
    steps: float

    @property
    def name(self) -> str:
        """In words."""
        first = f"W₀ cast to {_plain(self.kept)}, " if self.cast else ""
        return f"{first}ΔW formed in {_plain(self.formed)}, sum kept in {_plain(self.kept)}"

    @property
    def tolerance(self) -> float:
        """How far s may be off by rounding that is alike in all entries, such as that of s itself."""
        return _HALF_STEPS * _unit(self.formed)

    @property
    def normal(self) -> float:
        """The least number of the type that ΔW was formed in which has all its digits."""
        return torch.finfo(self.formed).smallest_normal

    def before(self, base: Tensor) -> Tensor:
        """Rows of W₀ as they were added to, in float64."""
        return base.to(self.kept).double() if self.cast else base.double()

    def interval(self, base: Tensor, update: Tensor, sizes: Tensor, slack: float = 0.0) -> tuple[Tensor, Tensor]:
        """The least and the greatest that M can be, in float64.

        Args:
            base: rows of W₀ as stored.
            update: the same rows of s·ΔW, float64.
            sizes: what rounding errors in them are relative to.
            slack: a share of |s·ΔW| by which it may be off besides.
        """
        before = self.before(base)
        off = sizes.double() * (self.steps * _unit(self.formed)) + _least(self.formed)
        off += (before.abs() + update.abs()) * (_SUM_STEPS * _unit(torch.promote_types(self.kept, torch.float32)))
        off += update.abs() * slack
        middle = before + update
        return (middle - off).to(self.kept).double(), (middle + off).to(self.kept).double()


def _unit(dtype: torch.dtype) -> float:
    """u, half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def _least(dtype: torch.dtype) -> float:
    """The least positive number: what rounds to nothing is off by half of it."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def arithmetics(weights: Weights) -> list[Arithmetic]:
    """The ways that come into question, the narrowest bounds first.

    ΔW is formed in 16 bits only where the sum is kept, or the adapter stored, in them.
    """
    ways, change, stored = [], weights.change, weights.base.dtype
    own = _HALF_STEPS if change.term is not None else _HALF_STEPS_UNKNOWN
    steps = _HALF_STEPS_FROM_BASE if change.multiplies else own
    for kept in weights.kept:
        halves = ({kept} if kept.itemsize == 2 else set()) | change.halves
        formed = [(torch.float32, change.steps), *((half, steps) for half in sorted(halves, key=str))]
        casts = (False,) if stored == kept or stored.itemsize < kept.itemsize else (False, True)
        ways += [Arithmetic(kept, cast, *how) for how in formed for cast in casts]
    return ways


def inside(weights: Weights, how: Arithmetic, scale: float = 1.0, slack: float = 0.0) -> Iterator[Tensor]:
    """Block by block, whether each entry of M is what W₀ + s·ΔW may be stored as."""
    for rows in weights.blocks():
        update = scale * weights.change.sharpest(how.kept, rows).double()
        sizes = abs(scale) * weights.change.magnitudes(rows, how.normal)
        low, high = (
            edge.to(weights.merged.dtype).double() for edge in how.interval(weights.base[rows], update, sizes, slack)
        )
        entries = weights.merged[rows].double()
        yield (entries >= low) & (entries <= high)


def within(weights: Weights, how: Arithmetic, scale: float = 1.0, slack: float = 0.0) -> bool:
    """Whether all entries are; the first block that has another one ends it."""
    return all(bool(block.all()) for block in inside(weights, how, scale, slack))


def wrong_entries(weights: Weights, how: Arithmetic) -> int:
    """How many entries are not what W₀ + ΔW may be stored as."""
    return sum(int((~block).count_nonzero()) for block in inside(weights, how))


def near(weights: Weights, how: Arithmetic, scale: float = 1.0) -> bool:
    """Whether every entry of M is within ε·(|W₀| + |s||B||A|) of W₀ + s·ΔW, ε that of the type it was kept in."""
    epsilon, least = torch.finfo(how.kept).eps, _least(how.kept)
    for rows in weights.blocks():
        base = weights.base[rows].double()
        off = weights.merged[rows].double() - base - scale * weights.change.sharpest(how.kept, rows).double()
        sizes = base.abs() + abs(scale) * weights.change.magnitudes(rows)
        if not bool((off.abs() <= epsilon * sizes + least).all()):
            return False
    return True


def reach(weights: Weights, how: Arithmetic) -> float:
    """How far rounding of its entries, each by itself, may make M lean towards ΔW, as a share of ΔW.

    An entry near the edge of two stored numbers may be either. No further than if all went one way, and than three
    times what the squares of these distances add up to.
    """
    all_alike = alone = norm = 0.0
    for rows in weights.blocks():
        D = weights.change.float32(rows).double()
        base = weights.base[rows]
        expected = (how.before(base) + D).to(how.kept).double()
        low, high = how.interval(base, D, weights.change.magnitudes(rows, how.normal))
        most = torch.maximum(high - expected, expected - low).mul_(D.abs())
        all_alike, alone = all_alike + float(most.sum()), alone + float(most.square().sum())
        norm += float(D.square().sum())
    return min(all_alike, 3 * math.sqrt(alone)) / norm if norm else math.inf


def share(weights: Weights, how: Arithmetic) -> float:
    """Of the entries that tell W₀ + ΔW from W₀, the share that is as W₀ + ΔW may be stored; 0 if none tells."""
    right = telling = 0
    for rows, good in zip(weights.blocks(), inside(weights, how), strict=True):
        update = weights.change.sharpest(how.kept, rows).double()
        low, high = how.interval(weights.base[rows], update, weights.change.magnitudes(rows, how.normal))
        unmoved = weights.base[rows].to(how.kept).double()
        tells = (unmoved < low) | (unmoved > high)
        right += int((tells & good).count_nonzero())
        telling += int(tells.count_nonzero())
    return right / telling if telling else 0.0
