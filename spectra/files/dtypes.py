"""Types of stored entries: safetensors' names, what torch calls them, and how wide they are."""

from __future__ import annotations

# Name → (torch's name, bytes per entry). GGUF's types that need no decoder have the same names.
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
    "BOOL": ("bool", 1), "C64": ("complex64", 8),
}  # fmt: skip
DTYPE_OF_TORCH = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
REAL_FLOATS = ("F64", "F32", "F16", "BF16")


def plain_bytes(dtype: str, numel: int) -> int | None:
    """The bytes of so many entries; None for a type whose width is not known.

    >>> plain_bytes("BF16", 6)
    12
    """
    return numel * DTYPES[dtype][1] if dtype in DTYPES else None
