"""Pickles read without running anything: every class and function that one names becomes a record of its name.

`pickle.load` calls what a file tells it to call. Here it can only make `Inert` objects, which keep what they were
called with, so that a header of classes of any version of any library, or of none that is installed, is plain data.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from spectra.errors import SourceError

_DAMAGED = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    MemoryError, RecursionError, ImportError,
)  # fmt: skip
_PLAIN = {("torch", "Size"): tuple, ("collections", "OrderedDict"): OrderedDict}


class Inert:
    """What a pickle calls or makes: the name is the subclass's.

    Attributes:
        args: what it was called with.
        state: what `__setstate__` would have been given.
    """

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **options: Any) -> Inert:
        """Keep the arguments."""
        made = object.__new__(cls)
        made.args, made.state = args, None
        return made

    def __call__(self, *args: Any) -> Inert:
        """What a function that a pickle made would have returned: nothing that is known."""
        return Inert(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """A mapping's entries are not kept."""

    def append(self, item: Any) -> None:
        """A list's entries are not kept."""

    def get(self, name: str) -> Any:
        """An attribute that the object would have; None where it has none."""
        value = None
        for part in self.state if isinstance(self.state, tuple) else (self.state,):  # (attributes, slots)
            if isinstance(part, dict):
                value = part.get(name, value)
        return value


def load(content: bytes | bytearray, where: str, persistent: Callable[[Any], Any] | None = None) -> Any:
    """What a pickle holds, as builtin types and `Inert` objects.

    Args:
        content: the pickle.
        where: the file, for messages.
        persistent: what an id of something outside the pickle stands for; without it such an id is damage.

    Raises:
        SourceError: it is damaged.
    """
    if _remembers_too_much(content):
        raise SourceError(f"{where} is damaged (it numbers more objects than it has bytes); download or save it again")
    reader = _Reader(io.BytesIO(content))
    if persistent is not None:
        reader.persistent_load = persistent  # type: ignore[method-assign]
    try:
        return reader.load()
    except _DAMAGED as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise SourceError(f"{where} is damaged ({first}); download or save it again") from None


def named(value: Any) -> str:
    """The name of the class or function that an object, or a class itself, stands for; "" for plain data.

    >>> named(load(pickle.dumps(print), "a file"))
    'print'
    """
    kind = value if isinstance(value, type) else type(value)
    return kind.__name__ if issubclass(kind, Inert) else ""


def sizes_of(value: Any) -> tuple[int, ...] | None:
    """A shape, stride or place: natural numbers of a sensible size; None for anything else.

    >>> sizes_of([3, 4]), sizes_of((3, -1)), sizes_of("34")
    ((3, 4), None, None)
    """
    good = isinstance(value, tuple | list) and all(type(size) is int and 0 <= size < 2**62 for size in value)
    return tuple(value) if good else None


def _remembers_too_much(content: bytes | bytearray) -> bool:
    """Whether a pickle gives an object a number beyond its own length: the unpickler makes room for all below it."""
    for match in re.finditer(rb"r(....)", content, re.DOTALL):  # LONG_BINPUT, or those bytes within a string
        if int.from_bytes(match[1], "little") > len(content):
            break
    else:
        return False
    try:
        import pickletools  # for the damaged alone

        numbers = (given for code, given, _ in pickletools.genops(bytes(content)) if code.name == "LONG_BINPUT")
        return any(number is not None and number > len(content) for number in numbers)
    except _DAMAGED:
        return True


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._made: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if (module, name) not in self._made:
            self._made[module, name] = type(name, (Inert,), {})
        return self._made[module, name]
