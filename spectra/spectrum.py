"""`Spectrum`: the singular values, and some vectors, of one update, and the statuses that a result can have."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from spectra import naming, text
from spectra.lazy import numpy as np
from spectra.printing import printed

_VALUES = 5  # singular values that are shown

Status = Literal[
    "ok",
    "unchanged",
    "nonfinite",
    "shape_mismatch",
    "unsupported",
    "unreadable",
    "too_large",
    "failed",
]
STATUSES: tuple[Status, ...] = (
    "ok", "unchanged", "nonfinite", "shape_mismatch", "unsupported", "unreadable", "too_large", "failed",
)  # fmt: skip
DONE: tuple[Status, ...] = ("ok", "unchanged")


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values, and some vectors, of one ΔW = U Σ Vᵀ, with how they came about.

    Attributes:
        name: the weight's name.
        shape: (out, in).
        status: "ok", "unchanged" (ΔW = 0), or why there are no numbers; `reason` says it in words.
        S: singular values, descending, float64; empty unless the status is ok or unchanged.
        U: left singular vectors (out, k), or None where none exist or none are loaded.
        Vh: right singular vectors, transposed (k, in), or None.
        norm: ‖ΔW‖_F of the whole update, also where S holds only its top.
        max_rank: the rank that the form of ΔW allows.
        noise_edge: values below it may be storage rounding and nothing else; None where unknown.
        noise_energy: ‖·‖_F² of the rounding errors that are expected; None where unknown.
        base_rounding: whether an error of the base's own rounding is in ΔW, and so in every other update of that base.
        rounding: which grids the stored values were found on, and what was concluded from it; "" where unknown.
        method: the solver that gave the numbers, and the ones that failed before it.
        note: what the number stands for where that is not simply tuned − base.
        base_norm: ‖W₀‖_F, or None.
        base_cosine: cos(W₀ + ΔW, W₀), or None; a fine-tune keeps it above .9, an unrelated weight has about 0.
        unmoved_share: fraction of the entries that are equal in both files, or None.
        moved: fractions of the entries with |ΔW| > 0, > 1e-6 and > 1e-5; None of an update that is given in factors.
        resolution: values at or below it are not resolved by the method; never drawn or counted.
        k: how many singular vectors of each side exist, whether they are loaded or lie on the disk.

    Example:
        >>> spectrum = Spectrum("a.weight", (2, 2), S=[4.0, 3.0])
        >>> spectrum.norm, spectrum.complete, spectrum.k
        (5.0, True, 0)
    """

    name: str
    shape: tuple[int, ...]
    status: Status = "ok"
    S: np.ndarray = field(default_factory=lambda: np.zeros(0))
    U: np.ndarray | None = None
    Vh: np.ndarray | None = None
    norm: float | None = None
    max_rank: int | None = None
    noise_edge: float | None = None
    noise_energy: float | None = None
    rounding: str = ""
    base_rounding: bool = False
    method: str = ""
    reason: str = ""
    note: str = ""
    base_norm: float | None = None
    base_cosine: float | None = None
    unmoved_share: float | None = None
    resolution: float = 0.0
    k: int = 0
    moved: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "S", np.asarray(self.S, dtype=np.float64))
        if self.U is not None:
            put(self, "U", np.asarray(self.U))
            put(self, "k", int(self.U.shape[1]))
        if self.Vh is not None:
            put(self, "Vh", np.asarray(self.Vh))
        if self.moved is not None:
            put(self, "moved", tuple(self.moved))
        put(self, "shape", tuple(map(int, self.shape)))
        if self.max_rank is None:
            put(self, "max_rank", min(self.shape) if self.shape else 0)
        if self.norm is None and self.status in DONE:
            largest = float(np.abs(self.S).max(initial=0.0))
            unit = 1.0 if largest == 0 or 1e-70 < largest < 1e70 else largest  # else squares leave float64's range
            put(self, "norm", unit * float(np.sqrt(np.square(self.S / unit).sum())))

    @property
    def role(self) -> str:
        """The weight's role, such as "v_proj"."""
        return naming.role_of(self.name)

    @property
    def layer(self) -> int | None:
        """The index of its layer, or None."""
        return naming.layer_of(self.name)

    @property
    def complete(self) -> bool:
        """Whether S holds every singular value that can differ from zero."""
        return self.status in DONE and len(self.S) >= (self.max_rank or 0)

    @cached_property
    def resolved(self) -> np.ndarray:
        """The singular values above the method's resolution, descending."""
        return self.S[self.resolution < self.S]

    @cached_property
    def settled(self) -> np.ndarray:
        """All values that are there, those that are not resolved as zero."""
        return np.where(self.resolution < self.S, self.S, 0.0)

    @cached_property
    def relative_energies(self) -> np.ndarray:
        """(σ/σ₁)², of a spectrum that is not zero."""
        return np.square(self.S / self.S[0])

    @cached_property
    def cumulative_energies(self) -> np.ndarray:
        """Σ_{i≤k} (σᵢ/σ₁)² for every k, of a spectrum that is not zero."""
        return np.cumsum(self.relative_energies)

    @property
    def rank(self) -> int:
        """The number of resolved singular values."""
        return len(self.resolved)

    @property
    def signal_rank(self) -> int:
        """The number of resolved singular values above the storage-rounding edge, where one is known."""
        if not self.noise_edge and self.resolution >= 0:
            return self.rank
        return int((self.resolved > (self.noise_edge or 0.0)).sum())

    def gap(self, k: int) -> float:
        """(σ_k − σ_{k+1}) / σ_k: how far the top k directions stand apart from the rest; NaN where it is not known.

        An error ε in ΔW turns the top k directions by about ε/(σ_k − σ_{k+1}); at 0 they are not determined.

        Example:
            >>> spectrum = Spectrum("a.weight", (2, 2), S=[4.0, 3.0])
            >>> spectrum.gap(1), spectrum.gap(2)
            (0.25, 1.0)

        Reference: Davis & Kahan 1970; Wedin 1972 (the sin θ theorems).
        """
        if not 1 <= k <= len(self.S) or self.S[k - 1] == 0 or (k == len(self.S) and not self.complete):
            return float("nan")
        following = self.S[k] if k < len(self.S) else 0.0
        return float((self.S[k - 1] - following) / self.S[k - 1])

    def __repr__(self) -> str:
        if self.status != "ok":
            return f"Spectrum({printed(self.name)}, {printed(text.with_reason(self.status, self.reason))})"
        top = f"σ₁ = {self.S[0]:.4g}, " if len(self.S) else ""
        vectors = f", top {self.k} vectors" if self.k else ""
        return (
            f"Spectrum({printed(self.name)}, {text.size(self.shape)}, {top}‖ΔW‖_F = {self.norm:.4g}, "
            f"rank {_rank_of(self)}{vectors})"
        )

    def _repr_html_(self) -> str:
        facts: dict[str, object] = {
            "shape": text.size(self.shape),
            "status": text.with_reason(self.status, self.reason),
        }
        if self.norm is not None:
            share = f" = {self.norm / self.base_norm:.3g} ‖W₀‖_F" if self.base_norm else ""
            facts |= {"‖ΔW‖_F": f"{self.norm:.4g}{share}", "rank": _rank_of(self)}
        if self.noise_edge:
            facts["above the rounding edge"] = f"{self.signal_rank} values over {self.noise_edge:.3g}"
        if self.rounding:
            facts["rounding"] = self.rounding
        if len(self.S):
            more = ["…"] * (len(self.S) > _VALUES)
            facts["σ"] = ", ".join([f"{value:.4g}" for value in self.S[:_VALUES]] + more)
        if self.k:
            facts["vectors"] = f"the top {self.k}"
        return text.page(f"Spectrum: {self.name}", facts | {"method": self.method, "note": self.note})


def _rank_of(spectrum: Spectrum) -> str:
    """The rank beside the largest that is possible; a lower bound where only the top is there.

    >>> _rank_of(Spectrum("a", (3, 4), S=[2.0, 1.0, 0.0])), _rank_of(Spectrum("a", (3, 4), S=[2.0, 1.0]))
    ('2 of 3', 'at least 2 of 3')
    """
    return f"{'' if spectrum.complete else 'at least '}{spectrum.rank} of {spectrum.max_rank}"


def times_power(value: float, exponent: int) -> float:
    """2^e · value; infinite where that is more than float64 holds, which a ratio of two sizes may be.

    >>> times_power(3.0, 2), times_power(-1.0, 2000)
    (12.0, -inf)
    """
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)
