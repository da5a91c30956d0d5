"""Results on disk: one directory per run, written matrix by matrix, resumable, loaded lazily.

    DIR/run.json              what was run on what, with which versions, and the method per matrix
    DIR/summary.csv           one row per matrix
    DIR/spectra/NAME.safetensors     S in float64, and U and Vh where they were asked for
    DIR/similarity/NAME.safetensors  φ, chance and angles, for a comparison
    DIR/spectra/small.pack, DIR/similarity/small.pack  the small ones together, in runs of many

What is stored carries checksums; what does not fit them counts as not stored, is said, and is computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from spectra.errors import StoreError
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.results import measured, records, run_file, tables
from spectra.results.belonging import LISTED, Belonging
from spectra.results.homes import home_of, model_in
from spectra.results.partners import apart
from spectra.results.shelf import Piece, Shelf, json_text, natural, sum_of
from spectra.results.writing import ANOTHER_PLACE, Version, alone, damaged, sweep, write
from spectra.spectrum import Spectrum

RUN = "run.json"
SUMMARY = "summary.csv"
COMPARED = "similarity.csv"
NO_KEY = ""  # the fingerprint of what was not made from files


class Store:
    """The results directory of one run. Only the driving process writes to it.

    Args:
        directory: where it is.
        verify: False takes stored arrays as they are, without their checksums.
        notes: gets what is found damaged; None for a list of its own.

    Attributes:
        notes: what was found damaged or without checksums, as far as it was read.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True, notes: list[str] | None = None) -> None:
        self.directory = home_of(directory)
        self.spectra = Shelf(self.directory / "spectra", verify, packs=True)
        self.similarity = Shelf(self.directory / "similarity", verify, packs=True)
        self.notes: list[str] = [] if notes is None else notes
        self.belonging = Belonging(self.directory / RUN)
        self._claimed: Mapping[str, Any] | None = None
        self._seen: dict[str, tuple[Version | bytes, tables.Row]] = {}
        self._wrote = False
        self._refused = False

    def run(self) -> dict[str, Any]:
        """What `run.json` says, or {}.

        Raises:
            StoreError: it is damaged.
        """
        return run_file.read(self.directory / RUN)

    def kind(self) -> str | None:
        """What kind of results `run.json` speaks of; None where there is none, or it is damaged."""
        try:
            run = self.run()
        except StoreError:
            return None
        return str(run.get("inputs", {}).get("kind", "")) if run else None

    def begin(self, inputs: Mapping[str, Any], details: Mapping[str, Any], keys: Collection[str] = ()) -> None:
        """Claim the directory for these inputs, or resume if it already holds their results.

        Args:
            inputs: what the results are made from.
            details: what else `run.json` says.
            keys: the fingerprints of all results of these inputs: where `run.json` is damaged, it is written anew if
                all that is stored is among them.

        Raises:
            StoreError: it holds the results of other inputs, or cannot be written to.
        """
        for shelf in (self.spectra, self.similarity):
            shelf.expect(len(keys))
        with alone(self.directory):
            sweep(self.directory)
            stored = self._stored_run(keys)
            self.notes += [*self.spectra.faults(), *self.similarity.faults()]
            before = stored.get("inputs")
            wanted = json.loads(json_text(inputs))
            changed = run_file.differences(before, wanted) if before is not None else []
            if before is not None and changed:
                why = run_file.why_refused(before, changed, wanted)
                raise StoreError(f"{self.directory} {why} choose {ANOTHER_PLACE}")
            if before is None and self.directory.is_dir() and (model := model_in(self.directory)):
                raise StoreError(f"{self.directory} is a model's folder (it holds {model}): choose {ANOTHER_PLACE}")
            if before is None and not stored and self.spectra.names():
                raise StoreError(f"{self.directory} holds results without a {RUN}; choose {ANOTHER_PLACE}")
            started = stored.get("started") or _now()
            wanted = run_file.with_files(before, wanted)
            self._claimed = wanted
            try:
                run_file.write(self.directory / RUN, {"inputs": wanted, "started": started, **details})
                self.belonging.look_again()
            except StoreError:
                if before is None or stored.get("finished") is None:
                    raise  # else it may all be there: what has to be written raises anew

    def _stored_run(self, keys: Collection[str]) -> dict[str, Any]:
        """What `run.json` says; {"damaged": why} where it does not, and what is stored is of these inputs."""
        try:
            return self.run()
        except StoreError as problem:
            pieces = [piece for shelf in (self.spectra, self.similarity) for piece in shelf.sound()]
            stored = {str(piece.record.get("key")) for piece in pieces}
            if not stored <= set(keys):
                raise StoreError(
                    f"{problem}; and not all that is stored there is of these inputs and matrices, so it cannot be "
                    f"written anew: choose {ANOTHER_PLACE}"
                ) from None
            self.notes.append(f"{self.directory / RUN} was damaged and is written anew")
            return {"damaged": str(problem)}

    def names(self) -> list[str]:
        """The matrices whose spectra are stored; where a pack is damaged, also those of which it lost the names."""
        there = self.spectra.names()
        if not self.spectra.faults():
            return there
        return sorted({*there, *self._methods()}, key=natural)

    def _methods(self) -> Mapping[str, str]:
        """The method of every matrix that was there when the last run ended; nothing where that is not known."""
        try:
            return dict(self.run().get("methods", {}))
        except StoreError:
            return {}

    def stored(
        self, name: str, key: str, top: int | None, only_top: bool, precision: records.Precision = "float32"
    ) -> Spectrum | None:
        """The stored result for this key if it is final, sound, and holds at least what is asked for."""
        version = self.spectra.version(name)
        if version is None:
            return None
        try:
            header, spectrum = self._read(name)
        except StoreError as problem:
            self.notes.append(f"computed again: {problem}")
            return None
        if not header.holds(key, top, only_top, precision):
            return None
        if header.measured_by != measured.code():
            version = self._measured_anew(spectrum) or version
        self._seen[name] = version, tables.row(spectrum)
        self.belonging.see(name, key)
        return spectrum

    def _measured_anew(self, spectrum: Spectrum) -> bytes | None:
        """Store the metrics of today's code with a small result, and give its new version.

        None where it has a file of its own, which is not worth writing again, or nothing can be written.
        """
        said = measured.record_of(spectrum)
        if not said or self._refused or not self.spectra.is_packed(spectrum.name):
            return None
        try:
            return self.spectra.amend(spectrum.name, said)
        except StoreError:
            self._refused = True  # these are all there, and can be read as they are
            return None

    def kept(self, name: str) -> tuple[int, int, records.Precision]:
        """How many values and vectors are stored for a matrix, and those how; none if that is missing or damaged."""
        nothing: tuple[int, int, records.Precision] = (0, 0, records.PRECISIONS[0])
        if self.spectra.version(name) is None:
            return nothing
        try:
            header = self.header(name)
        except StoreError:
            return nothing
        return (header.values, header.k, header.precision) if header.k else (header.values, *nothing[1:])

    def header(self, name: str) -> records.Header:
        """What is said of a stored spectrum, without its arrays.

        Raises:
            StoreError: it is missing or damaged.
        """
        try:
            return records.parse(self.spectra.record(name), name)
        except ValueError as problem:
            raise damaged(self.spectra.where(name), str(problem)) from None

    def put(self, spectrum: Spectrum, key: str = NO_KEY, precision: records.Precision = "float32") -> Spectrum:
        """Store one spectrum in its final place, with the vectors that are loaded, and give what will come back."""
        arrays = {name: getattr(spectrum, name) for name in records.ARRAYS if getattr(spectrum, name) is not None}
        vectors = arrays.keys() - {"S"}  # values stay as they are, which float32 may not hold
        narrow = {name: arrays[name].astype(precision) for name in vectors if arrays[name].dtype != precision}
        back: dict[str, Any] = {name: array.astype("float64") for name, array in narrow.items()}
        kept = replace(spectrum, **back) if back else spectrum
        arrays |= narrow
        record = records.record_of(kept, key, precision) | measured.record_of(kept)
        self._unlist(kept.name, key)
        version = self.spectra.put(kept.name, arrays, record)
        self._seen[kept.name] = version, tables.row(kept)
        self.belonging.see(kept.name, key)
        self._wrote = True
        return kept

    def get(self, name: str, vectors: bool = True) -> Spectrum:
        """One stored spectrum, with its vectors or without reading them.

        Raises:
            StoreError: it is missing or damaged.
        """
        return self._read(name, vectors)[1]

    def _read(self, name: str, vectors: bool = True) -> tuple[records.Header, Spectrum]:
        arrays, record = self.spectra.get(name, None if vectors else ("S",))
        try:
            found = _spectrum_of(name, arrays, record)
            self._refuse_foreign(name, found[0].key)
            return found
        except ValueError as problem:
            raise damaged(self.spectra.where(name), f"{name}: {problem}") from None

    def _refuse_foreign(self, name: str, key: str) -> None:
        if self.belonging.is_foreign(name, key):
            raise ValueError("it is of another run, copied here")

    def _unlist(self, name: str, key: str) -> None:
        """Before a piece takes the place of another one: say no more what belongs here, until the run ends."""
        if self.belonging.is_foreign(name, key):
            with alone(self.directory):
                run_file.write(self.directory / RUN, {k: said for k, said in self.run().items() if k != LISTED})
            self.belonging.look_again()

    def similarity_of(self, name: str, side: str, key: str, other: str = "") -> SubspaceSimilarity | None:
        """A stored comparison, of another weight where `other` is its name, if it was made from the same inputs."""
        label = _label(name, side, other)
        if self.similarity.version(label) is None:
            return None
        try:
            similarity, made_from = self.compared(label)
        except StoreError as problem:
            self.notes.append(f"compared again: {problem}")
            return None
        return similarity if made_from == key else None

    def put_similarity(self, similarity: SubspaceSimilarity, key: str = NO_KEY) -> None:
        """Store one comparison."""
        arrays = {name: getattr(similarity, name) for name in records.SIMILARITY_ARRAYS}
        label = _label(similarity.name, similarity.side, similarity.other)
        self._unlist(label, key)
        self.similarity.put(label, arrays, records.similarity_record(similarity, key))
        self._wrote = True

    def similarities(self) -> list[SubspaceSimilarity]:
        """All stored comparisons.

        Raises:
            StoreError: one of them is damaged.
        """
        return [self.compared(name)[0] for name in self.similarity.names()]

    def compared(self, label: str) -> tuple[SubspaceSimilarity, str]:
        """The comparison in a record, and the fingerprint of what it was made from.

        Raises:
            StoreError: it is missing or damaged.
        """
        arrays, record = self.similarity.get(label)
        try:
            found, key = _comparison_of(label, arrays, record), str(record.get("key"))
            self._refuse_foreign(label, key)
            return found, key
        except ValueError as problem:
            raise damaged(self.similarity.where(label), str(problem)) from None

    def fault_of(self, shelf: Shelf, piece: Piece) -> str:
        """What is wrong with a piece of one of the two shelves whose checksums fit; "" for nothing."""
        try:
            made = _spectrum_of if shelf is self.spectra else _comparison_of
            made(piece.name, piece.arrays, piece.record)
            self._refuse_foreign(piece.name, str(piece.record.get("key")))
            if not self.belonging.is_listed(piece.name):
                raise ValueError("the run that ended here has no such piece: it was copied here")
        except ValueError as problem:
            return str(problem)
        return ""

    def finish(self) -> None:
        """Write the tables from everything that is stored and sound, and the methods into `run.json`.

        Raises:
            StoreError: what this run stored is not there any more, or the directory cannot be written to.
        """
        rows = list(self._sound(self.names(), self._row))
        gone = self._seen.keys() - {row["name"] for row in rows}
        if gone:
            raise StoreError(
                f"{len(gone)} of the {len(self._seen)} results that this run stored in {self.directory} are not there "
                f"any more, {min(gone)} for one: run the same again, with nobody else at work in that directory"
            )
        labels = self.similarity.names()
        compared = list(self._sound(labels, self._compared_row))
        self._seal()
        sums = {
            name: self._write_table(name, lines) for name, lines in ((SUMMARY, rows), (COMPARED, compared)) if lines
        }
        listed = self.belonging.list_of([*(row["name"] for row in rows), *labels])
        self._close({"tables": sums, "methods": {line["name"]: line["method"] for line in rows}, LISTED: listed})

    def _seal(self) -> None:
        """Bring packs in order, if there are any."""
        with alone(self.directory):
            for shelf in (self.spectra, self.similarity):
                try:
                    shelf.seal()
                except StoreError:
                    if self._wrote:
                        raise

    def _row(self, name: str) -> tables.Row:
        """A stored result's row in the table; what this run stored or read is not read again while its file is that."""
        version, row = self._seen.get(name, (None, {}))
        if version is not None and self.spectra.version(name) == version:
            return row
        header, spectrum = self._read(name, vectors=False)
        self.belonging.see(name, header.key)
        return tables.row(spectrum)

    def _compared_row(self, label: str) -> tables.Row:
        found, key = self.compared(label)
        self.belonging.see(label, key)
        return tables.similarity_row(found)

    def _close(self, said: dict[str, Any]) -> None:
        """Say this in `run.json`, and that all is there, unless it says so."""
        with alone(self.directory):
            run = self.run()
            if self._claimed is not None and run_file.differences(run.get("inputs") or {}, self._claimed):
                raise StoreError(
                    f"{self.directory} was claimed by another run while this one was at work: "
                    f"run the same again with {ANOTHER_PLACE}"
                )
            if self._wrote or "finished" not in run or run | said != run:
                try:
                    run_file.write(self.directory / RUN, run | {"finished": _now(), **said})
                except StoreError:
                    if self._wrote:
                        raise

    def _write_table(self, name: str, rows: list[tables.Row]) -> str:
        """Write a table where it is not there already, and give its checksum."""
        content = tables.to_csv(rows).encode()
        if sum_of_table(self.directory / name) != sum_of(content):
            write(self.directory / name, content)
        return sum_of(content)

    def _sound(self, names: Iterable[str], row: Callable[[str], tables.Row]) -> Iterator[tables.Row]:
        """A row for every record that is whole; the others are said."""
        for name in names:
            try:
                yield row(name)
            except StoreError as problem:
                self.notes.append(f"left out of the tables: {problem}")


def sum_of_table(path: Path) -> str | None:
    """The checksum of a table that is stored; None where it cannot be read."""
    try:
        return sum_of(path.read_bytes()) if path.is_file() else None
    except OSError:
        return None


def _spectrum_of(
    name: str, arrays: Mapping[str, np.ndarray], record: dict[str, Any]
) -> tuple[records.Header, Spectrum]:
    """What a record and its arrays say, with the metrics stored beside them; a ValueError tells what is wrong."""
    header = records.parse(record, name)
    spectrum = header.with_arrays(arrays)
    measured.remember(spectrum, record)
    return header, spectrum


def _comparison_of(label: str, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> SubspaceSimilarity:
    found = records.parse_similarity(arrays, record)
    if _label(found.name, found.side, found.other) != label:
        raise ValueError("it is the record of another comparison")
    return found


def _label(name: str, side: str, other: str) -> str:
    """What a comparison's record is called; of the other weight's name, if it is another, what is its own.

    >>> _label("layers.0.q_proj.weight", "left", "layers.0.k_proj.weight")
    'layers.0.q_proj.weight~k_proj.weight.left'
    """
    return f"{name}~{apart(name, other)}.{side}" if other not in ("", name) else f"{name}.{side}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
