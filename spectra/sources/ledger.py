"""The account that a reader keeps: every tensor becomes a delta, a refusal or a line of the coverage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from spectra.deltas.delta import Recipe, WeightDelta
from spectra.deltas.source import Coverage, Source
from spectra.files.folder import Folder
from spectra.spectrum import Status


@dataclass
class Ledger:
    """Deltas and coverage while a source is being read; `source` closes it."""

    tuned: Folder
    base: Folder | None
    deltas: list[WeightDelta] = field(default_factory=list)
    base_only: dict[str, str] = field(default_factory=dict)
    tuned_only: dict[str, str] = field(default_factory=dict)
    shape_mismatch: dict[str, str] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    base_names: dict[str, str] = field(default_factory=dict)  # tuned weight → base weight, one rule for the whole file
    base_evidence: dict[str, tuple[int, ...] | None] = field(default_factory=dict)  # the shapes that led to it

    def add(
        self,
        name: str,
        shape: Sequence[int],
        recipe: Recipe,
        rank: int | None = None,
        note: str = "",
    ) -> None:
        """A matrix that can be done."""
        rank = min(*shape) if rank is None else min(rank, *shape)
        self.deltas.append(WeightDelta(name, tuple(shape), recipe, rank, note=note))

    def refuse(self, name: str, shape: Sequence[int], status: Status, reason: str) -> None:
        """A matrix that cannot be done: it keeps its row in the result and its line in the coverage."""
        listed = self.shape_mismatch if status == "shape_mismatch" else self.unsupported
        listed[name] = reason
        self.deltas.append(WeightDelta.refused(name, shape, status, reason))

    def source(self, kind: str) -> Source:
        """The finished source."""
        given = [*self.tuned.warnings, *(self.base.warnings if self.base else ())]
        coverage = Coverage(
            base_only=self.base_only,
            tuned_only=self.tuned_only,
            shape_mismatch=self.shape_mismatch,
            unsupported=self.unsupported,
            skipped=self.skipped,
            warnings=(*given, *self.warnings),
        )
        base = str(self.base.path) if self.base else None
        return Source(kind, tuple(self.deltas), coverage, str(self.tuned.path), base)
