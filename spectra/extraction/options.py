"""How an extraction writes: whose files, in which type. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from spectra.errors import SelectionError

Format = Literal["peft", "kohya"]
DType = Literal["float64", "float32", "bfloat16", "float16"]
FORMATS: tuple[Format, ...] = get_args(Format)
DTYPES: tuple[DType, ...] = get_args(DType)


@dataclass(frozen=True)
class Options:
    """How an extraction writes.

    Attributes:
        format: "peft" or "kohya".
        dtype: what the factors are stored in.
        save_modules: whether modules whose vectors changed are kept whole.
    """

    format: Format = "peft"
    dtype: DType = "float32"
    save_modules: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise SelectionError(f"format = {self.format!r} is not one of {', '.join(FORMATS)}")
        if self.dtype not in DTYPES:
            raise SelectionError(f"dtype = {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.save_modules and self.format != "peft":
            raise SelectionError("save_modules needs format='peft': kohya's files keep no module whole")
