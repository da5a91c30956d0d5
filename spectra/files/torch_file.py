"""Tensors of one .bin / .pt / .pth / .ckpt file: pickles, opened only with `weights_only=True`."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import SourceError
from spectra.files.tensors import DTYPE_OF_TORCH, TensorRef, file_stamp

if TYPE_CHECKING:
    from torch import Tensor

SMALL_FILE = 256 * 2**20  # adapters: kept open between tensors; larger files are mapped anew for each
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


def read_header(path: Path) -> tuple[dict[str, TensorRef], dict[str, str], dict[str, str]]:
    """The tensors that the file holds; same return as for safetensors.

    A tensor that is the same storage as an earlier one is listed, and in the metadata the first name
    is its value, as `safetensors.torch.save_model` writes it.

    Raises:
        SourceError: it is not a torch file, or holds something other than plain tensors.
    """
    import torch

    stamp = file_stamp(path)
    tensors: dict[str, TensorRef] = {}
    broken: dict[str, str] = {}
    same: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in _load(path, stamp).items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            broken[name] = f"it is a sparse, quantised or empty (meta) tensor in {path}; save it as a plain one"
            continue
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            broken[name] = f"{path} stores fewer entries than its shape {list(tensor.shape)} has; save it again"
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = tuple(tensor.shape)
        tensors[name] = TensorRef(
            str(path), name, DTYPE_OF_TORCH.get(dtype, dtype), shape, "torch", stamp, stored=shape
        )
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, shape, tensor.stride())
            if place in first:
                same[name] = first[place]
            first.setdefault(place, name)
    return tensors, broken, same


def read_tensor(ref: TensorRef) -> Tensor:
    """The stored tensor, before its views."""
    load = _load_small if ref.stamp[0] <= SMALL_FILE else _load
    return load(Path(ref.path), ref.stamp)[ref.name].detach()


def _load(path: Path, stamp: tuple[int, int]) -> dict[str, Tensor]:
    import torch

    if stamp[0] < 200:
        _refuse_pointer(path)
    try:
        # A zip archive is mapped, so that only the tensors that are used are read from the disk.
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as problem:
        first = str(problem).strip().splitlines()[0]
        raise SourceError(
            f"{path} holds more than tensors or is damaged, and was not opened (torch.load with weights_only=True: "
            f"{first}); convert it to safetensors where you trust it"
        ) from None
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
    ) as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise SourceError(f"{path} is damaged or not a torch file ({first}); download or save it again") from None
    return _state_dict(path, content)


@lru_cache(maxsize=2)
def _load_small(path: Path, stamp: tuple[int, int]) -> dict[str, Tensor]:
    return _load(path, stamp)


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    import torch

    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise SourceError(f"{path} holds a {type(content).__name__}, not a state dict of tensors")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise SourceError(f"{path} holds no tensors; is it an optimizer or arguments file?")
    return tensors


def _refuse_pointer(path: Path) -> None:
    if path.read_bytes().startswith(b"version https://git-lfs"):
        raise SourceError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
