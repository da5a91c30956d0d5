"""The tensors of a file that `torch.save` wrote as a zip archive, listed without torch, and DTensors among them.

`torch.load` needs a DTensor's own classes, of the version that saved it, and gives a tensor that says it is the whole.
Here the archive's pickle is read as plain data: a plain tensor is a range of bytes of the file, and a DTensor the part
that its rank holds, with its place in the whole.

Reference: PyTorch's documentation of the serialised file format (Serialization semantics) and of
`torch.distributed.tensor`: DTensor, Placement, DeviceMesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spectra.errors import SourceError
from spectra.files.inert_pickle import Inert, named, sizes_of
from spectra.files.storage import Place
from spectra.files.tensors import TensorRef
from spectra.files.torch_zip import Archive, Lying


@dataclass(frozen=True)
class Placement:
    """How a tensor lies along one axis of the mesh of ranks: "Shard" along its axis `dim`, "Replicate", or another."""

    kind: str
    dim: int | None = None

    def __str__(self) -> str:
        return self.kind if self.dim is None else f"{self.kind}({self.dim})"


@dataclass(frozen=True)
class Part:
    """What one rank holds of a DTensor.

    Attributes:
        local: its own tensor.
        shape: the whole tensor's.
        placements: how the whole is placed, one entry per axis of the mesh.
        coordinate: this rank's place in the mesh.
    """

    local: TensorRef
    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    coordinate: tuple[int, ...]


@dataclass(frozen=True)
class Listing:
    """The tensors of one file.

    Attributes:
        plain: name → a tensor that the file holds as it is.
        parts: name → what the file holds of a DTensor.
        broken: name → why it cannot be read.
    """

    plain: dict[str, TensorRef] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def listed(file: Place) -> Listing:
    """The tensors of the state dict in a file; what is no tensor is left out.

    Raises:
        SourceError: the file is no such archive, is damaged, or holds no dict.
    """
    archive = Archive(file)
    content = archive.content()
    if not isinstance(content, Mapping):
        raise SourceError(f"{file} holds a {named(content) or type(content).__name__}, not a state dict of tensors")
    listing = Listing()
    for name, value in content.items():
        if isinstance(value, Inert):
            try:
                _enter(archive, listing, str(name), value)
            except SourceError as problem:
                listing.broken[str(name)] = str(problem)
    return listing


def _enter(archive: Archive, found: Listing, name: str, value: Inert) -> None:
    """Add a tensor, plain or distributed.

    Raises:
        SourceError: it is neither, or contradicts itself.
    """
    if named(value) == "_rebuild_parameter" and value.args and isinstance(value.args[0], Inert):
        return _enter(archive, found, name, value.args[0])
    if named(value) == "_rebuild_tensor_v2":
        found.plain[name] = _ref(archive.lying(name, value))
        return None
    made = value.args[1] if named(value) == "_rebuild_from_type_v2" and len(value.args) > 3 else value
    if named(made) != "DTensor":
        raise SourceError(f"{name} in {archive.file} is a {named(made)}, which is not read; save plain tensors")
    state = Inert()
    state.state = value.args[3]
    local, spec = state.get("_local_tensor"), state.get("_spec")
    if not isinstance(local, Inert) or named(local) != "_rebuild_tensor_v2" or not isinstance(spec, Inert):
        raise SourceError(f"{name} in {archive.file} is a DTensor without its local tensor; save it again")
    found.parts[name] = _part(archive, name, _ref(archive.lying(name, local)), spec)
    return None


def _part(archive: Archive, name: str, local: TensorRef, spec: Inert) -> Part:
    mesh, meta, given = (spec.get(key) for key in ("mesh", "tensor_meta", "placements"))
    coordinate = sizes_of(mesh.get("_coordinate_on_dim")) if isinstance(mesh, Inert) else None
    shape = sizes_of(meta.args[0]) if isinstance(meta, Inert) and meta.args else None
    placements = tuple(map(_placement, given)) if isinstance(given, tuple | list) else ()
    if shape is None or coordinate is None or not placements or len(placements) != len(coordinate):
        raise SourceError(f"{name} in {archive.file} is a DTensor that does not say which part of the whole it is")
    return Part(local, shape, placements, coordinate)


def _ref(tensor: Lying) -> TensorRef:
    place, shape = tensor.file, tensor.stored
    return TensorRef(
        place.path, tensor.name, tensor.dtype, shape, "archive", tensor.stamp, place.storage, tensor.offset, shape
    )


def _placement(value: Any) -> Placement:
    if not isinstance(value, Inert):
        return Placement("unknown")
    dim = value.get("dim") if value.get("dim") is not None else next(iter(value.args), None)
    return Placement(named(value), dim if type(dim) is int else None)
