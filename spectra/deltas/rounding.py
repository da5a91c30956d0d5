r"""The storage-rounding floor: the largest singular value that rounding to bf16, fp16 or fp32 alone would give.

Rounding to nearest leaves in each entry an error of variance ulp²/12, nearly independent of the others.
Were all ulp equal, the largest singular value of the errors would be √(ulp²/12)·(√m + √n). Those of real
weights are not: rows and columns differ in scale, and a few entries stand out. So the edge is that of
independent errors whose variances have the weights' own row and column sums, or the value that one
outstanding entry can make by itself, whichever is larger.

The steps are those of the grid that the values lie on (`grids`), whatever the file's type. How often they were
taken is not written anywhere: the base may be a rounded copy of what was tuned, or have been rounded before the
update was added. Each such story is a `Noise`; the singular values tell which of them can be true (`engine.noise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np

from spectra.deltas.grids import UNLIMITED, Grid, grid_of, is_coded
from spectra.deltas.jumps import Jump, jump
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ENTRIES = 2**16  # half a MiB, which stays in the cache
_SAMPLE = 2**18  # entries in which a jump is looked for
_GRID = 400
_MOST_TERMS = 4096  # rows or columns at once, 13 MB
# The 99 % quantile of the Tracy–Widom law (real case) is 2.02; relative to the edge of σ for a square matrix
# of size s one unit of it is 0.315·s^(−2/3) (Johnstone 2001, Theorem 1.1).
_FLUCTUATION = 2.02 * 0.315
# Real weights are not quite separable: over MiniLM's 36 matrices in bf16 and fp16 the largest value of the
# rounding errors came up to 2 % above the edge of the separable model.
_MARGIN = 1.02
_NORMAL_99 = 2.33
_SPREAD = {1: 1 / 180, 2: 1.4 / 144}  # Var e² / step⁴ of one rounding and, at most, of two
_SLACK = 1.1  # over the energy that a row or column has: chance lowers half of them
_NEGLIGIBLE = 0.02  # share of the energy below which a second rounding is no story of its own: 1 % of the edge


Part = slice | int | tuple[slice, int]  # rows, a row, or a column of a matrix
Steps = Callable[[Part], "Tensor"]  # the sum of the squared steps of all roundings, at each entry of a part


@dataclass(frozen=True)
class Noise:
    """What rounding leaves in tuned − base by one story of how the two were stored.

    Attributes:
        edge: the largest singular value of the errors.
        energy: their expected ‖·‖_F².
        said: the story.
        far_fetched: whether nothing in the files suggests it, so that it takes an exact fit to believe it.
        grid: where the tuned values were rounded to after the update was added.
        base_too: whether the base's own rounding adds to the errors.
        jump: how much of the second rounding, which the first story has and the last has not, is in the update.
    """

    edge: float
    energy: float
    said: str
    far_fetched: bool = False
    grid: Grid | None = None
    base_too: bool = False
    jump: Jump | None = None

    def scaled(self, factor: float) -> Noise:
        """So many times as much."""
        return replace(self, edge=abs(factor) * self.edge, energy=factor**2 * self.energy)

    def rounded(self, base: Tensor, update: Tensor) -> Tensor:
        """What would be stored of W₀ + update, less W₀, had it been rounded as this story tells; float64."""
        grid = cast("Grid", self.grid)
        return grid.round((grid.round(base) if self.base_too else base) + update).sub_(base)


def rounding_noise(
    tuned: Tensor, dtype: str, base: Tensor, base_dtype: str, delta: Tensor | None = None
) -> tuple[Noise, ...]:
    r"""What rounding alone would leave in tuned − base, by every story that the two grids allow.

    With steps t on the tuned's grid and b on the base's, the last rounding has a variance of t²/12. Where the two
    differ, |t² − b²|/12 comes on top: the base was rounded to the tuned's grid before the update was added (its values
    do not fit that grid), or is itself a rounded copy of what was tuned (its grid is the coarser one).

    Args:
        tuned: the tuned weights, (out, in), in their storage type or upcast.
        dtype: their storage type, in safetensors' words.
        base: the base weights, likewise.
        base_dtype: their storage type.
        delta: tuned − base, which bounds the errors: what did not move has none but the update that it lacks.

    Returns:
        The stories, the one with the most noise first; none for a type without a known rounding, an empty matrix, or
        weights that are not finite.

    Example:
        >>> import torch
        >>> base = torch.linspace(0.5, 2, 1024).reshape(32, 32)
        >>> [noise.said for noise in rounding_noise(base.bfloat16(), "BF16", base, "F32")]
        ['tuned on the bf16 grid, base (f32) rounded to it first', 'tuned on the bf16 grid']

    Reference: `separable_edge`; independent uniform errors, step²/12: Widrow, Kollár & Liu 1996.
    """
    if tuned.numel() == 0 or not (_finite(tuned) and _finite(base)):
        return ()
    last, first = grid_of(tuned, dtype), grid_of(base, base_dtype)
    if last is None:
        return ()
    if is_coded(tuned, last):
        return (Noise(0.0, 0.0, "tuned holds codes times scales, whose rounding is not known"),)

    once = _kept(lambda part: last.squared_steps(tuned[part]), tuned.shape)
    said = f"tuned on the {last.name} grid"
    if first is not None and is_coded(base, first):
        said += ", base of codes times scales taken as exact"
    fewest = replace(_noise(once, tuned.shape, 1, said, delta), grid=last)
    return (fewest,) if first is None else _stories(fewest, once, tuned, base, (last, first), delta)


def _stories(
    fewest: Noise, once: Steps, tuned: Tensor, base: Tensor, grids: tuple[Grid, Grid], delta: Tensor | None
) -> tuple[Noise, ...]:
    """What a second rounding would add to the first one, on the grids of the tuned and of the base."""
    last, first = grids
    said = fewest.said
    if _alike(first, last):
        return (_copied(fewest, _jump(delta, base, once, once)), fewest)

    def more(part: Part) -> Tensor:
        before = base[part]
        return last.squared_steps(before).sub_(first.squared_steps(before)).abs_()

    def twice(part: Part) -> Tensor:
        return more(part).add_(last.squared_steps(tuned[part]))

    copy = first.bits < last.bits
    how = "taken for a rounded copy" if copy else "rounded to it first"
    most = _noise(twice, tuned.shape, 1 if copy else 2, f"{said}, base ({first.name}) {how}", delta)
    if most.energy > (1 + _NEGLIGIBLE) * fewest.energy:
        seen = _jump(delta, base, once, more)
        return (replace(most, grid=None if copy else last, base_too=True, jump=seen), fewest)
    # Grids that differ in their floors alone, where hardly a value lies: bf16, and bf16 values in an fp16 file.
    return (_copied(fewest, _jump(delta, base, once, once)), fewest) if first.bits == last.bits else (fewest,)


def _copied(fewest: Noise, seen: Jump | None) -> Noise:
    """The story of a base that was rounded to the tuned one's grid, too."""
    said = f"{fewest.said}, base a copy rounded to it"
    return replace(fewest.scaled(math.sqrt(2)), said=said, grid=None, far_fetched=True, base_too=True, jump=seen)


def _jump(delta: Tensor | None, base: Tensor, once: Steps, more: Steps) -> Jump | None:
    """On rows from all over the matrix."""
    if delta is None:
        return None
    every = max(1, delta.numel() // _SAMPLE)
    rows = slice(None, None, every)
    first = once(rows) / 12
    second = first if more is once else more(rows) / 12
    parts = (delta[rows].square(), base[rows].to(torch.float64).abs(), first, second)
    return jump(*(part.flatten() for part in parts))


def _alike(first: Grid, second: Grid) -> bool:
    return first.bits == second.bits and (first.floor == second.floor or max(first.floor, second.floor) <= UNLIMITED)


def together(parts: Sequence[tuple[Noise, ...]]) -> tuple[Noise, ...]:
    """An upper bound of what rounding leaves in a sum or stack of matrices, story by story: √Σ edge².

    Parts with fewer stories than the others count with their first one, which has the most noise.

    Example:
        >>> one, two = Noise(3.0, 9.0, "tuned on the bf16 grid"), Noise(4.0, 16.0, "tuned on the bf16 grid")
        >>> [(noise.edge, noise.energy) for noise in together([(one,), (two,)])]
        [(5.0, 25.0)]
    """
    known = [stories for stories in parts if stories]
    if not known:
        return ()
    most = max(len(stories) for stories in known)
    padded = [(stories[:1] * (most - len(stories))) + stories for stories in known]
    return tuple(
        Noise(
            math.hypot(*(noise.edge for noise in told)),
            math.fsum(noise.energy for noise in told),
            "; ".join(dict.fromkeys(noise.said for noise in told)),
            all(noise.far_fetched for noise in told),
        )
        for told in zip(*padded, strict=True)
    )


def rounding_edge(stored: Tensor, dtype: str) -> float | None:
    """The edge of the hump that one rounding leaves in the singular values of stored − exact.

    Values above it are not rounding alone, with a probability of about 99 %. Where most entries did
    not move at all, the errors follow the update and are no longer independent: look at `unmoved_share`.

    Args:
        stored: the tuned weights, (out, in), in their storage type or upcast.
        dtype: their storage type, in safetensors' words.

    Returns:
        The edge in the units of σ, or None for a type without a known rounding, an empty matrix, or
        weights that are not finite.

    Example:
        >>> import torch
        >>> edge = rounding_edge(torch.ones(1000, 1000), "BF16")
        >>> round(edge / (2**-7 / 12**0.5 * 2 * 1000**0.5), 2)
        1.03
    """
    noise = rounding_noise(stored, dtype, stored, dtype)
    return noise[-1].edge if noise else None


def _finite(matrix: Tensor) -> bool:
    return all(math.isfinite(extreme) for extreme in torch.aminmax(matrix))  # a sum would make a float64 copy


def separable_edge(rows: np.ndarray, columns: np.ndarray) -> float:
    r"""The largest singular value of independent entries of mean 0 whose variances have these sums.

    With variances aᵢbⱼ the edge is the least λ(w) over 0 < w < 1/max a, where
    λ = A(w)/u, A(w) = Σ aᵢ/(1 − w aᵢ), B(u) = Σ bⱼ/(1 − u bⱼ) and u solves w·A(w) = u·B(u); σ = √λ.
    For equal variances v this is √v·(√m + √n).

    Args:
        rows: Σⱼ of the variances, (m,).
        columns: Σᵢ of the variances, (n,).

    Example:
        >>> round(separable_edge(np.full(400, 900.0), np.full(900, 400.0)), 2)
        50.0

    Reference: Paul & Silverstein 2009 (separable covariance, no eigenvalues outside the limiting support).
    """
    total = rows.sum()
    if not total > 0:
        return 0.0
    a, b = rows / rows.max(), columns / columns.max()
    # Grids that are dense at both ends: the minimum lies near 1 where one row or column dominates.
    t = 0.5 - 0.5 * np.cos(np.pi * (np.arange(1, _GRID) / _GRID))
    sum_a, sum_b = _resolvent(a, t), _resolvent(b, t)
    u = np.exp(np.interp(np.log(t * sum_a), np.log(t * sum_b), np.log(t)))
    reached = t * sum_a <= (t * sum_b)[-1]
    ratio = np.where(reached, sum_a / u, np.inf)
    return math.sqrt(ratio.min() * rows.max() * columns.max() / total)


def _resolvent(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Σ aᵢ/(1 − w aᵢ) for every w."""
    total = np.zeros(len(w))
    for start in range(0, len(a), _MOST_TERMS):
        some = a[start : start + _MOST_TERMS]
        terms = np.multiply.outer(some, -w)  # one array for all steps: fresh memory is what takes the time here
        terms += 1
        np.divide(some[:, None], terms, out=terms)
        total += terms.sum(0)
    return total


def _noise(steps: Steps, shape: torch.Size, roundings: int, said: str, delta: Tensor | None) -> Noise:
    """The story's noise, from the squared steps at the entries; no row or column has more of it than energy."""
    steps = _kept(steps, shape)
    rows, columns, highest = _variance_sums(steps, shape)
    if delta is not None:
        row_energies, column_energies, largest = _energies(delta)
        rows, columns = np.minimum(rows, _SLACK * row_energies), np.minimum(columns, _SLACK * column_energies)
        highest = np.minimum(highest, 4 * largest)
        total = min(rows.sum(), columns.sum())
        if not total > 0:
            return Noise(0.0, 0.0, said)
        rows, columns = rows * (total / rows.sum()), columns * (total / columns.sum())
    edge = separable_edge(rows, columns)
    top_row, top_column = int(rows.argmax()), int(columns.argmax())
    chance = max(
        _wobble(steps(top_row), rows[top_row], edge, roundings),
        _wobble(steps((slice(None), top_column)), columns[top_column], edge, roundings),
    )
    edge *= (_MARGIN + _FLUCTUATION * min(shape) ** (-2 / 3)) * chance
    edge = max(edge, _spike(steps, rows, columns, highest, roundings, delta))
    return Noise(edge, float(rows.sum()), said)


def _kept(steps: Steps, shape: torch.Size) -> Steps:
    """The same steps, of a matrix of one block computed once: for small ones asking again costs more than they do."""
    if math.prod(shape) > _BLOCK_ENTRIES:
        return steps
    whole = steps(slice(None))
    return lambda part: whole[part]


def _variance_sums(steps: Steps, shape: torch.Size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column sums of step²/12 and each row's largest step²."""
    rows, columns, highest = _sums(steps, shape)
    return rows / 12, columns / 12, highest


def _sums(entries: Steps, shape: torch.Size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column sums and each row's largest entry, a block of rows at a time."""
    rows, highest, columns = [], [], torch.zeros(())
    height = max(1, _BLOCK_ENTRIES // shape[1])
    for start in range(0, shape[0], height):
        steps = entries(slice(start, start + height))
        rows.append(steps.sum(1))
        highest.append(steps.amax(1))
        columns = steps.sum(0) if start == 0 else columns.add_(steps.sum(0))
    # Only now: on a card every number that is looked at waits for all that was asked before.
    return torch.cat(rows).cpu().numpy(), columns.cpu().numpy(), torch.cat(highest).cpu().numpy()


def _energies(delta: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Σ of the squares of every row and column, and each row's largest square, a block of rows at a time."""
    return _sums(lambda block: delta[block].square(), delta.shape)


def _wobble(squared: Tensor, variance: float, edge: float, roundings: int) -> float:
    """How far chance may lift the edge through the norm of the errors in the largest row, or column.

    An error uniform in ±step/2 has E e² = step²/12 and Var e² = step⁴/180; of a sum of two, with variance v, Var e²
    is at most 1.4 v². The bulk averages this away; it counts as far as the row alone makes the edge.
    """
    assumed = float(squared.sum()) / 12  # more than the variance where most of the entries did not move
    if not edge > 0 or not assumed > 0:
        return 1.0
    spread = math.sqrt(float(squared.square().sum()) * _SPREAD[roundings]) * min(variance / assumed, 1.0)
    return math.sqrt(1 + _NORMAL_99 * (variance / edge**2) ** 2 * spread / variance)


def _spike(
    steps: Steps, rows: np.ndarray, columns: np.ndarray, highest: np.ndarray, roundings: int, delta: Tensor | None
) -> float:
    r"""The largest value that the error of one entry, at most θ, makes among the others of its row and column.

    θ² is step²/4, and twice Σ step²/4 for two roundings. It stands out if θ⁴ > rᵢcⱼ, then as
    √((θ² + rᵢ)(θ² + cⱼ))/θ (Benaych-Georges & Nadakuditi 2012).
    """
    largest, least = 0.0, columns[columns > 0].min(initial=math.inf)
    suspect = np.square(highest * roundings / 4) > rows * least
    if not suspect.any():
        return 0.0
    at_once = len(rows) * len(columns) <= _BLOCK_ENTRIES
    blocks = [slice(0, len(rows))] if at_once else [slice(i, i + 1) for i in np.flatnonzero(suspect)]
    for block in blocks:
        largest_errors = steps(block).mul(roundings / 4)
        if delta is not None:
            largest_errors = torch.minimum(largest_errors, delta[block].square())
        squared = largest_errors.cpu().numpy()
        r, c = np.broadcast_arrays(rows[block, None], columns)
        out = suspect[block, None] & (np.square(squared) > r * c)
        if out.any():
            theta, r, c = squared[out], r[out], c[out]
            largest = max(largest, float(((theta + r) * (theta + c) / theta).max()))
    return math.sqrt(largest)
