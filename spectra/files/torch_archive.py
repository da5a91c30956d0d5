"""What `torch.save` wrote (.bin, .pt, .pth, .ckpt), opened only with `weights_only=True`: no code of a pickle runs."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spectra.errors import SourceError
from spectra.files import torch_zip
from spectra.files.storage import Place, Stamp

SMALL_FILE = 256 * 2**20  # adapters: kept open between tensors; larger files are opened anew for each
_DAMAGED = (
    RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, zipfile.BadZipFile,
    struct.error, AssertionError, MemoryError, OverflowError, NotImplementedError, ImportError,
)  # fmt: skip
_DISTRIBUTED = (
    "holds distributed tensors (DTensor or ShardedTensor), each of which is one rank's part of a weight, and was not "
    "opened: save the whole ones, as DTensor.full_tensor() or get_model_state_dict with full_state_dict=True gives them"
)


def load(file: Place, stamp: Stamp) -> dict[str, Tensor]:
    """The file's state dict, whatever dict it is wrapped in. The last small files stay open.

    A zip archive on this machine is mapped, so that only the tensors that are used are read from the disk.

    Raises:
        SourceError: it is not a torch file, or holds something other than tensors.
    """
    return _load_small(file, stamp) if stamp[0] <= SMALL_FILE else load_anew(file, stamp)


def load_anew(file: Place, stamp: Stamp) -> dict[str, Tensor]:
    """As `load`, and nothing stays open."""
    return chosen(file, stamp)[0]


def chosen(file: Place, stamp: Stamp) -> tuple[dict[str, Tensor], list[str]]:
    """As `load_anew`; and where the file has other weights of the same names, the key that was taken and theirs."""
    if stamp[0] < 200 and file.read(0, stamp[0]).startswith(b"version https://git-lfs"):
        raise SourceError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    try:
        content = _content(file)
    except pickle.UnpicklingError as problem:
        first = str(problem).strip().splitlines()[0]
        if "torch.distributed" in first:
            raise SourceError(f"{file} {_DISTRIBUTED}") from None
        raise SourceError(f"{file} {_not_opened(str(problem))}") from None
    except _DAMAGED as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise SourceError(f"{file} is damaged or not a torch file ({first}); download or save it again") from None
    return _state_dict(file, content)


def _not_opened(said: str) -> str:
    """What to say where `weights_only=True` refuses a file; never torch's own advice, which is to do without it."""
    match = re.search(r"GLOBAL ([\w.]+)|Unsupported class ([\w.]+)|instantiate type <class '([\w.]+)'>", said)
    what = next(filter(None, match.groups())) if match else ""
    if not what:
        return "is damaged or holds more than tensors, and was not opened; download it again, or save its state dict"
    return (
        f"holds more than tensors ({what}) and was not opened, since code of a file is never run; where you trust "
        "it, save its state dict as safetensors"
    )


@lru_cache(maxsize=2)
def _load_small(file: Place, stamp: Stamp) -> dict[str, Tensor]:
    return load_anew(file, stamp)


def _content(file: Place) -> Any:
    local = file.storage.local_path(file.path)
    if local is not None:
        return torch.load(local, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(local))
    with file.open() as stream:
        return torch.load(stream, weights_only=True, map_location="cpu")


def _state_dict(file: Place, content: Any) -> tuple[dict[str, Tensor], list[str]]:
    content, around = torch_zip.unwrapped(content)
    if not isinstance(content, Mapping):
        raise SourceError(f"{file} holds a {type(content).__name__}, not a state dict of tensors")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for value in tensors.values():
        if type(value).__module__.startswith("torch.distributed"):
            raise SourceError(f"{file} {_DISTRIBUTED}")
    if not tensors:
        raise SourceError(f"{file} holds no tensors; is it an optimizer or arguments file?")
    others = [
        (taken, str(key))
        for taken, outside in around
        for key, value in outside.items()
        if key != taken and isinstance(value, Mapping) and any(isinstance(value.get(n), Tensor) for n in tensors)
    ]
    return tensors, [others[0][0], *(key for _, key in others)] if others else []
