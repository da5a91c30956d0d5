"""Tensors that are in memory already, as a storage: what a notebook holds opens as what lies on a disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from spectra.errors import SourceError
from spectra.files.storage import Stamp

if TYPE_CHECKING:
    from torch import Tensor

CONTAINER = "memory"


@dataclass(frozen=True, eq=False)
class Memory:
    """Named tensors; they are not copied, so each knows the version that it had when it was listed.

    Attributes:
        tensors: name → tensor.
        versions: name → torch's count of the changes made in place.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    versions: Mapping[str, int] = field(repr=False)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Memory:
        """These tensors, as they are now."""
        return cls(tensors, {name: version(tensor) for name, tensor in tensors.items()})

    def get(self, name: str, where: str) -> Tensor:
        """A tensor as it was listed.

        Raises:
            SourceError: it was changed in place since.
        """
        tensor = self.tensors[name]
        if version(tensor) != self.versions[name]:
            raise SourceError(f"{name} of {where} was changed after it was opened; open it again")
        return tensor.detach()

    def address(self, name: str) -> int:
        """Where a tensor's entries begin."""
        return self.tensors[name].data_ptr()

    def names(self, folder: str) -> list[str]:
        """There are no folders."""
        return []

    def is_file(self, path: str) -> bool:
        """There are no files."""
        return False

    def is_folder(self, path: str) -> bool:
        """There are no folders."""
        return False

    def stamp(self, path: str) -> Stamp:
        """Always the same: a tensor's own version says whether it changed."""
        return (0, 0)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """There are no bytes."""
        return 0

    def leads_outside(self, path: str, folder: str) -> str | None:
        """There are no links."""
        return None

    def local_path(self, path: str) -> str | None:
        """Not on a disk."""
        return None

    def __reduce__(self) -> NoReturn:
        raise SourceError(
            "a model in memory does not travel to other processes: save it and open its folder, or leave the executor "
            "(--cluster) away"
        )


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version
