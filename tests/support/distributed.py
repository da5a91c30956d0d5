"""Files that several ranks of a training would save, made in one process by torch's own classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

Tensors = dict[str, torch.Tensor]


@contextmanager
def rank_of(rank: int, mesh_shape: Sequence[int]) -> Iterator[DeviceMesh]:
    """The mesh as one rank sees it; nothing is sent between ranks."""
    world = torch.Size(mesh_shape).numel()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        names = ("fsdp",) if len(mesh_shape) == 1 else ("ddp", "fsdp")
        yield init_device_mesh("cpu", tuple(mesh_shape), mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def part(tensor: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """This rank's part of a tensor as a DTensor, cut as torch.chunk cuts it."""
    local = tensor
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            pieces = local.chunk(mesh.size(axis), placement.dim)
            place = mesh.get_coordinate()[axis]
            empty = pieces[0].narrow(placement.dim, 0, 0)
            local = pieces[place] if place < len(pieces) else empty
    return DTensor.from_local(
        local.clone().contiguous(), mesh, list(placements), run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def write_ranks(
    folder: Path, tensors: Tensors, mesh_shape: Sequence[int], place: Callable[[str], Sequence[Placement]]
) -> Path:
    """verl's `model_world_size_W_rank_R.pt` of every rank."""
    folder.mkdir(parents=True, exist_ok=True)
    world = torch.Size(mesh_shape).numel()
    for rank in range(world):
        with rank_of(rank, mesh_shape) as mesh:
            held = {name: part(tensor, mesh, place(name)) for name, tensor in tensors.items()}
            torch.save(held, folder / f"model_world_size_{world}_rank_{rank}.pt")
    return folder
