"""The tensors of one file that `torch.save` wrote: its header is the pickle itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spectra.files import torch_archive
from spectra.files.dtypes import DTYPE_OF_TORCH
from spectra.files.header import Header
from spectra.files.storage import Place, Stamp
from spectra.files.tensors import TensorRef


def read_header(file: Place) -> Header:
    """The tensors that the file holds.

    A tensor that is the same storage as an earlier one is listed, and in the metadata the first name
    is its value, as `safetensors.torch.save_model` writes it.

    Raises:
        SourceError: it is not a torch file, or holds something other than plain tensors.
    """
    stamp = file.stamp()
    tensors, others = torch_archive.chosen(file, stamp)
    header = header_of(tensors, file, stamp, "torch")
    if others:
        taken, *left_out = map(repr, others)
        header.warnings.append(
            f"{file}: took {taken} and left out {', '.join(left_out)}, which has weights of the same names: save the "
            "one that you mean on its own to choose it"
        )
    return header


def header_of(found: Mapping[str, Tensor], file: Place, stamp: Stamp, container: str) -> Header:
    """As `read_header`, of tensors that are here."""
    tensors: dict[str, TensorRef] = {}
    broken: dict[str, str] = {}
    same: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            broken[name] = f"it is a sparse, quantised or empty (meta) tensor in {file}; save it as a plain one"
            continue
        if hasattr(tensor, "full_tensor"):
            broken[name] = f"it is spread over several processes in {file}; gather the full state dict first"
            continue
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            broken[name] = f"{file} stores fewer entries than its shape {list(tensor.shape)} has; save it again"
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = tuple(tensor.shape)
        tensors[name] = TensorRef(
            file.path, name, DTYPE_OF_TORCH.get(dtype, dtype), shape, container, stamp, file.storage, stored=shape
        )
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, shape, tensor.stride())
            if place in first:
                same[name] = first[place]
            first.setdefault(place, name)
    return Header(tensors, broken, same)
