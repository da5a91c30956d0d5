"""`TensorRef`: where a stored tensor's numbers are, and the only way to read them.

A reference is made from a file's header alone. Views (rows, an item of a stack, a transpose) are
recorded and applied when the tensor is read, so a part of a fused projection is still a reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from importlib import import_module
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
        container: which reader opens the file: "safetensors", "torch" or "gguf", whose file it is with "_file" added.
        stamp: the file's size and mtime (ns) when its header was read.
        offset: where the data start (safetensors and GGUF), in bytes.
        stored: the shape of what is read, before the views.
        views: what to do with it after reading, in order.
        scale: what the stored codes are multiplied by where fp8 keeps it apart: a single entry, one
            per row, or one per block.
        block: the (rows, columns) that one entry of `scale` stands for; () without blocks.
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
    scale: TensorRef | None = None
    block: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """How many entries the viewed tensor has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the viewed entries take in the file; 0 for a type whose width is not known."""
        if self.container == "gguf":
            from spectra.files import gguf_file

            return gguf_file.stored_bytes(self.dtype, self.numel) or 0
        return self.numel * DTYPES[self.dtype][1] if self.dtype in DTYPES else 0

    @property
    def is_float(self) -> bool:
        """Whether reading gives real numbers: stored as such, or as codes that are decoded."""
        return self.dtype in REAL_FLOATS or self.scale is not None or self.container == "gguf"

    @property
    def T(self) -> TensorRef:  # noqa: N802
        """The transpose of a matrix."""
        return replace(self, shape=self.shape[::-1], views=(*self.views, ("T", ())))

    def rows(self, start: int, stop: int) -> TensorRef:
        """Rows start … stop − 1."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise SourceError(f"{self.name} in {self.path} has {self.shape[0]} rows, not {start}:{stop}")
        shape = (stop - start, *self.shape[1:])
        skipped = self._bytes_of(start)
        if skipped is not None:
            return replace(self, shape=shape, stored=shape, offset=self.offset + skipped)
        return replace(self, shape=shape, views=(*self.views, ("rows", (start, stop))))

    def item(self, index: int) -> TensorRef:
        """The index-th entry along the first axis, which goes away."""
        skipped = self._bytes_of(index) if 0 <= index < self.shape[0] else None
        if skipped is not None:
            return replace(self, shape=self.shape[1:], stored=self.shape[1:], offset=self.offset + skipped)
        return replace(self, shape=self.shape[1:], views=(*self.views, ("item", (index,))))

    def _bytes_of(self, rows: int) -> int | None:
        """The bytes that the first rows fill, so that a part can be read alone; None where it cannot be."""
        if self.views or self.scale is not None or self.shape != self.stored:
            return None
        numel = rows * math.prod(self.shape[1:])
        if self.container == "safetensors" and self.dtype in DTYPES:
            return numel * DTYPES[self.dtype][1]
        if self.container == "gguf" and len(self.shape) > 1:
            from spectra.files import gguf_file

            return gguf_file.stored_bytes(self.dtype, numel)
        return None

    def reshape(self, *shape: int) -> TensorRef:
        """The same entries in row-major order under another shape."""
        if math.prod(shape) != self.numel:
            raise SourceError(f"{self.name} in {self.path} has shape {self.shape}, which is not {shape}")
        return replace(self, shape=shape, views=(*self.views, ("reshape", shape)))

    def permute(self, *axes: int) -> TensorRef:
        """The same entries with the axes in another order."""
        shape = tuple(self.shape[axis] for axis in axes)
        return replace(self, shape=shape, views=(*self.views, ("permute", axes)))

    def block_diagonal(self, blocks: int) -> TensorRef:
        """Blocks that are stored one below the other, along the diagonal of a larger matrix."""
        rows, columns = self.shape
        if blocks < 1 or rows % blocks:
            raise SourceError(f"the {rows} rows of {self.name} in {self.path} are not {blocks} blocks")
        return replace(self, shape=(rows, columns * blocks), views=(*self.views, ("blocks", (blocks,))))

    def check_unchanged(self) -> None:
        """Raise if the file is gone or is not the one whose header was read."""
        now = file_stamp(Path(self.path))
        if now != self.stamp:
            raise SourceError(f"{self.path} changed after it was opened; run the command again")

    def read(self, device: str = "cpu") -> Tensor:
        """The tensor in its storage dtype, or decoded where it is stored as codes.

        Raises:
            SourceError: the file is gone, changed or broken, or its dtype is one that torch lacks.
        """
        self.check_unchanged()
        tensor: Tensor = import_module(f"spectra.files.{self.container}_file").read_tensor(self)
        if self.scale is not None:
            tensor = _scaled(tensor, self.scale, self.block)
        return self.view(tensor).to(device)

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

        return self.read_real(device).to(torch.float64)

    def read_real(self, device: str = "cpu") -> Tensor:
        """The tensor in its storage dtype, if that holds real numbers.

        Raises:
            SourceError: as for `read_float64`.
        """
        if not self.is_float:
            raise SourceError(f"{self.name} in {self.path} is stored as {self.dtype}, not as real numbers")
        return self.read(device)


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
    if kind == "blocks":
        return _block_diagonal(tensor, arguments[0])
    return tensor.permute(arguments)


def _scaled(codes: Tensor, scale: TensorRef, block: tuple[int, ...]) -> Tensor:
    """codes ∘ scale in float64, where the product of an fp8 code and its scale is exact."""
    import torch

    factors = scale.read_float64()
    if block:
        for axis, size in enumerate(block):
            factors = factors.repeat_interleave(size, axis).narrow(axis, 0, codes.shape[axis])
    elif factors.numel() > 1:
        factors = factors.reshape(-1, *(1 for _ in codes.shape[1:]))
    return codes.to(torch.float64) * (factors if block or factors.numel() > 1 else factors.reshape(()))


def _block_diagonal(tensor: Tensor, blocks: int) -> Tensor:
    import torch

    return torch.block_diag(*tensor.chunk(blocks))  # type: ignore[no-untyped-call]
