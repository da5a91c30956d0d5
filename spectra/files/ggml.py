"""The types of GGUF's tensors: ggml's numbers for them, and the bytes of their blocks as the `gguf` package says."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from spectra.errors import MissingExtraError
from spectra.files.dtypes import plain_bytes

# ggml's numbers of the types that need no decoder.
_PLAIN = {0: "F32", 1: "F16", 30: "BF16", 28: "F64", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}
PLAIN = frozenset(_PLAIN.values())


def type_name(number: int) -> str | None:
    """The type that ggml gives this number; None for one that the package does not know.

    Raises:
        MissingExtraError: it is a quantised type and the `gguf` package is not installed.
    """
    if number in _PLAIN:
        return _PLAIN[number]
    gguf = package()
    try:
        name = gguf.GGMLQuantizationType(number).name
    except ValueError:
        return None
    return name if name in block_sizes() else None


def stored_bytes(dtype: str, numel: int) -> int | None:
    """The bytes of so many entries; None if they do not fill whole blocks."""
    if dtype in PLAIN:
        return plain_bytes(dtype, numel)
    entries, size = block_sizes()[dtype]
    return numel // entries * size if numel % entries == 0 else None


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """The bytes of an array, whose rows are whole blocks; None if they are not."""
    if dtype not in PLAIN and shape[-1] % block_sizes()[dtype][0]:
        return None
    return stored_bytes(dtype, math.prod(shape))


@lru_cache(maxsize=1)
def block_sizes() -> dict[str, tuple[int, int]]:
    """Quantised type → entries and bytes of one of its blocks."""
    gguf = package()
    return {kind.name: (entries, size) for kind, (entries, size) in gguf.GGML_QUANT_SIZES.items()}


def package() -> Any:
    """The `gguf` package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("reading quantised GGUF tensors", "gguf") from None
    return gguf
