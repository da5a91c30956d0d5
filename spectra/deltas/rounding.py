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
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from spectra.deltas import edges
from spectra.deltas.edges import Steps
from spectra.deltas.grids import UNLIMITED, Grid, grids_of, is_coded
from spectra.deltas.jumps import FEWEST, Jump, hides_jumps, jump
from spectra.deltas.separable import separable_edges
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

CODES = "codes"  # the type of values that are codes times scales, whatever they are decoded to
_SQUARED = 2.0**500  # what can be squared and summed
_SAMPLE = 2**18  # entries in which a jump is looked for
# The 99 % quantile of the Tracy–Widom law (real case) is 2.02; relative to the edge of σ for a square matrix
# of size s one unit of it is 0.315·s^(−2/3) (Johnstone 2001).
_FLUCTUATION = 2.02 * 0.315
# Real weights are not quite separable: over MiniLM's 36 matrices in bf16 and fp16 the largest value of the
# rounding errors came up to 2 % above the edge of the separable model.
_MARGIN = 1.02
_SLACK = 1.1  # over the energy that a row or column has: chance lowers half of them
_NEGLIGIBLE = 0.02  # share of the energy below which a second rounding is no story of its own: 1 % of the edge


Look = Callable[[], Jump | None]
Energies = tuple[np.ndarray, np.ndarray, np.ndarray]  # of the rows and of the columns; each row's largest square


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
    return rounding_noises(tuned[None], dtype, base[None], base_dtype, None if delta is None else delta[None])[0]


def rounding_noises(
    tuned: Tensor, dtype: str, base: Tensor, base_dtype: str, delta: Tensor | None = None
) -> list[tuple[Noise, ...]]:
    """The same of each pair in stacks (b, m, n): what the others are has no influence on the numbers of one."""
    found: list[tuple[Noise, ...]] = [()] * len(tuned)
    if tuned.numel() == 0:
        return found
    alike: dict[tuple[Grid, Grid | None, bool], list[int]] = {}
    extremes = _extremes(tuned, base)
    known = _finite(extremes, dtype)
    of_tuned, of_base = (_grids(stack[known], of) for stack, of in ((tuned, dtype), (base, base_dtype)))
    for place, (last, coded), (first, base_coded) in zip(known.tolist(), of_tuned, of_base, strict=True):
        if coded:
            said = "tuned holds codes times scales, whose rounding is not known"
            found[place] = (Noise(0.0, 0.0, said, known=False),)
        elif last is not None:
            alike.setdefault((last, first, base_coded), []).append(place)
    for grids, places in alike.items():
        pairs = _Pairs.of(tuned, base, delta, places, extremes[2:, places], *grids)
        for place, stories in zip(places, pairs.stories(), strict=True):
            found[place] = stories
    return found


def _extremes(*stacks: Tensor) -> np.ndarray:
    """The least and the largest entry of each matrix, stack by stack (2·stacks, b), float64; NaN where there is one."""
    found = []
    for stack in stacks:  # a sum would make a float64 copy
        pair = torch.aminmax(stack) if len(stack) == 1 else torch.aminmax(stack.flatten(1), dim=1)
        found += [extreme.reshape(-1).to(torch.float64) for extreme in pair]
    return torch.stack(found).cpu().numpy()


def _finite(extremes: np.ndarray, dtype: str) -> np.ndarray:
    """Which pairs of weights have finite entries alone, whose squares are finite, too."""
    most = _SQUARED if dtype == "F64" else np.inf
    sizes = np.abs(extremes).max(0)
    return np.flatnonzero(np.isfinite(sizes) & (sizes <= most))


def _grids(stack: Tensor, dtype: str) -> list[tuple[Grid | None, bool]]:
    """The grid of each matrix, None for a type of which none is known, and whether it holds codes times scales."""
    if dtype == CODES or not len(stack):
        return [(None, True)] * len(stack)
    grids = grids_of(stack, dtype)
    return [(grid, grid is not None and is_coded(matrix, grid)) for matrix, grid in zip(stack, grids, strict=True)]


@dataclass(frozen=True)
class _Pairs:
    """Stacks (b, m, n) of tuned and base weights that have the same two grids, and what rounding did to their updates.

    Attributes:
        tuned: the tuned weights.
        base: the base weights.
        delta: tuned − base, or None.
        extremes: the least and the largest entry of each base (2, b).
        last: the grid of the tuned weights.
        first: that of the base; None where none is known.
        coded: whether the base holds codes times scales.
    """

    tuned: Tensor
    base: Tensor
    delta: Tensor | None
    extremes: np.ndarray
    last: Grid
    first: Grid | None
    coded: bool

    @classmethod
    def of(
        cls,
        tuned: Tensor,
        base: Tensor,
        delta: Tensor | None,
        places: Sequence[int],
        extremes: np.ndarray,
        last: Grid,
        first: Grid | None,
        coded: bool,
    ) -> _Pairs:
        """Some of larger stacks; all of them are not copied."""
        if len(places) < len(tuned):
            tuned, base, delta = tuned[places], base[places], None if delta is None else delta[places]
        return cls(tuned, base, delta, extremes, last, first, coded)

    @cached_property
    def energies(self) -> Energies | None:
        """Of the updates."""
        delta = self.delta
        return None if delta is None else edges.sums(lambda part: delta[part].square(), delta.shape)

    @cached_property
    def once(self) -> Steps:
        """The squared steps of the last rounding."""
        last, tuned = self.last, self.tuned  # not this object, which would hold itself and all weights
        return edges.kept(lambda part: last.squared_steps(tuned[part]), tuned.shape)

    def stories(self) -> list[tuple[Noise, ...]]:
        """What rounding would give of each, the story with the most noise first."""
        said = f"tuned on the {self.last.name} grid"
        if self.coded:
            said += ", base of codes times scales taken as exact"
        fewest = [replace(noise, grid=self.last) for noise in self._noises(self.once, 1, said)]
        if self.first is None:
            return [(noise,) for noise in fewest]
        if _alike(self.first, self.last):
            return [(_copied(noise, self._look(i, alike=True)), noise) for i, noise in enumerate(fewest)]
        return self._with_another_grid(fewest, self.first)

    def _with_another_grid(self, fewest: Sequence[Noise], first: Grid) -> list[tuple[Noise, ...]]:
        """What a second rounding would add to the first one, where the two grids are not the same."""
        last, base, once = self.last, self.base, self.once
        twice = edges.kept(lambda part: _more(base[part], (last, first)).add_(once(part)), base.shape)
        copy = first.bits < last.bits
        how = "taken for a rounded copy" if copy else "rounded to it first"
        doubted = "taken for a rounded copy" if copy else "perhaps rounded to it first"
        said = f"{fewest[0].said}, base ({first.name}) "
        found: list[tuple[Noise, ...]] = []
        for i, (most, least) in enumerate(zip(self._noises(twice, 1 if copy else 2, said + how), fewest, strict=True)):
            if most.energy > (1 + _NEGLIGIBLE) * least.energy:
                grid, seen = None if copy else last, self._look(i, alike=False)
                found.append((replace(most, doubted=said + doubted, grid=grid, base_too=True, jump=seen), least))
            else:  # floors alone differ, where hardly a value lies: bf16, and bf16 values in an fp16 file
                is_copy = first.bits == last.bits
                found.append((_copied(least, self._look(i, alike=True)), least) if is_copy else (least,))
        return found

    def _noises(self, steps: Steps, roundings: int, said: str) -> list[Noise]:
        """The story's noise, from the squared steps at the entries; no row or column has more of it than energy."""
        rows, columns, highest = edges.variance_sums(steps, self.tuned.shape)
        if self.energies is not None:
            row_energies, column_energies, largest = self.energies
            rows, columns = np.minimum(rows, _SLACK * row_energies), np.minimum(columns, _SLACK * column_energies)
            highest = np.minimum(highest, 4 * largest)
        totals = np.minimum(rows.sum(1), columns.sum(1))
        some = np.flatnonzero(totals > 0)
        found = [Noise(0.0, 0.0, said)] * len(rows)
        if not len(some):
            return found
        rows, columns, highest, totals = rows[some], columns[some], highest[some], totals[some]
        if self.energies is not None:
            rows *= (totals / rows.sum(1))[:, None]
            columns *= (totals / columns.sum(1))[:, None]
        tops = separable_edges(rows, columns)
        top_rows, top_columns = rows.argmax(1), columns.argmax(1)
        chance = np.maximum(
            edges.wobble(steps(_each(some, top_rows)), rows.max(1), tops, roundings),
            edges.wobble(steps(_each(some, slice(None), top_columns)), columns.max(1), tops, roundings),
        )
        tops *= (_MARGIN + _FLUCTUATION * min(self.tuned.shape[1:]) ** (-2 / 3)) * chance
        for i in np.flatnonzero(edges.may_spike(rows, columns, highest * roundings / 4, tops)):
            place = int(some[i])
            delta, own = None if self.delta is None else self.delta[place], partial(edges.own, steps, place)
            tops[i] = max(tops[i], edges.spike(own, rows[i], columns[i], highest[i], roundings, delta))
        for place, edge, energy in zip(some.tolist(), tops.tolist(), rows.sum(1).tolist(), strict=True):
            found[place] = Noise(edge, energy, said)
        return found

    def _look(self, i: int, *, alike: bool) -> Look | None:
        """For jumps in one of the pairs, when that is asked for, in rows from all over the matrix, which are kept.

        Args:
            i: which.
            alike: whether both grids are the same.
        """
        if self.delta is None or self.energies is None or self.delta[i].numel() < FEWEST:
            return None
        last, first, delta = self.last, cast("Grid", self.first), self.delta[i]
        largest = self.extremes[:, i].tolist()
        most = max(grid.squared_step(extreme) for grid in (last, first) for extreme in largest) / 12
        if hides_jumps(float(self.energies[0][i].sum()) / delta.numel(), most):
            return None
        every = max(1, delta.numel() // _SAMPLE)
        after, before = (whole[i, ::every].clone() if every > 1 else whole[i] for whole in (self.tuned, self.base))
        known = self.once(i) if delta.numel() <= edges.BLOCK_ENTRIES else None

        def look() -> Jump | None:
            once = (last.squared_steps(after) if known is None else known) / 12
            more = once if alike else _more(before, (last, first)).div_(12)
            parts = (delta[::every].square(), before.to(torch.float64, copy=True).abs_(), once, more)
            return jump(*(part.flatten().cpu().numpy() for part in parts))

        return look


def _each(places: np.ndarray, *part: Any) -> edges.Part:
    """A row or column of each of some matrices of a stack; of one alone by its number, which no card waits for."""
    if len(places) > 1:
        return (places, *part)
    place = int(places[0])
    return (slice(place, place + 1), *(one if isinstance(one, slice) else int(one[0]) for one in part))


def _copied(fewest: Noise, seen: Look | None) -> Noise:
    """The story of a base that was rounded to the tuned one's grid, too."""
    said = f"{fewest.said}, base a copy rounded to it"
    return replace(fewest.scaled(math.sqrt(2)), said=said, grid=None, far_fetched=True, base_too=True, jump=seen)


def _more(before: Tensor, grids: tuple[Grid, Grid]) -> Tensor:
    """What a second rounding of the base's values adds to the squared steps."""
    last, first = grids
    return last.squared_steps(before).sub_(first.squared_steps(before)).abs_()


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
