"""What is stored beside the arrays, parsed once: a record is a typed value, or it says what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from spectra.errors import SelectionError
from spectra.metrics.similarity import SIDES, SubspaceSimilarity
from spectra.spectrum import DONE, STATUSES, Spectrum

Precision = Literal["float32", "float64"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float64")  # of stored vectors, the least first
ARRAYS = ("S", "U", "Vh")
SIMILARITY_ARRAYS = ("grid", "chance", "angles")
RECORDED = {item.name: item.name for item in fields(Spectrum) if item.name not in ARRAYS}
_PLAIN = tuple(RECORDED)  # attributes
RECORDED["unmoved_share"] = "unchanged"  # attribute → key in the record and column of the table
_FINAL = (*DONE, "nonfinite", "shape_mismatch", "unsupported")  # not worth trying again on the same input
_COMPARED = ("name", "side", "k_used", "note", "other", "gap")


@dataclass(frozen=True)
class Header:
    """What a stored spectrum's file says without its arrays.

    Attributes:
        blank: the spectrum without values and vectors.
        values: how many values are stored.
        k: how many vectors of each side are.
        key: the fingerprint of what it was made from.
        precision: of the vectors that are stored; what an older version stored is float64.
        measured_by: which code made the metrics beside it; "" where there are none.
    """

    blank: Spectrum
    values: int
    k: int
    key: str
    precision: Precision = "float64"
    measured_by: str = ""

    def holds(self, key: str, top: int | None, only_top: bool, precision: Precision = "float32") -> bool:
        """Whether this is a final result for this key that holds at least what is asked for."""
        if top and self.k and precision > self.precision:
            return False
        status, largest = self.blank.status, self.blank.max_rank or 0
        if self.key != key or status not in _FINAL:
            return False
        return status != "ok" or (self.k >= min(top or 0, largest) and (self.values >= largest or only_top))

    def with_arrays(self, arrays: Mapping[str, np.ndarray]) -> Spectrum:
        """The spectrum with the arrays that were read.

        Raises:
            ValueError: they do not fit what is said of them.
        """
        shape = self.blank.shape
        wanted = {"S": (self.values,), "U": (*shape[:1], self.k), "Vh": (self.k, *shape[1:])}
        for name, array in arrays.items():
            if name not in wanted or array.shape != wanted[name] or array.dtype.kind not in "fiu":
                raise ValueError(f"{name} {list(array.shape)} of {array.dtype} does not fit the record")
        given = {name: array.astype(np.float64, copy=False) for name, array in arrays.items()}
        return _with_arrays(self.blank, given)


def _with_arrays(blank: Spectrum, arrays: Mapping[str, np.ndarray]) -> Spectrum:
    """A spectrum with arrays that fit it; what `Spectrum` checks and fills in is done once, of thousands not twice."""
    spectrum = object.__new__(Spectrum)
    vars(spectrum).update(vars(blank), **arrays)
    return spectrum


def record_of(spectrum: Spectrum, key: str, precision: Precision = "float64") -> dict[str, Any]:
    """What is stored of a spectrum beside its arrays."""
    record = {said: getattr(spectrum, attribute) for attribute, said in RECORDED.items()}
    return record | {"k": loaded_vectors(spectrum), "values": len(spectrum.S), "key": key, "vectors": precision}


def check_precision(precision: str) -> None:
    """Raise a SelectionError for one that vectors are not stored in."""
    if precision not in PRECISIONS:
        raise SelectionError(f"vectors={precision!r} (--vectors) is not one of {', '.join(PRECISIONS)}")


def loaded_vectors(spectrum: Spectrum) -> int:
    """How many vectors of each side are here, not only on a disk."""
    return 0 if spectrum.U is None else spectrum.k


def parse(record: Mapping[str, Any], name: str) -> Header:
    """The typed value of a record; what an older version did not store has its default.

    Raises:
        ValueError: a field is missing or is not of its kind.
    """
    missing = [key for key in _NEEDED if key not in record]
    if missing:
        raise ValueError(f"its record lacks {', '.join(missing)}")
    strange = [key for key, types in _TYPES.items() if key in record and type(record[key]) not in types]
    strange += [key for key, fits in _KINDS.items() if key in record and not fits(record[key])]
    if strange:
        raise ValueError(f"its record's {strange[0]} is {str(record[strange[0]])[:40]!r}")
    if record["k"] > min(record["shape"], default=0):
        raise ValueError(f"its record says {record['k']} vectors, more than the matrix has")
    if record["name"] != name:
        raise ValueError("it is the record of another matrix")
    if record["status"] in DONE and not _real(record.get("norm", 0.0)):
        raise ValueError("its record has no norm")
    known = {attribute: record[said] for attribute, said in RECORDED.items() if said in record}
    if known.get("resolution", 0.0) is None:  # strict JSON has no infinity
        known["resolution"] = math.inf
    precision: Precision = record.get("vectors", "float64")
    by = record.get("measured_by", "")
    return Header(Spectrum(**known), record["values"], record["k"], record["key"], precision, str(by))


def similarity_record(similarity: SubspaceSimilarity, key: str) -> dict[str, Any]:
    """What is stored of a comparison beside its arrays."""
    return {**{name: getattr(similarity, name) for name in _COMPARED}, "key": key}


def parse_similarity(arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> SubspaceSimilarity:
    """The comparison that a record and its arrays are.

    Raises:
        ValueError: a field or an array is missing or is not of its kind.
    """
    for key, fits in _COMPARED_KINDS.items():
        if key in record and not fits(record[key]):
            raise ValueError(f"its record's {key} is {str(record[key])[:40]!r}")
    missing = [key for key in _COMPARED[:3] if key not in record]
    if missing:
        raise ValueError(f"its record lacks {', '.join(missing)}")
    k = record["k_used"]
    wanted = {"grid": (k, k), "chance": (k, k), "angles": (k,)}
    shapes = {key: array.shape for key, array in arrays.items()}
    if shapes != wanted:
        raise ValueError(f"its arrays {shapes} do not fit its record")
    given: dict[str, Any] = {key: record[key] for key in _COMPARED if record.get(key) is not None}
    return SubspaceSimilarity(**given | dict(arrays))


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) < 64 and all(map(_count, value))


_NEEDED = ("name", "shape", "status", "values", "k", "key")
# JSON gives exact types: for most fields one look tells, which counts where there are thousands of records.
_TEXT: frozenset[type] = frozenset({str})
_MAYBE_REAL: frozenset[type] = frozenset({int, float, type(None)})
_TYPES: dict[str, frozenset[type]] = {
    **dict.fromkeys(("name", "key", "rounding", "method", "reason", "note"), _TEXT),
    **dict.fromkeys(("norm", "noise_edge", "noise_energy", "base_norm", "base_cosine"), _MAYBE_REAL),
    **dict.fromkeys(("unchanged", "resolution"), _MAYBE_REAL),
    "base_rounding": frozenset({bool}),
}
_KINDS: dict[str, Callable[[Any], bool]] = {
    "shape": _shape,
    "status": lambda value: value in STATUSES,
    "values": _count,
    "k": _count,
    "vectors": lambda value: value in PRECISIONS,
    "max_rank": lambda value: value is None or _count(value),
    "moved": lambda value: value is None or (isinstance(value, list) and len(value) == 3 and all(map(_real, value))),
}
_COMPARED_KINDS: dict[str, Callable[[Any], bool]] = {
    "name": _text,
    "side": lambda value: value in SIDES,
    "k_used": _count,
    "note": _text,
    "other": _text,
    "gap": lambda value: value is None or _real(value),
    "key": _text,
}
