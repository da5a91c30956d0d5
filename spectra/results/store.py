"""Results on disk: one directory per run, written matrix by matrix, resumable, loaded lazily.

    DIR/run.json              what was run on what, with which versions, and the method per matrix
    DIR/summary.csv           one row per matrix
    DIR/spectra/NAME.safetensors     S, and U and Vh where they were asked for, float64
    DIR/similarity/NAME.safetensors  φ, chance and angles, for a comparison

Every file is written beside its place and then renamed, so a reader never sees half of one.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from spectra.errors import StoreError
from spectra.files.choice import WEIGHT_SUFFIXES
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.results import fingerprint, tables
from spectra.results.partners import apart
from spectra.spectrum import DONE, Spectrum

ANOTHER_PLACE = "another directory (out=, --out)"
RUN = "run.json"
SUMMARY = "summary.csv"
_CONFIGS = ("config.json", "adapter_config.json", "model_index.json")
_ARRAYS = ("S", "U", "Vh")
_RECORDED = {item.name: item.name for item in fields(Spectrum) if item.name not in _ARRAYS}
_RECORDED["unmoved_share"] = "unchanged"  # attribute → key in the record and column of the table
_SIMILARITY_ARRAYS = ("grid", "chance", "angles")
_FINAL = (*DONE, "nonfinite", "shape_mismatch", "unsupported")  # not worth trying again on the same input


class Shelf:
    """Named records of arrays and a small JSON object, one safetensors file each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        """Where the record lies."""
        return self.directory / f"{quote(name, safe='[]')}.safetensors"

    def names(self) -> list[str]:
        """The records that are there, numbers in names in numerical order."""
        names = [unquote(file.name.removesuffix(".safetensors")) for file in self.directory.glob("*.safetensors")]
        return sorted(names, key=_natural)

    def put(self, name: str, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        """Write one record.

        Raises:
            StoreError: the directory cannot be written to.
        """
        from safetensors.numpy import save

        contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        write(self.path(name), save(contiguous, {"record": _json(record)}))

    def record(self, name: str) -> dict[str, Any]:
        """The JSON object of a record, without its arrays.

        Raises:
            StoreError: the record is missing or damaged.
        """
        return self._open(name, ())[1]

    def get(self, name: str, only: Sequence[str] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays and the JSON object of a record.

        Raises:
            StoreError: the record is missing or damaged.
        """
        return self._open(name, only)

    def _open(self, name: str, only: Sequence[str] | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        path = self.path(name)
        try:
            with safe_open(path, framework="np") as file:
                keys = [key for key in file.keys() if only is None or key in only]  # noqa: SIM118
                arrays = {key: file.get_tensor(key) for key in keys}
                return arrays, json.loads((file.metadata() or {})["record"])
        except (OSError, SafetensorError, KeyError, ValueError) as problem:
            raise StoreError(f"{path} is missing or damaged ({problem}); delete it and compute it again") from None


class Store:
    """The results directory of one run. Only the driving process writes to it."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        self.spectra = Shelf(self.directory / "spectra")
        self.similarity = Shelf(self.directory / "similarity")

    def run(self) -> dict[str, Any]:
        """What `run.json` says, or {}.

        Raises:
            StoreError: it is damaged.
        """
        path = self.directory / RUN
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        except (OSError, ValueError) as problem:
            raise StoreError(f"{path} is damaged ({problem}); choose {ANOTHER_PLACE}") from None

    def begin(self, inputs: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Claim the directory for these inputs, or resume if it already holds their results.

        Raises:
            StoreError: it holds the results of other inputs, or cannot be written to.
        """
        stored = self.run()
        before = stored.get("inputs")
        wanted = json.loads(_json(inputs))
        changed = _differences(before, wanted) if before is not None else []
        if changed:
            raise StoreError(
                f"{self.directory} holds results of other inputs (different: {', '.join(changed)}); "
                f"nothing was changed there: choose {ANOTHER_PLACE}"
            )
        if before is None and self.directory.is_dir() and (model := _model_in(self.directory)):
            raise StoreError(f"{self.directory} is a model's folder (it holds {model}): choose {ANOTHER_PLACE}")
        if before is None and self.spectra.names():
            raise StoreError(f"{self.directory} holds results without a {RUN}; choose {ANOTHER_PLACE}")
        started = stored.get("started") or _now()
        wanted["files"] = {**(before or {}).get("files", {}), **wanted.get("files", {})}
        write(self.directory / RUN, _json({"inputs": wanted, "started": started, **details}, indent=1).encode())

    def changed_file(self) -> str | None:
        """A file that the results were computed from and that is another one now; one that is gone does not count."""
        files = _files(self.run().get("inputs", {}))
        return next((path for path, file in files if os.path.exists(path) and not _as_it_was(path, file)), None)

    def has(self, name: str, key: str, top: int | None, only_top: bool) -> bool:
        """Whether a final result for this key is stored that holds at least what is asked for."""
        if not self.spectra.path(name).is_file():
            return False
        try:
            record = self.spectra.record(name)
        except StoreError:
            return False  # damaged: computed again
        if record.get("key") != key or record["status"] not in _FINAL:
            return False
        if record["status"] != "ok":
            return True
        wanted = min(top or 0, record["max_rank"])
        return record["k"] >= wanted and (record["values"] >= record["max_rank"] or only_top)

    def kept(self, name: str) -> tuple[int, int]:
        """How many values and vectors are stored for a matrix; none if what is stored is missing or damaged."""
        try:
            record = self.spectra.record(name) if self.spectra.path(name).is_file() else {}
        except StoreError:
            record = {}
        return int(record.get("values", 0)), int(record.get("k", 0))

    def put(self, spectrum: Spectrum, key: str = "") -> None:
        """Store one spectrum in its final place, with the vectors that are loaded."""
        record = {said: getattr(spectrum, attribute) for attribute, said in _RECORDED.items()}
        record |= {"k": loaded_vectors(spectrum), "values": len(spectrum.S), "key": key}
        arrays = {name: getattr(spectrum, name) for name in _ARRAYS if getattr(spectrum, name) is not None}
        self.spectra.put(spectrum.name, arrays, record)

    def get(self, name: str, vectors: bool = True) -> Spectrum:
        """One stored spectrum, with its vectors or without reading them.

        Raises:
            StoreError: it is missing or damaged.
        """
        arrays, record = self.spectra.get(name, None if vectors else ("S",))
        known: dict[str, Any] = {attribute: record[said] for attribute, said in _RECORDED.items() if said in record}
        return Spectrum(**known | arrays)

    def similarity_of(self, name: str, side: str, key: str, other: str = "") -> SubspaceSimilarity | None:
        """A stored comparison, of another weight where `other` is its name, if it was made from the same inputs."""
        label = _label(name, side, other)
        if not self.similarity.path(label).is_file():
            return None
        try:
            arrays, record = self.similarity.get(label)
        except StoreError:
            return None  # damaged: compared again
        return _similarity(arrays, record) if record.get("key") == key else None

    def put_similarity(self, similarity: SubspaceSimilarity, key: str = "") -> None:
        """Store one comparison."""
        record = {name: getattr(similarity, name) for name in ("name", "side", "k_used", "note", "other", "gap")}
        arrays = {name: getattr(similarity, name) for name in _SIMILARITY_ARRAYS}
        self.similarity.put(_label(similarity.name, similarity.side, similarity.other), arrays, {**record, "key": key})

    def similarities(self) -> list[SubspaceSimilarity]:
        """All stored comparisons."""
        return [_similarity(*self.similarity.get(name)) for name in self.similarity.names()]

    def finish(self) -> None:
        """Write the tables from everything that is stored, and the methods into `run.json`."""
        names = self.spectra.names()
        rows = [tables.row(self.get(name, vectors=False)) for name in names]
        if rows:
            write(self.directory / SUMMARY, tables.to_csv(rows).encode())
        compared = [tables.similarity_row(similarity) for similarity in self.similarities()]
        if compared:
            write(self.directory / "similarity.csv", tables.to_csv(compared).encode())
        run = self.run() | {"finished": _now(), "methods": {line["name"]: line["method"] for line in rows}}
        write(self.directory / RUN, _json(run, indent=1).encode())


def _label(name: str, side: str, other: str) -> str:
    """What a comparison's record is called; of the other weight's name, if it is another, what is its own.

    >>> _label("layers.0.q_proj.weight", "left", "layers.0.k_proj.weight")
    'layers.0.q_proj.weight~k_proj.weight.left'
    """
    return f"{name}~{apart(name, other)}.{side}" if other not in ("", name) else f"{name}.{side}"


def nothing_stored(directory: str | Path) -> StoreError:
    """What to do where a directory holds no results; never to write into a folder that holds something else."""
    place = Path(directory).expanduser()
    model = _model_in(place)
    if not place.exists():
        said, out = f"{directory} does not exist", Path(directory)
    elif model:
        said, out = f"{directory} holds a model ({model}) and no results", Path("results", place.resolve().name)
    else:
        said, out = f"{directory} holds no results", Path(directory)
    return StoreError(f"{said}; make them with decompose(…, out={str(out)!r}) or spectra svd … --out {out}")


def _model_in(directory: Path) -> str:
    """A file that says that a folder is a model's, or that this is a file of weights itself; "" if there is none."""
    if directory.is_file():
        return directory.name
    names = sorted(os.listdir(directory)) if directory.is_dir() else []
    return next((name for name in names if name in _CONFIGS or name.endswith(WEIGHT_SUFFIXES)), "")


def loaded_vectors(spectrum: Spectrum) -> int:
    """How many vectors of each side are here, not only on a disk."""
    return 0 if spectrum.U is None else spectrum.k


def write(path: Path, content: bytes) -> None:
    """Put a file in its place in one step.

    Raises:
        StoreError: it cannot be written; what was there before is as it was.
    """
    partial = path.with_name(f".{path.name[-100:]}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as problem:
        raise StoreError(
            f"{path} cannot be written ({problem.strerror}); what was stored before is unharmed: "
            f"make room or choose {ANOTHER_PLACE}, and run the same again to go on"
        ) from None


def _similarity(arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> SubspaceSimilarity:
    said = {key: value for key, value in record.items() if key != "key" and value is not None}
    given: dict[str, Any] = said | dict(arrays)
    return SubspaceSimilarity(**given)


def _differences(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Which inputs differ. Other layers may lie in other files: those of before have to be as they were."""
    changed = {key for key in {*before, *wanted} - {"files"} if before.get(key) != wanted.get(key)}
    new = wanted.get("files", {})
    if any(new[path] != file if path in new else not _as_it_was(path, file) for path, file in _files(before)):
        changed.add("files")
    return sorted(changed)


def _files(inputs: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    files: Mapping[str, Mapping[str, Any]] = inputs.get("files", {})
    return files.items()


def _as_it_was(path: str, file: Mapping[str, Any]) -> bool:
    return fingerprint.is_as_it_was(path, file)


def _json(content: Any, indent: int | None = None) -> str:
    return json.dumps(tables.strict(content), indent=indent, allow_nan=False, ensure_ascii=False)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
