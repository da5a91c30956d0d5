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
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np

from spectra.deltas.grids import UNLIMITED, Grid, grid_of, is_coded
from spectra.deltas.jumps import FEWEST, Jump, hides_jumps, jump
from spectra.deltas.separable import separable_edge
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

CODES = "codes"  # the type of values that are codes times scales, whatever they are decoded to
_BLOCK_ENTRIES = 2**16  # half a MiB, which stays in the cache
_SQUARED = 2.0**500  # what can be squared and summed
_SAMPLE = 2**18  # entries in which a jump is looked for
# The 99 % quantile of the Tracy–Widom law (real case) is 2.02; relative to the edge of σ for a square matrix
# of size s one unit of it is 0.315·s^(−2/3) (Johnstone 2001).
_FLUCTUATION = 2.02 * 0.315
# Real weights are not quite separable: over MiniLM's 36 matrices in bf16 and fp16 the largest value of the
# rounding errors came up to 2 % above the edge of the separable model.
_MARGIN = 1.02
_NORMAL_99 = 2.33
_SPREAD = {1: 1 / 180, 2: 1.4 / 144}  # Var e² / step⁴ of one rounding and, at most, of two
_SLACK = 1.1  # over the energy that a row or column has: chance lowers half of them
_LEAST, _WIDER = 1e-300, 1 + 1e-9  # room for rounding in a bound
_NEGLIGIBLE = 0.02  # share of the energy below which a second rounding is no story of its own: 1 % of the edge


Part = slice | int | tuple[slice, int] | np.ndarray  # rows, a row, a column, or some rows by their numbers
Look = Callable[[], Jump | None]
Energies = tuple[np.ndarray, np.ndarray, np.ndarray]  # of the rows and of the columns; each row's largest square
Steps = Callable[[Part], "Tensor"]  # the sum of the squared steps of all roundings, at each entry of a part


@dataclass(frozen=True)
class Noise:
    """What rounding leaves in tuned − base by one story of how the two were stored.

    Attributes:
        edge: the largest singular value of the errors.
        energy: their expected ‖·‖_F².
        said: the story.
        doubted: the same where nothing bears it out, and it is assumed since it has more noise than the others; "" for
            the story itself.
        known: whether anything is known of the rounding; else there is no edge.
        far_fetched: whether nothing in the files suggests it, so that it takes an exact fit to believe it.
        grid: where the tuned values were rounded to after the update was added.
        base_too: whether the base's own rounding adds to the errors.
        jump: tells how much of the second rounding, which the first story has and the last has not, is in the update;
            a fit, made where the energies tell nothing.
    """

    edge: float
    energy: float
    said: str
    far_fetched: bool = False
    grid: Grid | None = None
    base_too: bool = False
    jump: Look | None = None
    doubted: str = ""
    known: bool = True

    @property
    def said_in_doubt(self) -> str:
        """What is said where the story is assumed, and neither energy nor jumps bear it out."""
        return self.doubted or self.said

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
        dtype: their storage type, in safetensors' words; `CODES` of what a codec decoded.
        base: the base weights, likewise.
        base_dtype: their storage type.
        delta: tuned − base, which bounds the errors: what did not move has none but the update that it lacks.

    Returns:
        The stories, the one with the most noise first; none for a type without a known rounding, an empty matrix,
        weights that are not finite, or float64 ones whose squares are not.

    Example:
        >>> import torch
        >>> base = torch.linspace(0.5, 2, 1024).reshape(32, 32)
        >>> [noise.said for noise in rounding_noise(base.bfloat16(), "BF16", base, "F32")]
        ['tuned on the bf16 grid, base (f32) rounded to it first', 'tuned on the bf16 grid']

    Reference: `separable_edge`; independent uniform errors, step²/12: Widrow, Kollár & Liu 1996.
    """
    if tuned.numel() == 0:
        return ()
    extremes = _extremes(base)
    if not all(map(math.isfinite, (*extremes, *_extremes(tuned)))):
        return ()
    if dtype == "F64" and max(float(part.abs().max()) for part in (tuned, base)) > _SQUARED:
        return ()
    energies = None if delta is None else _energies(delta)
    last, first = grid_of(tuned, dtype), grid_of(base, base_dtype)
    if dtype == CODES or (last is not None and is_coded(tuned, last)):
        return (Noise(0.0, 0.0, "tuned holds codes times scales, whose rounding is not known", known=False),)
    if last is None:
        return ()

    once = _kept(lambda part: last.squared_steps(tuned[part]), tuned.shape)
    said = f"tuned on the {last.name} grid"
    if base_dtype == CODES or (first is not None and is_coded(base, first)):
        said += ", base of codes times scales taken as exact"
    fewest = replace(_noise(once, tuned.shape, 1, said, delta, energies), grid=last)
    if first is None:
        return (fewest,)
    look = partial(_look, once, delta, tuned, base, (last, first), energies, extremes)
    return _stories(fewest, once, base, (last, first), delta, energies, look)


def _stories(
    fewest: Noise,
    once: Steps,
    base: Tensor,
    grids: tuple[Grid, Grid],
    delta: Tensor | None,
    energies: Energies | None,
    look: Callable[..., Look | None],
) -> tuple[Noise, ...]:
    """What a second rounding would add to the first one, on the grids of the tuned and of the base."""
    last, first = grids
    said = fewest.said
    if _alike(first, last):
        return (_copied(fewest, look(alike=True)), fewest)

    twice = _kept(lambda part: _more(base[part], grids).add_(once(part)), base.shape)
    copy = first.bits < last.bits
    how = "taken for a rounded copy" if copy else "rounded to it first"
    doubted = "taken for a rounded copy" if copy else "perhaps rounded to it first"
    most = _noise(twice, base.shape, 1 if copy else 2, f"{said}, base ({first.name}) {how}", delta, energies)
    most = replace(most, doubted=f"{said}, base ({first.name}) {doubted}")
    if most.energy > (1 + _NEGLIGIBLE) * fewest.energy:
        return (replace(most, grid=None if copy else last, base_too=True, jump=look(alike=False)), fewest)
    # Grids that differ in their floors alone, where hardly a value lies: bf16, and bf16 values in an fp16 file.
    return (_copied(fewest, look(alike=True)), fewest) if first.bits == last.bits else (fewest,)


def _copied(fewest: Noise, seen: Look | None) -> Noise:
    """The story of a base that was rounded to the tuned one's grid, too."""
    said = f"{fewest.said}, base a copy rounded to it"
    return replace(fewest.scaled(math.sqrt(2)), said=said, grid=None, far_fetched=True, base_too=True, jump=seen)


def _more(before: Tensor, grids: tuple[Grid, Grid]) -> Tensor:
    """What a second rounding of the base's values adds to the squared steps."""
    last, first = grids
    return last.squared_steps(before).sub_(first.squared_steps(before)).abs_()


def _look(
    steps: Steps,
    delta: Tensor | None,
    tuned: Tensor,
    base: Tensor,
    grids: tuple[Grid, Grid],
    energies: Energies | None,
    extremes: Sequence[float],
    *,
    alike: bool,
) -> Look | None:
    """For jumps, when that is asked for, in rows from all over the matrix, which are kept until then.

    Args:
        steps: the squared steps of the last rounding, which are there already for a small matrix.
        extremes: of the base.
    """
    if delta is None or energies is None or delta.numel() < FEWEST:
        return None
    most = max(grid.squared_step(extreme) for grid in grids for extreme in extremes) / 12
    if hides_jumps(float(energies[0].sum()) / delta.numel(), most):
        return None
    every = max(1, delta.numel() // _SAMPLE)
    after, before = (whole[::every].clone() if every > 1 else whole for whole in (tuned, base))
    known = steps(slice(None)) if delta.numel() <= _BLOCK_ENTRIES else None

    def look() -> Jump | None:
        once = (grids[0].squared_steps(after) if known is None else known) / 12
        more = once if alike else _more(before, grids).div_(12)
        parts = (delta[::every].square(), before.to(torch.float64, copy=True).abs_(), once, more)
        return jump(*(part.flatten() for part in parts))

    return look


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
            doubted="; ".join(dict.fromkeys(noise.said_in_doubt for noise in told)),
            known=any(noise.known for noise in told),
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


def _extremes(matrix: Tensor) -> list[float]:
    """The least and the largest entry; NaN where there is one."""
    return [float(extreme) for extreme in torch.aminmax(matrix)]  # a sum would make a float64 copy


def _noise(
    steps: Steps, shape: torch.Size, roundings: int, said: str, delta: Tensor | None, energies: Energies | None
) -> Noise:
    """The story's noise, from the squared steps at the entries; no row or column has more of it than energy."""
    rows, columns, highest = _variance_sums(steps, shape)
    if energies is not None:
        row_energies, column_energies, largest = energies
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
    if _may_spike(rows, columns, highest * roundings / 4, edge):
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
    height = max(1, _BLOCK_ENTRIES // shape[1])
    rows, highest, columns = [], [], torch.zeros(())
    for start in range(0, shape[0], height):
        steps = entries(slice(start, start + height))
        rows.append(steps.sum(1))
        highest.append(steps.amax(1))
        columns = steps.sum(0) if start == 0 else columns.add_(steps.sum(0))
    # Only now: on a card every number that is looked at waits for all that was asked before.
    of_rows, most = (rows[0], highest[0]) if len(rows) == 1 else (torch.cat(rows), torch.cat(highest))
    return of_rows.cpu().numpy(), columns.cpu().numpy(), most.cpu().numpy()


def _energies(delta: Tensor) -> Energies:
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


def _may_spike(rows: np.ndarray, columns: np.ndarray, largest: np.ndarray, edge: float) -> bool:
    r"""Whether any entry can make a value above the edge, from the largest θ² of each row alone.

    (θ² + r)(θ² + c)/θ² grows with c, which is less than θ⁴/r where an entry stands out, and then with θ².
    """
    largest, rows = largest[largest > 0], rows[largest > 0]
    with np.errstate(over="ignore"):
        beside = np.minimum(columns.max(), np.square(largest) / np.maximum(rows, _LEAST))
        return bool((((largest + rows) * (largest + beside) / largest) * _WIDER > edge**2).any())


def _spike(
    steps: Steps, rows: np.ndarray, columns: np.ndarray, highest: np.ndarray, roundings: int, delta: Tensor | None
) -> float:
    r"""The largest value that the error of one entry, at most θ, makes among the others of its row and column.

    θ² is step²/4, and twice Σ step²/4 for two roundings. It stands out if θ⁴ > rᵢcⱼ, then as
    √((θ² + rᵢ)(θ² + cⱼ))/θ (Benaych-Georges & Nadakuditi 2012).
    """
    largest, least = 0.0, columns[columns > 0].min(initial=math.inf)
    suspect = np.square(highest * roundings / 4) > rows * least
    some = np.flatnonzero(suspect)
    height = max(1, _BLOCK_ENTRIES // len(columns))
    for start in range(0, len(some), height):
        block = some[start : start + height]
        largest_errors = steps(block).mul(roundings / 4)
        if delta is not None:
            largest_errors = torch.minimum(largest_errors, delta[block].square())
        squared = largest_errors.cpu().numpy()
        i, j = np.nonzero(np.square(squared) > rows[block, None] * columns)
        if len(i):
            theta, r, c = squared[i, j], rows[block[i]], columns[j]
            largest = max(largest, float(((theta + r) * (theta + c) / theta).max()))
    return math.sqrt(largest)
