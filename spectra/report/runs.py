"""What a page is made of: a run's rows, curves and similarities, and what `run.json` says of how they came to be."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spectra import naming
from spectra.errors import SelectionError
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.plots.squares import short_names
from spectra.report.kept import Section, kept_sections, pairs_section
from spectra.report.paths import shorter, without_places
from spectra.results import tables
from spectra.results.collection import Spectra
from spectra.results.fingerprint import version_of
from spectra.results.homes import nothing_stored
from spectra.results.pair_folders import PAIRS, load_pairs
from spectra.results.store import Store
from spectra.spectrum import Spectrum

_NAMES = 12  # of one reason
_SECTIONS = {
    "base_only": "only in the base",
    "tuned_only": "only in the tuned model",
    "shape_mismatch": "of another shape",
    "unsupported": "not supported or unreadable",
    "skipped": "not used",
}


@dataclass(frozen=True, eq=False)
class Run:
    """One run, as a page shows it.

    Attributes:
        label: what it is called.
        spectra: its spectra, without vectors.
        rows: a row of the table each, as in `summary.csv`.
        similarities: stored comparisons.
        record: what `run.json` holds; {} for results in memory.
        sections: the tables of other commands.
    """

    label: str
    spectra: Sequence[Spectrum]
    rows: Sequence[tables.Row]
    similarities: Sequence[SubspaceSimilarity]
    record: Mapping[str, Any]
    sections: Sequence[Section] = ()

    @property
    def base_norms(self) -> dict[str, float]:
        """Name → ‖W₀‖_F, of the matrices whose base was read."""
        return {spectrum.name: spectrum.base_norm for spectrum in self.spectra if spectrum.base_norm}

    @property
    def facts(self) -> dict[str, str]:
        """What was compared: label → text."""
        inputs: Mapping[str, Any] = self.record.get("inputs", {})
        facts = {
            "kind": inputs.get("kind"),
            "tuned": inputs.get("tuned"),
            "base": inputs.get("base"),
            "adapter": inputs.get("adapter"),
            "merged": inputs.get("merged"),
            "first update": inputs.get("a"),
            "second update": inputs.get("b"),
            "options": ", ".join(f"{key} = {value}" for key, value in inputs.get("options", {}).items()),
            "command": shlex.join(shorter(str(part)) for part in _command(self.record)),
            "versions": ", ".join(f"{name} {version}" for name, version in self.record.get("versions", {}).items()),
            "begun": self.record.get("started"),
            "finished": self.record.get("finished"),
        }
        return {label: without_places(shorter(str(value))) for label, value in facts.items() if value}

    @property
    def files(self) -> list[dict[str, Any]]:
        """The files that were read: path, bytes, version (a disk's modification time), hash of the first MiB."""
        files: Mapping[str, Mapping[str, Any]] = self.record.get("inputs", {}).get("files", {})
        return [
            {
                "path": shorter(path),
                "size": file.get("size"),
                "version": _time(version_of(file)),
                "hash": str(file.get("head_sha256", "")),
            }
            for path, file in files.items()
        ]

    @property
    def warnings(self) -> list[str]:
        """What the listing warned of, and the notes of the matrices, each once."""
        listed = [str(line) for line in self.record.get("coverage", {}).get("warnings", [])]
        return [without_places(line) for line in listed + sorted({row["note"] for row in self.rows if row["note"]})]

    @property
    def is_covered(self) -> bool:
        """Whether it is recorded what was left out."""
        return "coverage" in self.record

    @property
    def not_used(self) -> list[dict[str, Any]]:
        """Which tensors have no row, by reason: what they are, why, how many, and the first names."""
        told = []
        for key, title in _SECTIONS.items():
            reasons: dict[str, list[str]] = {}
            for name, reason in self.record.get("coverage", {}).get(key, {}).items():
                reasons.setdefault(reason, []).append(name)
            told += [
                {"what": title, "reason": without_places(reason), "count": len(names), "names": names[:_NAMES]}
                for reason, names in reasons.items()
            ]
        return told


def _command(record: Mapping[str, Any]) -> list[Any]:
    """The command without the place of the program."""
    command = [part for part in record.get("command") or [] if part != ""]
    is_ours = bool(command) and Path(str(command[0])).name in ("spectra", "__main__.py")
    return ["spectra", *command[1:]] if is_ours else list(command)


def _time(stamp: Any) -> str:
    """A disk's time in nanoseconds as a date; another storage's version as it is."""
    if not isinstance(stamp, int):
        return str(stamp or "")
    try:
        return datetime.fromtimestamp(stamp / 1e9, UTC).isoformat(" ", "seconds").removesuffix("+00:00") + " UTC"
    except (ValueError, OverflowError, OSError):
        return str(stamp)


def read_runs(directory: str | Path, label: str, layers: str | Sequence[str] = ()) -> list[Run]:
    """What a results directory holds: one run, or of a comparison of several updates each two of them as one.

    Raises:
        StoreError: it holds no results, or is damaged.
        SelectionError: layers select nothing.
    """
    record = Store(directory).run()
    pairs: Mapping[str, Sequence[str]] = record.get("pairs", {})
    if not pairs:
        return [read_run(directory, label, layers)]
    section = pairs_section(load_pairs(directory, layers=layers), label)
    whole = Run(label, [], [], [], record, [section])
    every = list(dict.fromkeys(name for both in pairs.values() for name in both))
    called = dict(zip(every, map(shorter, short_names(every)), strict=True))
    return [whole] + [
        read_run(Path(directory, PAIRS, folder), f"{label}: {called[a]} and {called[b]}", layers)
        for folder, (a, b) in pairs.items()
    ]


def read_run(directory: str | Path, label: str, layers: str | Sequence[str] = ()) -> Run:
    """What a results directory holds.

    Raises:
        StoreError: it holds no results, or is damaged.
        SelectionError: layers select nothing.
    """
    store = Store(directory)
    spectra, similarities = Spectra.stored(directory, vectors=False), store.similarities()
    names = dict.fromkeys([*spectra.names, *(item.name for item in similarities)])
    sections = kept_sections(directory, label, layers)
    if not names and not sections:
        raise nothing_stored(directory)
    if not names:
        return Run(label, [], [], [], store.run() or sections[0].record, sections)
    if layers:
        try:
            chosen = set(naming.select(layers, names))
        except SelectionError as problem:
            raise SelectionError(f"{directory}: {problem}") from None
        spectra = Spectra.stored(directory, [name for name in spectra.names if name in chosen], vectors=False)
        similarities = [item for item in similarities if item.name in chosen]
    return replace(run_of(spectra, label, similarities, store.run()), sections=sections)


def run_of(
    spectra: Iterable[Spectrum],
    label: str,
    similarities: Sequence[SubspaceSimilarity] = (),
    record: Mapping[str, Any] | None = None,
) -> Run:
    """A run from spectra, in memory or on disk."""
    held = list(spectra.without_vectors() if isinstance(spectra, Spectra) else spectra)
    return Run(label, held, [tables.row(spectrum) for spectrum in held], list(similarities), record or {})
