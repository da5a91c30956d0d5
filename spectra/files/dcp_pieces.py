"""One tensor of a torch.distributed.checkpoint folder, put together by torch's own reader and planner.

torch's reader gets one tensor's checked part of the metadata and never opens `.metadata`, which it would unpickle; it
loads each piece with `weights_only=True`.

Reference: PyTorch, `torch.distributed.checkpoint` (FileSystemReader, DefaultLoadPlanner).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict  # load() warns of no process group

from spectra.errors import SourceError
from spectra.files.dcp_list import Listed, listed
from spectra.files.dtypes import DTYPES
from spectra.files.storage import Place, Stamp


def read(file: Place, stamp: Stamp, key: str) -> Tensor:
    """One tensor, put together by torch's reader from the pieces that hold it.

    Args:
        file: the `.metadata`.
        stamp: its stamp.
        key: the tensor's name in it.

    Raises:
        SourceError: a piece is damaged or gone, or the folder is not on this machine.
    """
    local = file.parent.storage.local_path(file.parent.path)
    if local is None:
        raise SourceError(f"{file.parent} is a distributed checkpoint, which is read on a disk only; download it")
    entry = listed(file, stamp)[key]
    if isinstance(entry, str):
        raise SourceError(entry)
    whole = torch.empty(entry.shape, dtype=getattr(torch, DTYPES[entry.dtype][0]))
    try:
        _load_state_dict({key: whole}, _reader(local, key, entry), planner=DefaultLoadPlanner(), no_dist=True)
    except (CheckpointException, RuntimeError, ValueError, KeyError, AssertionError, OSError) as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[-1]
        raise SourceError(
            f"{key} in {file.parent} cannot be read ({first}); copy or save the checkpoint again"
        ) from None
    return whole


def _reader(folder: str, key: str, entry: Listed) -> Any:
    """torch's reader of a folder whose metadata lists one tensor."""

    chunks = [metadata.ChunkStorageMetadata(torch.Size(it.offsets), torch.Size(it.sizes)) for it in entry.pieces]
    properties = metadata.TensorProperties(dtype=getattr(torch, DTYPES[entry.dtype][0]))
    alone = metadata.Metadata(
        {key: metadata.TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)},
        planner_data={key: (key,)},
        storage_data={
            metadata.MetadataIndex(key, it.offsets): filesystem._StorageInfo(it.file, it.start, it.length)
            for it in entry.pieces
        },
        storage_meta=metadata.StorageMeta(),
    )

    class Reader(filesystem.FileSystemReader):
        def read_metadata(self, *args: Any, **options: Any) -> metadata.Metadata:
            return alone

    return Reader(folder)
