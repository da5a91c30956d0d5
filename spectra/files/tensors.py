"""`TensorRef`: where a stored tensor's numbers are, and the only way to read them.

A reference is made from a file's header alone. Views (rows, an item of a stack, a transpose) are
recorded and applied when the tensor is read, so a part of a fused projection is still a reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

from spectra.errors import SourceError
from spectra.files import ggml
from spectra.files.dtypes import REAL_FLOATS, plain_bytes
from spectra.files.storage import DISK, Place, Stamp, Storage
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

View = tuple[str, tuple[int, ...]]
WHOLE = ("torch", "dcp", "memory")  # containers that give a tensor as a whole, found by name


class Codec(Protocol):
    """How a weight is made of stored codes and what goes with them; `spectra.files.codecs` has one per format.

    Attributes:
        linear: the weight is (out, in) whatever the architecture's own files do: the format packs Linear layers.
        decodes: reading gives real numbers, whatever type the codes have.
    """

    linear: ClassVar[bool]
    decodes: ClassVar[bool]

    @property
    def reading_bytes(self) -> int:
        """All stored parts, the weight and the work space."""
        ...

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All stored tensors that the weight is made of, the codes first."""
        ...

    def read(self) -> Tensor:
        """The weight."""
        ...

    def rows(self, start: int, stop: int) -> Codec | None:
        """The same for some rows, where they can be read alone."""
        ...

    def item(self, index: int) -> Codec | None:
        """The same for one entry along the first axis, where it can be read alone."""
        ...


@dataclass(frozen=True)
class TensorRef:
    """A stored tensor that has not been read: file, name, dtype, shape and a chain of views.

    Attributes:
        path: the file, as its storage and messages call it.
        name: the tensor's name in that file.
        dtype: its storage type in safetensors' words, such as "BF16".
        shape: its shape after the views.
        container: the kind of file, which is its key in `READERS`: "safetensors", "torch", "gguf", "archive" (a record
            of torch's zip archive, read as bytes), "dcp" or "memory".
        stamp: the file's size and version when its header was read.
        storage: where the file lies.
        offset: where the data start (safetensors, archives and GGUF), in bytes.
        stored: the shape of what is read, before the views.
        views: what to do with it after reading, in order.
        codec: how it is made of other stored tensors: codes with what goes with them, or parts in several files;
            None where it lies in the file as it is. `dtype` then names the codes, `shape` is that of the weight.
    """

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    container: str
    stamp: Stamp
    storage: Storage = DISK
    offset: int = 0
    stored: tuple[int, ...] = ()
    views: tuple[View, ...] = field(default=())
    codec: Codec | None = None

    @classmethod
    def joined(cls, parts: Sequence[TensorRef], axis: int) -> TensorRef:
        """One tensor of which several files hold a part each, one after the other along an axis.

        Raises:
            SourceError: their dtypes differ, or their shapes do along another axis.
        """
        first = parts[0]
        others = {(part.dtype, part.shape[:axis], part.shape[axis + 1 :]) for part in parts}
        if len(others) > 1:
            raise SourceError(f"the parts of {first.name} in {first.path} and {parts[-1].path} do not fit together")
        shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
        place = (first.path, first.name, first.dtype, shape, first.container, first.stamp, first.storage)
        return cls(*place, stored=shape, codec=Joined(tuple(parts), axis))

    @property
    def numel(self) -> int:
        """How many entries the viewed tensor has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the viewed entries take in the file; 0 for a type whose width is not known."""
        if self.codec is not None:
            return sum(part.nbytes for part in self.codec.refs)
        return self._bytes_of(self.numel) or 0

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """The tensors that are stored: itself, or all that it is made of."""
        if self.codec is None:
            return (self,)
        return tuple(part for ref in self.codec.refs for part in ref.parts)

    @property
    def bytes_read(self) -> int:
        """How many bytes of the file are read for it, whatever part of them its views take; 0 if that is not known."""
        return self._bytes_of(math.prod(self.stored)) or 0

    @property
    def file(self) -> Place:
        """The file in its storage."""
        return Place(self.storage, self.path)

    @property
    def is_float(self) -> bool:
        """Whether reading gives real numbers: stored as such, or as codes that are decoded."""
        return self.dtype in REAL_FLOATS or (self.codec is not None and self.codec.decodes) or self.container == "gguf"

    @property
    def T(self) -> TensorRef:  # noqa: N802
        """The transpose of a matrix."""
        return replace(self, shape=self.shape[::-1], views=(*self.views, ("T", ())))

    def rows(self, start: int, stop: int) -> TensorRef:
        """Rows start … stop − 1."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise SourceError(f"{self.name} in {self.path} has {self.shape[0]} rows, not {start}:{stop}")
        shape = (stop - start, *self.shape[1:])
        if self.codec is not None and not self.views and (codec := self.codec.rows(start, stop)) is not None:
            return replace(self, shape=shape, codec=codec)
        return self._part(start, shape) or replace(self, shape=shape, views=(*self.views, ("rows", (start, stop))))

    def item(self, index: int) -> TensorRef:
        """The index-th entry along the first axis, which goes away."""
        shape = self.shape[1:]
        if self.codec is not None and not self.views and (codec := self.codec.item(index)) is not None:
            return replace(self, shape=shape, codec=codec)
        part = self._part(index, shape) if 0 <= index < self.shape[0] else None
        return part or replace(self, shape=shape, views=(*self.views, ("item", (index,))))

    def _part(self, rows: int, shape: tuple[int, ...]) -> TensorRef | None:
        """What follows the first rows, as a tensor that is read alone; None where only the whole can be read."""
        if self.container in WHOLE or self.views or self.codec is not None or self.shape != self.stored:
            return None
        skipped, left = self._bytes_of(rows * math.prod(self.shape[1:])), self._bytes_of(math.prod(shape))
        if skipped is None or left is None:
            return None
        return replace(self, shape=shape, stored=shape, offset=self.offset + skipped)

    def _bytes_of(self, numel: int) -> int | None:
        """The bytes of so many entries in the file; None for an unknown type or a piece of a block of codes."""
        return ggml.stored_bytes(self.dtype, numel) if self.container == "gguf" else plain_bytes(self.dtype, numel)

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
        if self.file.stamp() != self.stamp:
            raise SourceError(f"{self.path} changed after it was opened; run the command again")

    def read(self, device: str = "cpu") -> Tensor:
        """The tensor in its storage dtype, or decoded where it is stored as codes.

        Raises:
            SourceError: the file is gone, changed or broken, or its dtype is one that torch lacks.
        """
        from spectra.files.readers import READERS

        if self.codec is not None:
            return self.view(self.codec.read()).to(device)
        self.check_unchanged()
        return self.view(READERS[self.container](self)).to(device)

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
        return self.read_real(device).to(torch.float64)

    def read_real(self, device: str = "cpu") -> Tensor:
        """The tensor in its storage dtype, if that holds real numbers.

        Raises:
            SourceError: as for `read_float64`.
        """
        if not self.is_float:
            raise SourceError(f"{self.name} in {self.path} is stored as {self.dtype}, not as real numbers")
        return self.read(device)


@dataclass(frozen=True)
class Joined:
    """A tensor of which several files hold a part each.

    Attributes:
        parts: the parts in order.
        axis: along which they lie one after the other.
    """

    linear: ClassVar[bool] = False
    decodes: ClassVar[bool] = False
    parts: tuple[TensorRef, ...]
    axis: int

    @property
    def reading_bytes(self) -> int:
        """The parts, and the whole."""
        return 2 * sum(part.nbytes for part in self.parts)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The parts."""
        return self.parts

    def read(self) -> Tensor:
        """The parts side by side."""
        return torch.cat([part.read() for part in self.parts], self.axis)

    def rows(self, start: int, stop: int) -> None:
        """Not read alone."""

    def item(self, index: int) -> None:
        """Not read alone."""


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


def _block_diagonal(tensor: Tensor, blocks: int) -> Tensor:
    return torch.block_diag(*tensor.chunk(blocks))  # type: ignore[no-untyped-call]
