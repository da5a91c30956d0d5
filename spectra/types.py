"""The nouns of the pipeline as plain frozen data: forms of ΔW, deltas, sources and spectra.

Nothing here imports torch: a `WeightDelta` is a recipe, and listing a model touches no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np

from spectra import display, naming
from spectra.errors import SelectionError
from spectra.forms import Form, LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from spectra.sources.tensors import TensorRef

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


@runtime_checkable
class Recipe(Protocol):
    """Where the numbers of one ΔW are and how to form it: frozen, small and picklable.

    A recipe whose `read` needs more memory for a while than its refs and the form (a permutation, the SVD of the
    base) says how many bytes in a property `reading_bytes`, which is optional.
    """

    @property
    def factored(self) -> bool:
        """True if `read` gives a `LowRank`, False for a `Dense`."""
        ...

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every stored tensor that `read` opens."""
        ...

    def read(self, device: str = "cpu") -> Form:
        """Form ΔW in float64 on the device."""
        ...


@dataclass(frozen=True)
class WeightDelta:
    """One update ΔW as a recipe: nothing is read until `read`.

    Attributes:
        name: the weight's name in the base checkpoint; a part of a fused tensor adds `[part]`.
        shape: (out, in), Linear orientation whatever the storage.
        recipe: how to form it; None if `status` already says that it cannot be done.
        max_rank: min(out, in), or less where the factors say so.
        status: "ok" until read, or why there is nothing to read.
        reason: one sentence that goes with the status.
        note: what the number stands for where that is not simply tuned − base.

    Example:
        >>> import torch
        >>> delta = WeightDelta.from_tensor("a.weight", torch.diag(torch.tensor([3.0, 4.0])))
        >>> delta.shape, delta.max_rank, float(delta.read().to_dense().norm())
        ((2, 2), 2, 5.0)
    """

    name: str
    shape: tuple[int, ...]
    recipe: Recipe | None
    max_rank: int
    status: Status = "ok"
    reason: str = ""
    note: str = ""

    @property
    def role(self) -> str:
        """The weight's role, such as "v_proj"."""
        return naming.role_of(self.name)

    @property
    def layer(self) -> int | None:
        """The index of its layer, or None."""
        return naming.layer_of(self.name)

    @property
    def factored(self) -> bool:
        """Whether `read` gives factors."""
        return self.recipe is not None and self.recipe.factored

    def read(self, device: str = "cpu") -> Form:
        """Form ΔW in float64 on the device; the only place where tensor data is touched.

        Raises:
            SelectionError: the delta has no recipe; its status and reason say why.
            SourceError: a file is gone, changed or broken.
        """
        if self.recipe is None:
            raise SelectionError(f"{self.name} cannot be read: {self.status}: {self.reason}")
        return self.recipe.read(device)

    @classmethod
    def from_tensor(cls, name: str, matrix: Tensor) -> WeightDelta:
        """A delta from a matrix in memory (out, in), for notebooks and tests."""
        from spectra.sources.recipes import InMemory

        return cls._from_form(name, InMemory.of(matrix))

    @classmethod
    def from_factors(cls, name: str, left: Tensor, right: Tensor) -> WeightDelta:
        """A delta left · right from factors in memory (out, r) and (r, in)."""
        from spectra.sources.recipes import InMemory

        return cls._from_form(name, InMemory.of(left, right))

    @classmethod
    def _from_form(cls, name: str, recipe: Recipe) -> WeightDelta:
        form = recipe.read()
        rank = form.left.shape[1] if isinstance(form, LowRank) else min(form.shape)
        return cls(name, form.shape, recipe, min(rank, *form.shape))

    @classmethod
    def refused(cls, name: str, shape: Sequence[int], status: Status, reason: str) -> WeightDelta:
        """A matrix that the user asked for and that cannot be done: it keeps its row in every result."""
        return cls(name, tuple(shape), None, 0, status, reason)

    def __repr__(self) -> str:
        if self.recipe is None:
            return f"WeightDelta({self.name}, {self.status}{': ' + self.reason if self.reason else ''})"
        return (
            f"WeightDelta({self.name}, {display.size(self.shape)}, rank ≤ {self.max_rank}, {display.made_of(self)}"
            f"{', ' + self.note if self.note else ''})"
        )

    def _repr_html_(self) -> str:
        return display.html_of_delta(self)


@dataclass(frozen=True)
class Coverage:
    """What of the two inputs was not paired or not used: name → reason, and warnings.

    `str()` names every one.
    """

    base_only: Mapping[str, str] = field(default_factory=dict)
    tuned_only: Mapping[str, str] = field(default_factory=dict)
    shape_mismatch: Mapping[str, str] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many entries each list has."""
        return {key: len(getattr(self, key)) for key in _COVERAGE_LISTS}

    def __str__(self) -> str:
        lines = [f"warning: {text}" for text in self.warnings]
        for key in _COVERAGE_LISTS:
            listed: Mapping[str, str] = getattr(self, key)
            lines += [f"{key}: {name}: {reason}" for name, reason in listed.items()]
        return "\n".join(lines) or "everything was paired and used"

    def __repr__(self) -> str:
        warnings = f"; warnings: {len(self.warnings)}" if self.warnings else ""
        return f"Coverage({display.left_out(self) or 'everything was paired and used'}{warnings})"

    def _repr_html_(self) -> str:
        return display.html_of_coverage(self)


_COVERAGE_LISTS = tuple(item.name for item in fields(Coverage) if item.name != "warnings")


@dataclass(frozen=True)
class Source:
    """The updates that one tuned model or adapter holds: metadata only, lazily read.

    Attributes:
        kind: the format, such as "checkpoint", "lora", "multilora", "multihead".
        deltas: one `WeightDelta` per matrix.
        coverage: what was not paired or not used.
        tuned: where the update was read from.
        base: where the base was read from, or None.

    Example:
        >>> import torch
        >>> delta = WeightDelta.from_tensor("layers.0.v_proj.weight", torch.eye(2))
        >>> source = Source("checkpoint", (delta,))
        >>> len(source), source["layers.0.v_proj.weight"].layer, source.select("v_proj").kind
        (1, 0, 'checkpoint')
    """

    kind: str
    deltas: tuple[WeightDelta, ...]
    coverage: Coverage = field(default_factory=Coverage)
    tuned: str = ""
    base: str | None = None

    def __iter__(self) -> Iterator[WeightDelta]:
        return iter(self.deltas)

    def __len__(self) -> int:
        return len(self.deltas)

    def __getitem__(self, name: str) -> WeightDelta:
        for delta in self.deltas:
            if delta.name == name:
                return delta
        raise KeyError(f"{name!r} is not among the {len(self)} matrices of {self.tuned or 'this source'}")

    def select(self, patterns: str | Sequence[str]) -> Source:
        """The same source with only the matrices that the patterns mean, as `--layer` does.

        Raises:
            SelectionError: a pattern matches nothing; the message lists what there is.
        """
        wanted = set(naming.select(patterns, [delta.name for delta in self.deltas]))
        return replace(self, deltas=tuple(delta for delta in self.deltas if delta.name in wanted))

    def __repr__(self) -> str:
        left_out, warnings = display.left_out(self.coverage), len(self.coverage.warnings)
        return (
            f"Source({self.kind}, {display.contents([delta.name for delta in self.deltas])}"
            + (f"; not used: {left_out}" if left_out else "")
            + (f"; warnings: {warnings}" if warnings else "")
            + ")"
        )

    def _repr_html_(self) -> str:
        return display.html_of_source(self)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values, and some vectors, of one ΔW = U Σ Vᵀ, with how they came about.

    Attributes:
        name: the weight's name.
        shape: (out, in).
        status: "ok", "unchanged" (ΔW = 0), or why there are no numbers; `reason` says it in words.
        S: singular values, descending, float64; empty unless the status is ok or unchanged.
        U: left singular vectors (out, k), or None.
        Vh: right singular vectors, transposed (k, in), or None.
        norm: ‖ΔW‖_F of the whole update, also where S holds only its top.
        max_rank: the rank that the form of ΔW allows.
        noise_edge: values below it may be storage rounding and nothing else; None where unknown.
        method: the solver that gave the numbers, and the ones that failed before it.
        note: what the number stands for where that is not simply tuned − base.
        base_norm: ‖W₀‖_F, or None.
        unchanged: fraction of entries equal in both files, or None.
        resolution: values at or below it are not resolved by the method; never drawn or counted.

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
    method: str = ""
    reason: str = ""
    note: str = ""
    base_norm: float | None = None
    unchanged: float | None = None
    resolution: float = 0.0

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "S", np.asarray(self.S, dtype=np.float64))
        for side in ("U", "Vh"):
            if getattr(self, side) is not None:
                put(self, side, np.asarray(getattr(self, side)))
        put(self, "shape", tuple(int(size) for size in self.shape))
        if self.max_rank is None:
            put(self, "max_rank", min(self.shape) if self.shape else 0)
        if self.norm is None and self.status in DONE:
            put(self, "norm", float(np.sqrt(np.square(self.S).sum())))

    @property
    def role(self) -> str:
        """The weight's role, such as "v_proj"."""
        return naming.role_of(self.name)

    @property
    def layer(self) -> int | None:
        """The index of its layer, or None."""
        return naming.layer_of(self.name)

    @property
    def k(self) -> int:
        """How many singular vectors are kept."""
        return 0 if self.U is None else int(self.U.shape[1])

    @property
    def complete(self) -> bool:
        """Whether S holds every singular value that can differ from zero."""
        return self.status in DONE and len(self.S) >= (self.max_rank or 0)

    @property
    def resolved(self) -> np.ndarray:
        """The singular values above the method's resolution, descending."""
        return self.S[self.resolution < self.S]

    @property
    def rank(self) -> int:
        """The number of resolved singular values."""
        return len(self.resolved)

    @property
    def signal_rank(self) -> int:
        """The number of resolved singular values above the storage-rounding edge, where one is known."""
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
            return f"Spectrum({self.name}, {self.status}{': ' + self.reason if self.reason else ''})"
        top = f"σ₁ = {self.S[0]:.4g}, " if len(self.S) else ""
        vectors = f", top {self.k} vectors" if self.k else ""
        return (
            f"Spectrum({self.name}, {display.size(self.shape)}, {top}‖ΔW‖_F = {self.norm:.4g}, "
            f"rank {display.rank_of(self)}{vectors})"
        )

    def _repr_html_(self) -> str:
        return display.html_of_spectrum(self)
