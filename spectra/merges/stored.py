"""Tensors as they lie in the files, for what is not a pair of matrices: compared bit for bit or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from spectra import naming
from spectra.deltas.recipes import Difference
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.models.matrices import weights_of
from spectra.models.pairing import unwrapped
from spectra.sources.targets import saved_name


@dataclass(frozen=True)
class AsStored:
    """The tensors of an adapter, a merged model and the base by the names that the three share."""

    adapter: Folder
    merged: Folder
    base: Folder

    @cached_property
    def _merged(self) -> dict[str, TensorRef]:
        names = unwrapped(self.merged.tensors)
        return {bare: self.merged.tensors[name] for name, bare in names.items()}

    @cached_property
    def _base(self) -> dict[str, TensorRef]:
        names = unwrapped(self.base.tensors)
        return {**self.base.tensors, **{bare: self.base.tensors[name] for name, bare in names.items()}}

    @cached_property
    def _saved(self) -> dict[str, TensorRef]:
        return {saved_name(name): ref for name, ref in self.adapter.tensors.items()}

    def pair(self, name: str) -> Difference | None:
        """M's tensor and the base's of one name and shape; a part of a stack stands for the whole."""
        return _pair(self._merged, self._base, naming.split_parts(name)[0])

    def is_matrix(self, name: str) -> bool:
        """Whether the base's weight of a name is one: no vector, and no buffer that newer versions do not save."""
        return name not in self._skipped

    @cached_property
    def _skipped(self) -> set[str]:
        weights = weights_of(self.base, self.merged, split_experts=False).values()
        return {weight.name for weight in weights if weight.skip}

    def saved(self, name: str) -> Difference | None:
        """M's tensor and the one that the adapter saved whole."""
        return _pair(self._merged, self._saved, name)

    def changed_vectors(self, names: Iterable[str]) -> list[str]:
        """Which of the names are those of vectors that M has with other numbers than the base."""
        pairs = {name: self.pair(name) for name in names}
        return [name for name, pair in pairs.items() if pair is not None and _differ(pair)]


def _pair(merged: dict[str, TensorRef], other: dict[str, TensorRef], name: str) -> Difference | None:
    if name not in merged or name not in other or merged[name].shape != other[name].shape:
        return None
    return Difference(merged[name], other[name])


def _differ(pair: Difference) -> bool:
    try:
        base, merged = pair.base.read(), pair.tuned.read()
    except SourceError:
        return False  # the matrices of a broken file have rows that say so
    return not torch.equal(base.to(merged.dtype), merged)
