"""What can go wrong, as one family: every message names the file or matrix and says what to do next."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from spectra.printing import printed, shortened

_LONGEST_WORD = 500
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")
_LONGEST = 3000  # characters of a message
_LOOKED_AT = 2**16  # and of the text that it is made of


def escaped(text: str) -> str:
    r"""The text on one line: what does not print is written as Python writes it, since names come from files.

    Names of thousands of characters are shortened, their middle left out.

    >>> escaped("layers.0\x1b[2J\nweight")
    'layers.0\\x1b[2J\\nweight'
    """
    line = text[:_LOOKED_AT]
    if not line.isprintable():  # most are, and errors are made for every metric that a short spectrum does not have
        line = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line)
    return shortened(_LONG_WORD.sub(lambda word: shortened(word[0], _LONGEST_WORD), line), _LONGEST)


class SpectraError(Exception):
    """Base of every error that a user can cause or mend; its text is the whole message, safe to print."""

    def __str__(self) -> str:
        return printed(super().__str__())

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


class SourceError(SpectraError):
    """An input cannot be read, or is not what it says it is."""


class NotFoundError(SourceError):
    """A path, hub id or alias leads nowhere; the message lists what was tried."""


class UnsupportedFormatError(SourceError):
    """The format is recognised and refused by name, or not recognised at all."""


class BaseRequiredError(SourceError):
    """The format's ΔW cannot be formed without the base weights."""


class SelectionError(SpectraError):
    """A layer pattern, head or K selects nothing; the message lists what exists."""


class TruncatedSpectrumError(SpectraError):
    """A metric needs the whole spectrum and was given its top only."""


class StoreError(SpectraError):
    """A results directory cannot be written, read, or belongs to other inputs."""


class DeviceError(SpectraError):
    """The device that was asked for is not there."""


class MissingExtraError(SpectraError):
    """An optional dependency is not installed; the message holds the install command."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency: pip install 'weight-spectra[{extra}]'")
        self._given = (what, extra)

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        """What to make it of again: an error of a worker process is told in the user's."""
        return MissingExtraError, self._given


def refuse_path_for_source(given: object, function: str) -> None:
    """Refuse a path or a model where updates are wanted, and one thing in place of several.

    How it is opened, and with which base, is the caller's.

    Raises:
        SelectionError: it is one of these.
    """
    if isinstance(given, str | os.PathLike):
        path = os.fspath(given)
        raise SelectionError(f"{function} takes updates, not a path: open_source({path!r}, base=…) opens it")
    if isinstance(given, Mapping) or hasattr(given, "state_dict"):
        kind = type(given).__name__
        raise SelectionError(f"{function} takes updates, not a model ({kind}): open_source(model, base=…) opens it")
    _refuse_one(given, function, "updates")


def refuse_path_for_spectra(given: object, function: str) -> None:
    """Refuse a path where spectra are wanted, since computing them may take hours, and one thing in place of several.

    Raises:
        SelectionError: it is one of these.
    """
    if isinstance(given, str | os.PathLike):
        path = os.fspath(given)
        raise SelectionError(
            f"{function} takes spectra, not a path: load({path!r}) where results are stored there, "
            f"decompose({path!r}) where it is a model"
        )
    _refuse_one(given, function, "spectra")


def _refuse_one(given: object, function: str, wanted: str) -> None:
    if not isinstance(given, Iterable):
        kind = type(given).__name__
        raise SelectionError(f"{function} takes several {wanted}, and was given one {kind}: [it] is a list of one")
