"""Do two updates use the same directions? Grassmann similarity of their top singular subspaces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float64

from spectra import naming, text
from spectra.deltas.relatedness import unrelated_note
from spectra.errors import SelectionError
from spectra.printing import printed
from spectra.spectrum import Spectrum

Side = Literal["left", "right"]
SIDES: tuple[Side, ...] = get_args(Side)
_TIE = 1e-7  # of σ_k: a smaller gap leaves the computed directions uncertain by a thousandth and more


@dataclass(frozen=True, eq=False)
class SubspaceSimilarity:
    """φ(i, j) of the top-i directions of one update and the top-j of another, for i, j = 1 … k_used.

    Attributes:
        name: the weight's name, or what was pooled.
        side: "left" (out) or "right" (in).
        k_used: how many directions were compared; less than asked where the rank or noise forbids more.
        grid: (k_used, k_used), φ ∈ [0, 1]; entry [i − 1, j − 1] is φ(i, j).
        chance: (k_used, k_used), the expectation for random subspaces, max(i, j)/d.
        angles: principal angles between the two top-k_used subspaces, ascending, in radians.
        note: why k_used is less than asked, what was pooled, or where φ is not determined; "" for nothing.
        other: the second update's name where it is of another weight, else "".
        gap: the smaller of the two updates' (σ_k − σ_{k+1})/σ_k at k_used; NaN where it is not known.
    """

    name: str
    side: Side
    k_used: int
    grid: np.ndarray
    chance: np.ndarray
    angles: np.ndarray
    note: str = ""
    other: str = ""
    gap: float = float("nan")

    @property
    def title(self) -> str:
        """The weight's name; where two were compared, both."""
        return f"{self.name} against {self.other}" if self.other else self.name

    @property
    def role(self) -> str:
        """The weight's role, such as "v_proj"; both where two were compared: "q_proj against k_proj"."""
        own, other = naming.role_of(self.name), naming.role_of(self.other) if self.other else ""
        return f"{own} against {other}" if other and other != own else own

    @property
    def layer(self) -> int | None:
        """The index of its layer, or None."""
        return naming.layer_of(self.name)

    @property
    def phi(self) -> float:
        """φ(k_used, k_used)."""
        return float(self.grid[-1, -1])

    def __repr__(self) -> str:
        note = f", {self.note}" if self.note else ""
        return f"SubspaceSimilarity({printed(self.title)}, {self.side}, {_corner(self)}{printed(note)})"

    def _repr_html_(self) -> str:
        axis = {"left": "left singular vectors (out)", "right": "right singular vectors (in)"}
        facts: dict[str, object] = {
            "side": axis[self.side],
            "directions": f"k = {self.k_used}",
            "gap behind them": "" if math.isnan(self.gap) else f"{self.gap:.2g} σ_k",
        }
        rows = []
        if self.grid.size:
            corners = {1: (0, 0), self.k_used: (-1, -1)}
            rows = [(f"φ({k}, {k})", f"{self.grid[at]:.3f}", f"{self.chance[at]:.3f}") for k, at in corners.items()]
        return text.page(
            f"SubspaceSimilarity: {self.title}",
            facts | {"note": self.note},
            ("", "value", "chance"),
            rows,
        )


def _corner(similarity: SubspaceSimilarity) -> str:
    """φ(k, k) and its chance level.

    >>> import numpy as np
    >>> one = np.ones((1, 1))
    >>> _corner(SubspaceSimilarity("a", "left", 1, one, one / 4, np.zeros(1)))
    'φ(1, 1) = 1.000, chance 0.250'
    """
    k = similarity.k_used
    if not similarity.grid.size:
        return "nothing compared"
    return f"φ({k}, {k}) = {similarity.phi:.3f}, chance {similarity.chance[-1, -1]:.3f}"


def subspace_similarity(a: Spectrum, b: Spectrum, *, top: int = 30, side: Side = "left") -> SubspaceSimilarity:
    r"""φ(i, j) = ‖U_Aⁱᵀ U_Bʲ‖_F² / min(i, j) for all i, j ≤ k, with its chance level.

    Equal to 1 where the smaller subspace lies in the larger one, 0 where they are orthogonal, and
    max(i, j)/d on average for random subspaces of ℝᵈ. It does not depend on the basis, so it is
    unchanged by (A, B) → (RA, BR⁻¹). k is `top`, clamped to the resolved values of both updates, to
    those above the storage-rounding edge, and to the vectors that are kept. Where two neighbouring singular
    values are equal, the directions up to there are not determined, and the note says so.

    Args:
        a: one update with vectors.
        b: another update of the same weight, or of one that shares its inputs or outputs.
        top: how many directions.
        side: "left" compares columns of U (out), "right" rows of Vh (in).

    Raises:
        SelectionError: no vectors are kept, the shapes differ, or nothing is left to compare.

    Example:
        >>> e = np.eye(3)
        >>> a = Spectrum("w", (3, 3), S=[3.0, 2.0, 0.0], U=e[:, [0, 1]], Vh=e[[0, 1]])
        >>> b = Spectrum("w", (3, 3), S=[3.0, 2.0, 0.0], U=e[:, [0, 2]], Vh=e[[0, 2]])
        >>> subspace_similarity(a, b, top=2).grid.tolist()
        [[1.0, 1.0], [1.0, 0.5]]

    Reference: Hu et al. 2021, §7.2 (right vectors) and App. G (left). The identity printed there,
    φ = (1 − d²)/p, is an erratum for φ = 1 − d²/p with d the projection metric.
    """
    if side not in SIDES:
        raise SelectionError(f"side={side!r} is not left or right")
    if top < 1:
        raise SelectionError(f"top = {top} is not a positive number of directions")
    for spectrum in (a, b):
        if spectrum.status != "ok" or spectrum.U is None:
            absent = "no singular vectors are kept; decompose with top=K (--top)"
            why = "its vectors are not loaded; load them with vectors=True" if spectrum.k else spectrum.reason or absent
            raise SelectionError(f"{spectrum.name} cannot be compared: {spectrum.status}: {why}")
    basis_a, basis_b = (s.U if side == "left" else s.Vh.T for s in (a, b))  # type: ignore[union-attr]
    if basis_a.shape[0] != basis_b.shape[0]:  # type: ignore[union-attr]
        raise SelectionError(f"{a.name} is {a.shape} in one update and {b.shape} in the other: cannot be compared")
    k, note = _clamp(a, b, top)
    grid = similarity_grid(basis_a[:, :k], basis_b[:, :k])  # type: ignore[index]
    return SubspaceSimilarity(
        name=a.name,
        side=side,
        k_used=k,
        grid=grid,
        chance=chance_level(k, basis_a.shape[0]),  # type: ignore[union-attr]
        angles=principal_angles(basis_a[:, :k], basis_b[:, :k]),  # type: ignore[index]
        note="; ".join(
            filter(None, (_unrelated(a, b), note, _tied("first", a, k), _tied("second", b, k), _shared_error(a, b)))
        ),
        other=b.name if b.name != a.name else "",
        gap=float(np.min([a.gap(k), b.gap(k)])),
    )


def _unrelated(a: Spectrum, b: Spectrum) -> str:
    """Where an update is none: tuned − base of two that share a wrong base agrees in all directions, the base's."""
    which = [
        name
        for name, spectrum in (("first", a), ("second", b))
        if unrelated_note(spectrum.base_cosine, spectrum.unmoved_share)
    ]
    return f"{' and '.join(which)} update unrelated to the base" if which else ""


def _shared_error(a: Spectrum, b: Spectrum) -> str:
    """Said where the rounding error of the base is in both updates: there it is the same, whatever was trained."""
    if not (a.base_rounding and b.base_rounding):
        return ""
    return (
        "both updates contain the rounding error of their base, whose values lie on another grid than theirs: if it is "
        "one base, directions near the rounding edge agree for that alone; take the base as it was tuned"
    )


def _tied(which: str, spectrum: Spectrum, k: int) -> str:
    """Where the top directions of an update are not determined, up to k; "" for nowhere."""
    for i in range(1, k + 1):
        if spectrum.gap(i) <= _TIE:
            return (
                f"σ_{i} and σ_{i + 1} of the {which} update are equal to {_TIE:g}: "
                f"its top {i} directions, and φ there, are not determined"
            )
    return ""


def similarity_grid(
    basis_a: Float64[np.ndarray, "d k"], basis_b: Float64[np.ndarray, "d l"]
) -> Float64[np.ndarray, "k l"]:
    r"""φ(i, j) for all i ≤ k, j ≤ l at once: 2-D cumulative sums of (U_AᵀU_B)², over min(i, j).

    Args:
        basis_a: orthonormal columns, the most important first.
        basis_b: likewise.

    Example:
        >>> similarity_grid(np.eye(4)[:, :2], np.eye(4)[:, 1:2]).tolist()
        [[0.0], [1.0]]

    Reference: Hu et al. 2021, eq. 4.
    """
    energy = np.square(basis_a.T @ basis_b).cumsum(0).cumsum(1)
    i, j = np.indices(energy.shape) + 1
    return np.clip(energy / np.minimum(i, j), 0.0, 1.0)


def chance_level(k: int, dimension: int) -> Float64[np.ndarray, "k k"]:
    r"""E φ(i, j) = max(i, j)/d for independent, uniformly random subspaces of ℝᵈ.

    Example:
        >>> chance_level(2, 4).tolist()
        [[0.25, 0.5], [0.5, 0.5]]
    """
    i, j = np.indices((k, k)) + 1
    return np.maximum(i, j) / dimension


def principal_angles(
    basis_a: Float64[np.ndarray, "d k"], basis_b: Float64[np.ndarray, "d l"]
) -> Float64[np.ndarray, " s"]:
    r"""The s = min(k, l) principal angles between two subspaces, ascending, in radians.

    cos θ are the singular values of U_AᵀU_B. Below 45° the angle is taken from
    sin θ = σ((I − U_A U_Aᵀ) U_B), since the cosine does not resolve small angles.

    Example:
        >>> principal_angles(np.eye(3)[:, :1], np.eye(3)[:, 1:2]).tolist() == [np.pi / 2]
        True

    Reference: Björck & Golub 1973; Knyazev & Argentati 2002 (small angles by the sine).
    """
    if basis_a.shape[1] < basis_b.shape[1]:
        basis_a, basis_b = basis_b, basis_a
    inner = basis_a.T @ basis_b
    cosines = np.linalg.svd(inner, compute_uv=False)
    sines = np.linalg.svd(basis_b - basis_a @ inner, compute_uv=False)[::-1]
    from_cosine = np.arccos(np.clip(cosines, 0.0, 1.0))
    from_sine = np.arcsin(np.clip(sines, 0.0, 1.0))
    return np.where(np.square(cosines) >= 0.5, from_sine, from_cosine)


def pool(similarities: list[SubspaceSimilarity], name: str) -> SubspaceSimilarity:
    """The mean φ over several matrices, as far as all of them reach.

    Raises:
        SelectionError: there is nothing to pool, or the sides differ.
    """
    if not similarities or len({item.side for item in similarities}) != 1:
        raise SelectionError(f"{name}: {len(similarities)} similarities of one side are needed to pool")
    k = min(item.k_used for item in similarities)
    widest = max(item.k_used for item in similarities)
    short = "" if k == widest else f", k clamped to {k} by the lowest of them"
    said = [item.note for item in similarities if item.note]
    short += f"; {said[0]} ({len(said)} of them)" if said else ""
    return SubspaceSimilarity(
        name=name,
        side=similarities[0].side,
        k_used=k,
        grid=np.mean([item.grid[:k, :k] for item in similarities], axis=0),
        chance=np.mean([item.chance[:k, :k] for item in similarities], axis=0),
        angles=np.mean([item.angles[:k] for item in similarities], axis=0),
        note=f"mean over {text.matrices(len(similarities))}{short}",
        gap=float(np.min([item.gap for item in similarities])),
    )


def _clamp(a: Spectrum, b: Spectrum, top: int) -> tuple[int, str]:
    """How many directions can be compared, and why not more."""
    limits = []
    for which, spectrum in (("first", a), ("second", b)):
        limits.append((spectrum.rank, f"the {which} update has {spectrum.rank} resolved singular values"))
        limits.append(
            (spectrum.signal_rank, f"the {which} update has {spectrum.signal_rank} values above the rounding edge")
        )
        limits.append((spectrum.k, f"{spectrum.k} vectors of the {which} update are kept"))
    k, why = min(limits, key=lambda limit: limit[0])
    if k == 0:
        raise SelectionError(f"{a.name} cannot be compared: {why}")
    return (top, "") if k >= top else (k, f"k clamped from {top} to {k}: {why}")
