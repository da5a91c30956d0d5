"""What a verification says: a row per matrix with its verdict, and all of them as one report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from spectra import naming, text

if TYPE_CHECKING:
    import pandas as pd

# The worst first. What stands between "not applied" and "too small to tell" are the statuses of matrices without
# numbers, and the lists of the coverage that a weight missing on one side is in.
VERDICTS = (
    "unrelated base", "different", "damaged", "scaled", "not applied", "untouched but changed",
    "nonfinite", "shape_mismatch", "unsupported", "unreadable", "too_large", "failed", "base_only", "tuned_only",
    "too small to tell", "rounded", "exact",
)  # fmt: skip
AS_IT_SHOULD_BE = ("exact", "rounded")


@dataclass(frozen=True)
class MatrixCheck:
    """One matrix of the merged model M against W₀ + ΔW; its fields can be had as `row["verdict"]`, too.

    Attributes:
        name: the weight's name in the base; a part of a fused tensor adds `[part]`.
        verdict: one of `VERDICTS`.
        scale: the s that fits best in M − W₀ ≈ s·ΔW; None where ΔW = 0 or was not read.
        residual: ‖M − W₀ − ΔW‖_F/‖ΔW‖_F.
        rounding: the same that storing W₀ + ΔW in M's dtype alone would leave.
        replay: the order of operations that gives M bit for bit, or within whose rounding M lies.
        cause: what may have gone wrong, in words.
        note: what ΔW stands for where that is not simply the adapter's update.

    Example:
        >>> row = MatrixCheck("layers.0.v_proj.weight", "scaled", scale=2.0, cause="applied twice")
        >>> row.role, row["scale"], row.ok
        ('v_proj', 2.0, False)
    """

    name: str
    verdict: str
    scale: float | None = None
    residual: float | None = None
    rounding: float | None = None
    replay: str = ""
    cause: str = ""
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
    def ok(self) -> bool:
        """Whether the matrix is what the merge should be."""
        return self.verdict in AS_IT_SHOULD_BE

    def keys(self) -> list[str]:
        """The columns of a row, in order: with `row[key]` this makes `dict(row)`."""
        own = [item.name for item in fields(self)]
        return [own[0], "role", "layer", *own[1:]]

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)


COLUMNS = tuple(MatrixCheck("", "exact").keys())


@dataclass(frozen=True)
class MergeReport:
    """Every matrix that the adapter changes, and every other one that the merged model changed all the same.

    Attributes:
        matrices: the rows, in the order of the base's names.
        untouched: how many further matrices equal the base, as they should.
        kind: the adapter's format.
        base: where W₀ was read from.
        adapter: where ΔW was read from.
        merged: where M was read from.
        notes: what was noticed while the three were opened.

    Example:
        >>> rows = (MatrixCheck("layers.0.v_proj.weight", "exact"), MatrixCheck("layers.1.v_proj.weight", "damaged"))
        >>> report = MergeReport(rows, untouched=5, kind="lora")
        >>> report.verdict, report.counts, report.ok
        ('damaged', {'damaged': 1, 'exact': 1}, False)
        >>> [row.name for row in report.worst_first]
        ['layers.1.v_proj.weight', 'layers.0.v_proj.weight']
    """

    matrices: tuple[MatrixCheck, ...]
    untouched: int = 0
    kind: str = ""
    base: str = ""
    adapter: str = ""
    merged: str = ""
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The worst of all verdicts."""
        return self.worst_first[0].verdict

    @property
    def ok(self) -> bool:
        """Whether every matrix is what the merge should be."""
        return all(row.ok for row in self.matrices)

    @property
    def counts(self) -> dict[str, int]:
        """Verdict → number of matrices, the worst verdict first."""
        counted = Counter(row.verdict for row in self.matrices)
        return {verdict: counted[verdict] for verdict in VERDICTS if counted[verdict]}

    @property
    def worst_first(self) -> list[MatrixCheck]:
        """The rows by verdict, and under one verdict by the residual, the largest first."""
        return sorted(self.matrices, key=lambda row: (VERDICTS.index(row.verdict), -(row.residual or 0.0)))

    def by_role(self) -> dict[str, dict[str, int]]:
        """Role → verdict → number of matrices; roles in the model's order."""
        roles = naming.in_model_order(row.role for row in self.matrices)
        return {role: MergeReport(tuple(row for row in self.matrices if row.role == role)).counts for role in roles}

    def table(self) -> pd.DataFrame:
        """One row per matrix: name, role, layer, verdict, scale, residual, rounding, replay, cause, note."""
        import pandas as pd

        return pd.DataFrame([dict(row) for row in self.matrices], columns=list(COLUMNS))

    def __iter__(self) -> Iterator[MatrixCheck]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    def __getitem__(self, name: str) -> MatrixCheck:
        for row in self.matrices:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is not among the {len(self)} matrices of this report")

    def __repr__(self) -> str:
        return f"MergeReport({self.verdict}: {_listed(self.counts)}; {self.untouched:,} untouched and equal)"

    def _repr_html_(self) -> str:
        facts = {"adapter": f"{self.adapter} ({self.kind})", "base": self.base, "merged": self.merged}
        facts |= {"verdicts": _listed(self.counts), "untouched": f"{self.untouched:,} equal to the base"}
        columns = ("matrix", "verdict", "scale", "residual", "rounding", "cause")
        rows = [
            (row.name, row.verdict, *map(_number, (row.scale, row.residual, row.rounding)), row.cause)
            for row in self.worst_first
        ]
        return text.page(f"Merge: {self.verdict}", facts, columns, rows, text.first_lines(self.notes))


def _listed(counts: dict[str, int]) -> str:
    """Counts in words.

    >>> _listed({"damaged": 1, "exact": 3})
    '1 damaged, 3 exact'
    """
    return ", ".join(f"{count:,} {verdict}" for verdict, count in counts.items())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def in_order(rows: Sequence[MatrixCheck], names: Sequence[str]) -> tuple[MatrixCheck, ...]:
    """Rows in the order of the names."""
    place = {name: index for index, name in enumerate(names)}
    return tuple(sorted(rows, key=lambda row: place[row.name]))
