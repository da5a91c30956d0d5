"""`TensorRef`: where a stored tensor's numbers are, and the only way to read them.

A reference is made from a file's header alone. Views (rows, an item of a stack, a transpose) are
recorded and applied when the tensor is read, so a part of a fused projection is still a reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.errors import SourceError

if TYPE_CHECKING:
    from torch import Tensor

# safetensors' dtype names → (torch's name, bytes per entry).
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
    "BOOL": ("bool", 1), "C64": ("complex64", 8),
}  # fmt: skip
DTYPE_OF_TORCH = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
REAL_FLOATS = ("F64", "F32", "F16", "BF16")

View = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class TensorRef:
    """A stored tensor that has not been read: file, name, dtype, shape and a chain of views.

    Attributes:
        path: the file.
        name: the tensor's name in that file.
        dtype: its storage type in safetensors' words, such as "BF16".
        shape: its shape after the views.
        container: which reader opens the file: "safetensors" or "torch".
        stamp: the file's size and mtime (ns) when its header was read.
        offset: where the data start (safetensors), in bytes.
        stored: the shape in the file, before the views.
        views: what to do with it after reading, in order.
    """

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    container: str
    stamp: tuple[int, int]
    offset: int = 0
    stored: tuple[int, ...] = ()
    views: tuple[View, ...] = field(default=())

    @property
    def numel(self) -> int:
        """How many entries the viewed tensor has."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether the entries are plain real numbers rather than codes of a quantised format."""
        return self.dtype in REAL_FLOATS

    @property
    def T(self) -> TensorRef:  # noqa: N802
        """The transpose of a matrix."""
        return replace(self, shape=self.shape[::-1], views=(*self.views, ("T", ())))

    def rows(self, start: int, stop: int) -> TensorRef:
        """Rows start … stop − 1."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise SourceError(f"{self.name} in {self.path} has {self.shape[0]} rows, not {start}:{stop}")
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            views=(*self.views, ("rows", (start, stop))),
        )

    def item(self, index: int) -> TensorRef:
        """The index-th entry along the first axis, which goes away."""
        return replace(self, shape=self.shape[1:], views=(*self.views, ("item", (index,))))

    def reshape(self, *shape: int) -> TensorRef:
        """The same entries in row-major order under another shape."""
        if math.prod(shape) != self.numel:
            raise SourceError(f"{self.name} in {self.path} has shape {self.shape}, which is not {shape}")
        return replace(self, shape=shape, views=(*self.views, ("reshape", shape)))

    def permute(self, *axes: int) -> TensorRef:
        """The same entries with the axes in another order."""
        shape = tuple(self.shape[axis] for axis in axes)
        return replace(self, shape=shape, views=(*self.views, ("permute", axes)))

    def check_unchanged(self) -> None:
        """Raise if the file is gone or is not the one whose header was read."""
        now = file_stamp(Path(self.path))
        if now != self.stamp:
            raise SourceError(f"{self.path} changed after it was opened; run the command again")

    def read(self, device: str = "cpu") -> Tensor:
        """The tensor in its storage dtype.

        Raises:
            SourceError: the file is gone, changed or broken, or its dtype is one that torch lacks.
        """
        from spectra.sources import safetensors_file, torch_file

        readers = {"safetensors": safetensors_file.read_tensor, "torch": torch_file.read_tensor}
        self.check_unchanged()
        return self.view(readers[self.container](self)).to(device)

    def view(self, tensor: Tensor) -> Tensor:
        """This reference's views, applied to a tensor that is already here."""
        for kind, arguments in self.views:
            tensor = _apply(tensor, kind, arguments)
        return tensor

    def read_float64(self, device: str = "cpu") -> Tensor:
        """The tensor as float64, in which products of stored values are exact.

        Raises:
            SourceError: the entries are integers or codes, so their values are not known from here.
        """
        import torch

        if not self.is_float:
            raise SourceError(f"{self.name} in {self.path} is stored as {self.dtype}, not as real numbers")
        return self.read(device).to(torch.float64)


def file_stamp(path: Path) -> tuple[int, int]:
    """Size and modification time (ns) of a file, symlinks followed.

    Raises:
        SourceError: it cannot be looked at.
    """
    try:
        status = path.stat()
    except OSError as problem:
        raise SourceError(f"{path} cannot be opened: {problem.strerror}") from None
    return (status.st_size, status.st_mtime_ns)


def _apply(tensor: Tensor, kind: str, arguments: tuple[int, ...]) -> Tensor:
    if kind == "T":
        return tensor.T
    if kind == "rows":
        return tensor[arguments[0] : arguments[1]]
    if kind == "item":
        return tensor[arguments[0]]
    if kind == "reshape":
        return tensor.reshape(arguments)
    return tensor.permute(arguments)
