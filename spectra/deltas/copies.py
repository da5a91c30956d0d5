"""A source whose files were copied to this machine, as if it had been opened here."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from spectra.deltas.source import Source
from spectra.files.storage import DISK, Place
from spectra.files.tensors import TensorRef


def at_home(source: Source, copied: Mapping[str, str]) -> Source:
    """The same updates, read where the copies lie; what was not copied stays where it is.

    Args:
        source: opened where its models are.
        copied: the address of a model → its path on this machine.
    """
    deltas = tuple(_moved(delta) for delta in source.deltas)
    tuned, base = copied.get(source.tuned, source.tuned), copied.get(source.base or "", source.base)
    return replace(source, deltas=deltas, tuned=tuned, base=base)


def _moved(value: Any) -> Any:
    """A value with every reference in it to a file that was copied led to the copy."""
    if isinstance(value, tuple):
        inner = tuple(_moved(item) for item in value)
        return value if all(map(operator.is_, inner, value)) else inner
    if is_dataclass(value) and not isinstance(value, type):
        old = {item.name: getattr(value, item.name) for item in fields(value) if item.init}
        new = {name: moved for name, item in old.items() if (moved := _moved(item)) is not item}
        value = replace(value, **new) if new else value
    return _to_copy(value) if isinstance(value, TensorRef) else value


def _to_copy(ref: TensorRef) -> TensorRef:
    local = ref.storage.local_path(ref.path) if ref.storage != DISK else None
    if local is None:
        return ref
    file = Place.of(local)
    return replace(ref, path=file.path, storage=DISK, stamp=file.stamp())
