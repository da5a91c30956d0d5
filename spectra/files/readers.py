"""How the tensors of each container are read: one function per container, listed in `READERS`.

Needs torch, so it is imported when the first tensor is read. A reader knows nothing of views and scales:
those are `TensorRef`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from spectra.errors import SourceError
from spectra.files import ggml, torch_archive, torch_zip
from spectra.files.dtypes import DTYPES, plain_bytes
from spectra.files.memory import Memory
from spectra.files.storage import Place, Stamp


class Stored(Protocol):
    """What a reader has to know of a tensor, as `TensorRef` says it: where it is, its type and stored shape."""

    @property
    def file(self) -> Place:
        """Its file."""

    @property
    def stamp(self) -> Stamp:
        """The file's stamp when its header was read."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def dtype(self) -> str:
        """Its storage type."""

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape that is stored."""

    @property
    def offset(self) -> int:
        """Where its bytes start."""


def read_safetensors(ref: Stored) -> Tensor:
    """A tensor whose entries lie in the file in row-major order.

    Raises:
        SourceError: the file ends too early, or torch lacks the type.
    """
    if ref.dtype not in DTYPES:
        raise SourceError(f"{ref.name} in {ref.file} has the type {ref.dtype}, which is not supported")
    return _plain(ref)


def read_gguf(ref: Stored) -> Tensor:
    """A tensor of a GGUF file; quantised types are decoded to float32, as llama.cpp does it.

    Raises:
        SourceError: the file ends too early, or the `gguf` package does not decode the type.
        MissingExtraError: the type is quantised and the `gguf` package is not installed.
    """
    if ref.dtype in ggml.PLAIN:
        return _plain(ref)
    gguf = ggml.package()
    entries, size = ggml.block_sizes()[ref.dtype]
    codes = _bytes(ref, ggml.array_bytes(ref.dtype, ref.stored) or 0)
    rows = codes.numpy().reshape(-1, ref.stored[-1] // entries * size)
    try:
        decoded = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[ref.dtype])
    except NotImplementedError:
        raise SourceError(f"{ref.name} in {ref.file}: the gguf package does not decode {ref.dtype}") from None
    return torch.from_numpy(np.ascontiguousarray(decoded, dtype=np.float32)).reshape(ref.stored)


def read_torch(ref: Stored) -> Tensor:
    """A tensor of a file that `torch.save` wrote; what is no plain tensor in it (a subclass) is taken from a map.

    Raises:
        SourceError: the file is damaged.
    """
    if ref.file.storage.local_path(ref.file.path) is not None:
        lying = torch_zip.placed(ref.file, ref.stamp).get(ref.name)
        if lying is not None and (lying.dtype, lying.stored) == (ref.dtype, ref.stored):
            return _plain(lying) if lying.steps is None and not lying.marks else _spread(lying)
    return _own(torch_archive.load(ref.file, ref.stamp)[ref.name].detach())


def read_dcp(ref: Stored) -> Tensor:
    """A tensor of a folder that torch.distributed.checkpoint wrote.

    Raises:
        SourceError: a piece of it is damaged or gone.
    """
    try:
        from spectra.files import dcp_pieces  # takes a second to import
    except ImportError as problem:
        raise SourceError(f"{ref.file} needs a torch with torch.distributed to be read ({problem})") from None
    return dcp_pieces.read(ref.file, ref.stamp, ref.name)


def read_memory(ref: Stored) -> Tensor:
    """A tensor that is in memory, as it is.

    Raises:
        SourceError: it was changed in place after it was listed.
    """
    return _own(cast(Memory, ref.file.storage).get(ref.name, str(ref.file)))


def _own(tensor: Tensor) -> Tensor:
    """What can be worked on in float64 in place though others hold it: to float64 is a copy of every other type."""
    return tensor.clone() if tensor.dtype is torch.float64 else tensor


READERS: dict[str, Callable[[Stored], Tensor]] = {
    "safetensors": read_safetensors,
    "archive": read_safetensors,  # a record of torch's zip archive lies as plainly
    "gguf": read_gguf,
    "torch": read_torch,
    "dcp": read_dcp,
    "memory": read_memory,
}


def _plain(ref: Stored) -> Tensor:
    content = _bytes(ref, plain_bytes(ref.dtype, math.prod(ref.stored)) or 0)
    return content.view(getattr(torch, DTYPES[ref.dtype][0])).reshape(ref.stored)


def _spread(lying: torch_zip.Lying) -> Tensor:
    """A tensor whose entries lie in another order, or stand for others; all from the first to the last are read."""
    entries = _bytes(lying, plain_bytes(lying.dtype, lying.extent) or 0).view(getattr(torch, DTYPES[lying.dtype][0]))
    tensor = entries.reshape(lying.stored) if lying.steps is None else entries.as_strided(lying.stored, lying.steps)
    tensor = tensor.conj().resolve_conj() if "conj" in lying.marks else tensor
    return tensor.neg() if "neg" in lying.marks else tensor


def _bytes(ref: Stored, size: int) -> Tensor:
    """So many bytes of the tensor, read straight into the memory that it will have."""
    content = torch.empty(size, dtype=torch.uint8)
    if size and ref.file.read_into(ref.offset, content.numpy().data) < size:
        raise SourceError(f"{ref.file} ends inside {ref.name}; download or save it again")
    if ref.file.stamp() != ref.stamp:  # it may have while it was read
        raise SourceError(f"{ref.file} changed after it was opened; run the command again")
    return content
