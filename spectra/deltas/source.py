"""`Source`: the updates that one tuned model or adapter holds, and `Coverage`: what of it was not used, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from spectra import naming, text
from spectra.deltas.delta import WeightDelta
from spectra.errors import SelectionError
from spectra.models import tied
from spectra.printing import printed
from spectra.text import Row


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
        lines = [f"warning: {line}" for line in self.warnings]
        for key in _COVERAGE_LISTS:
            listed: Mapping[str, str] = getattr(self, key)
            lines += [f"{key}: {name}: {reason}" for name, reason in listed.items()]
        return "\n".join(map(printed, lines)) or "everything was paired and used"

    def __repr__(self) -> str:
        warnings = f"; warnings: {len(self.warnings)}" if self.warnings else ""
        return f"Coverage({_left_out(self) or 'everything was paired and used'}{warnings})"

    def _repr_html_(self) -> str:
        groups: dict[tuple[str, str], list[Any]] = {}
        for key in self.counts:
            listed: Mapping[str, str] = getattr(self, key)
            for name, reason in listed.items():
                groups.setdefault((key, reason), [0, name])[0] += 1
        rows = [(key, reason, count, example) for (key, reason), (count, example) in groups.items()]
        warnings = [f"warning: {line}" for line in self.warnings]
        heading = f"Coverage: {_left_out(self) or 'everything was paired and used'}"
        return text.page(heading, {}, ("list", "reason", "entries", "for example"), rows, text.first_lines(warnings))


_COVERAGE_LISTS = tuple(item.name for item in fields(Coverage) if item.name != "warnings")


NO_HEADS = "was ignored: there are no heads in"  # said of heads= where it means nothing
SAVED_WHOLE = "saved whole, so ΔW needs the base weight: pass base= (--base)"


@dataclass(frozen=True)
class Source:
    """The updates that one tuned model or adapter holds: metadata only, lazily read.

    Attributes:
        kind: the format, such as "checkpoint", "lora", "multilora", "multihead".
        deltas: one `WeightDelta` per matrix.
        coverage: what was not paired or not used.
        tuned: where the update was read from.
        base: where the base was read from, or None.
        options: how `open_source` was told to read them: heads, scale and split.

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
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The weights' names, in order."""
        return tuple(delta.name for delta in self.deltas)

    def lacking(self, patterns: str | Sequence[str] = ()) -> list[str]:
        """The weights whose update is not here for want of the base alone; with patterns, of those that they mean.

        Raises:
            SelectionError: a pattern matches nothing, in this source or among these.
        """
        found = [name for name, reason in self.coverage.skipped.items() if reason == SAVED_WHOLE]
        if not found or not patterns:
            return found
        wanted = set(naming.select(patterns, [*self.names, *found]))
        return [name for name in found if name in wanted]

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
        try:
            wanted = set(naming.select(patterns, self.names))
        except SelectionError as problem:
            raise SelectionError(f"{problem}{_tied_head(patterns, self.names)}") from None
        return replace(self, deltas=tuple(delta for delta in self.deltas if delta.name in wanted))

    def __repr__(self) -> str:
        left_out, warnings = _left_out(self.coverage), len(self.coverage.warnings)
        return (
            f"Source({self.kind}, {text.contents(self.names)}"
            + (f"; not used: {left_out}" if left_out else "")
            + (f"; warnings: {warnings}" if warnings else "")
            + ")"
        )

    def _repr_html_(self) -> str:
        facts = {"tuned": self.tuned, "base": self.base or "none", "not used": _left_out(self.coverage) or "nothing"}
        lines = [f"warning: {line}" for line in self.coverage.warnings]
        notes = [f"note: {line}" for line in dict.fromkeys(delta.note for delta in self.deltas) if line]
        columns = ("role", "matrices", "shape", "rank ≤", "status")
        table = _by_role(self.deltas)
        return text.page(
            f"Source: {self.kind}, {text.matrices(len(self))}",
            facts,
            columns,
            table,
            text.first_lines(lines) + text.first_lines(notes),
        )


def _tied_head(patterns: str | Sequence[str], names: Sequence[str]) -> str:
    """Where an output head was asked for, and only the embedding is here that it may be; "" otherwise.

    >>> _tied_head("lm_head", ["model.embed_tokens.weight"])
    '. An output head that is tied to the embedding is not stored by itself: it is model.embed_tokens.weight'
    """
    given = [patterns] if isinstance(patterns, str) else patterns
    words = [f"{piece.strip().removesuffix('.weight')}.weight" for pattern in given for piece in pattern.split(",")]
    asked = any(tied.is_vocabulary(word) and not tied.is_embedding(word) for word in words)
    embedding = tied.embedding_in(dict.fromkeys(names, ""))
    if not asked or embedding is None or any(map(tied.is_head, names)):
        return ""
    return f". An output head that is tied to the embedding is not stored by itself: it is {embedding}"


def _left_out(coverage: Coverage) -> str:
    """What was not used, as counts; "" for nothing.

    >>> _left_out(Coverage(skipped={"a.bias": "a vector", "b.bias": "a vector"}))
    '2 skipped'
    """
    return ", ".join(f"{count:,} {key}" for key, count in coverage.counts.items() if count)


def _by_role(deltas: Iterable[WeightDelta]) -> list[Row]:
    """One row per role, shape and status; the ranks of one row as a range."""
    ranks: dict[tuple[str, str, str], list[int]] = {}
    for delta in deltas:
        ranks.setdefault((delta.role, text.size(delta.shape), delta.status), []).append(delta.max_rank)
    return [
        (role, len(group), shape, text.number_range(group) if status == "ok" else "–", status)
        for (role, shape, status), group in ranks.items()
    ]
