"""What may have gone wrong with a merge, in words: each function knows the trace of one mistake."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from spectra.deltas.recipes import OnBase
from spectra.lazy import torch
from spectra.merges.bounds import Arithmetic, inside
from spectra.merges.change import Change
from spectra.merges.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor

_ALIKE = 0.6  # cosine from which on two updates are taken for one; independent ones of 16 × 16 stay under .4
_LEVELS = 16  # of four bits
_CODED = 32  # entries that one scale of a 4-bit code is for, at least
_MOST_BLOCKS = 4096  # of coded entries that are looked at
_NEARLY = 0.02  # of a second application, as far as the first one's rounding may change it
_FEW = 4  # rows or entries that are named


def of_scales(change: Change) -> dict[float, str]:
    """s → the mistake that merges s·ΔW.

    Example:
        >>> import torch
        >>> from spectra.deltas.delta import WeightDelta
        >>> delta = WeightDelta.from_factors("a.weight", torch.ones(2, 1), torch.ones(1, 2))
        >>> of_scales(Change([delta], torch.zeros(2, 2)))
        {2.0: 'applied twice', -1.0: 'subtracted: wrong sign, or --base and --merged swapped'}
    """
    causes = {2.0: ["applied twice"], -1.0: ["subtracted: wrong sign, or --base and --merged swapped"]}

    def add(scale: float, words: str) -> None:
        if scale > 0 and not math.isclose(scale, 1.0, rel_tol=1e-3):
            causes.setdefault(next((s for s in causes if math.isclose(s, scale, rel_tol=1e-3)), scale), []).append(
                words
            )

    own = getattr(change.term or change.recipe, "scale", None)
    if own:
        add(1 / abs(own), "α/r ignored: merged with s = 1")
        add(abs(own), "α/r applied twice")
    if change.term is not None:
        r = change.term.width
        add(1 / math.sqrt(r), "rsLoRA ignored: α/r in place of α/√r")
        add(math.sqrt(r), "α/√r (rsLoRA) in place of α/r, or α not divided by √r")
        add(float(r), "α not divided by r")
    return {scale: "; or ".join(words) for scale, words in causes.items()}


def place_of_damage(weights: Weights, how: Arithmetic) -> str:
    """Which few rows, columns or entries of M are not what W₀ + ΔW may be stored as; "" where it is no few."""
    wrong = torch.cat([~block for block in inside(weights, how)])
    rows, columns = (wrong.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    count = int(wrong.count_nonzero())
    if not count:
        return ""
    if count <= _FEW:
        places = ", ".join(f"[{i}, {j}]" for i, j in wrong.nonzero().tolist())
        return f"{count} of {wrong.numel():,} entries: {places}"
    for kind, numbers, total in (("rows", rows, wrong.shape[0]), ("columns", columns, wrong.shape[1])):
        if len(numbers) <= max(_FEW, total // 8):
            listed = ", ".join(map(str, numbers[:_FEW])) + (", …" if len(numbers) > _FEW else "")
            return f"{len(numbers)} of {total:,} {kind}: {listed}"
    return f"{count:,} of {wrong.numel():,} entries" if count <= wrong.numel() // 100 else ""


def transposed(weights: Weights) -> bool:
    """Whether M − W₀ is more like ΔWᵀ than like ΔW."""
    rows, columns = weights.change.shape
    if rows != columns:
        return False
    update = weights.change.float32()
    squares = along = across = 0.0
    for some in weights.blocks():
        moved = weights.merged[some].double() - weights.base[some].double()
        squares += float(moved.square().sum())
        along += float((moved * update[some]).sum())
        across += float((moved * update.T[some]).sum())
    size = math.sqrt(squares) * float(update.double().norm())
    return size > 0 and across / size > max(_ALIKE, abs(along) / size + 0.1)


def dequantised(weights: Weights, applied: bool) -> bool:
    """Whether M, less ΔW where it was applied, has at most 16 values in each of its blocks, as 4-bit codes give.

    Values that M's rounding, or that of ΔW, cannot tell apart count as one.
    """
    some = slice(0, max(1, _MOST_BLOCKS * _CODED // weights.merged.shape[1]))
    merged = weights.merged[some].double()
    bare = (merged - weights.change.float32(some) if applied else merged).flatten()
    count = bare.numel() // _CODED
    entries, order = bare[: count * _CODED].reshape(count, _CODED).sort(dim=1)
    sizes = merged.abs() + (weights.change.magnitudes(some) if applied else 0.0)
    off = (torch.finfo(weights.merged.dtype).eps * sizes).flatten()[: count * _CODED].reshape(count, _CODED)
    off = off.gather(1, order)
    levels = 1 + (entries.diff(dim=1) > off[:, 1:] + off[:, :-1]).sum(1)
    tells = 4 * off.sum(1) < entries[:, -1] - entries[:, 0]  # else 32 values could not be told apart either
    return 2 * int(tells.count_nonzero()) > count and bool((levels[tells] <= _LEVELS).all())


def applied_again(weights: Weights, how: Arithmetic) -> bool:
    """Whether M is what an update made of W₀ gives if it is made of the merged weight once more."""
    recipe = weights.change.recipe
    if not isinstance(recipe, OnBase):
        return False
    once = (weights.base.double() + weights.change.double()).to(how.kept).double()
    step = recipe.from_base(once).to_dense()
    off = once + step - weights.merged.double()
    return float(off.norm()) < _NEARLY * float(step.norm())


def sketch(weights: Weights) -> Tensor:
    """(M − W₀) · X for a fixed random X (in, 4): alike for matrices that are alike, and small enough to keep."""
    X = probes(weights.merged.shape[1])
    return torch.cat([(weights.merged[rows].double() - weights.base[rows].double()) @ X for rows in weights.blocks()])


def probes(columns: int) -> Tensor:
    """The X of `sketch`, float64."""
    return torch.randn(columns, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def alike(first: Tensor, second: Tensor) -> float:
    """How alike two sketches are: the cosine, 0 for different shapes."""
    if first.shape != second.shape:
        return 0.0
    size = float(first.norm() * second.norm())
    return float((first * second).sum()) / size if size else 0.0


def is_alike(similarity: float) -> bool:
    """Whether two updates are as good as equal, up to a positive scale and rounding."""
    return similarity > _ALIKE
