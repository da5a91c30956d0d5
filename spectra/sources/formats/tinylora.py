"""TinyLoRA: between frozen factors of W₀, a mixture of random matrices with few trained weights (PEFT 0.21)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spectra.deltas.forms import LowRank
from spectra.deltas.source import Source
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import (
    Slots,
    add_modules,
    add_rest,
    config_of,
    count,
    modules_of,
    real,
    refuse_options,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

KIND = "tinylora"
_NAMES = ("tinylora_A", "tinylora_B", "tinylora_P")
_SLOTS = slot_pattern("|".join(_NAMES))
_VECTOR = re.compile(r"(?:^|\.)tinylora_v\.(\d+)$")
_SAME = 0.02  # how far a saved random matrix may be from the drawn one, in standard deviations: bfloat16's rounding


@dataclass(frozen=True)
class Groups:
    """The trained vectors, and which of them a module uses: those of neighbours in the model's order of modules.

    The file does not hold that order. It holds each module's random matrices, which were drawn from
    the seed plus its place in the order: drawing them again tells the place.

    Attributes:
        vectors: v, one for each group, in order.
        modules: how many modules there are.
        seed: of the first module's matrices.
    """

    vectors: tuple[TensorRef, ...]
    modules: int
    seed: int

    def vector_for(self, projections: Tensor, name: str) -> TensorRef:
        """The vector of the module that has these random matrices.

        Raises:
            SourceError: no place in the order, or more than one, gives these matrices.
        """
        import torch

        if len(self.vectors) == 1:
            return self.vectors[0]
        deviation = projections.shape[1] ** -0.5
        places = []
        for place in range(self.modules):
            generator = torch.Generator().manual_seed(self.seed + place)
            drawn = torch.normal(0.0, deviation, tuple(projections.shape), generator=generator)
            if float((drawn.to(projections) - projections).abs().max()) < _SAME * deviation * 4:
                places.append(place)
        if len(places) != 1:
            raise SourceError(
                f"{name}: its random matrices are not those that torch draws from projection_seed here, so which of "
                f"the {len(self.vectors)} trained vectors belongs to it is not known"
            )
        size = max(1, self.modules // len(self.vectors))
        return self.vectors[min(places[0] // size, len(self.vectors) - 1)]


@dataclass(frozen=True)
class Mixture:
    """ΔW = B (Σᵢ vᵢ Pᵢ) A, B and A from the largest singular triplets of W₀ and saved with the adapter.

    Attributes:
        left: B (out, r).
        right: A (r, in).
        projections: P (u, r, r).
        groups: where v (u,) is found.
    """

    left: TensorRef
    right: TensorRef
    projections: TensorRef
    groups: Groups

    @property
    def factored(self) -> bool:
        """True."""
        return True

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The factors, the random matrices and all vectors."""
        return (self.left, self.right, self.projections, *self.groups.vectors)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.left.shape[0], self.right.shape[1])

    @property
    def rank(self) -> int:
        """r."""
        return min(self.right.shape[0], *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """The mixture in the left factor."""
        import torch

        projections = self.projections.read_float64()
        vector = self.groups.vector_for(projections, self.projections.name).read_float64(device)
        middle = torch.einsum("i,ijk->jk", vector, projections.to(device))
        return LowRank(self.left.read_float64(device) @ middle, self.right.read_float64(device))


def open_tinylora(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the factors of every module and the shared vectors.

    Raises:
        SourceError: the config is missing, or the vectors are not those that it counts.
    """
    ledger = Ledger(tuned, base)
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "TinyLoRA")
    modules, rest = modules_of(ledger, _SLOTS)
    number = len({name for name in (*tuned.tensors, *tuned.broken) if ".tinylora_A" in name})
    vectors = {int(found[1]): name for name in rest if (found := _VECTOR.search(name))}
    groups = _groups(config, tuned, vectors, number)
    add_modules(ledger, modules, partial(_mixture, config, groups, str(tuned.path)), split=split)
    add_rest(ledger, [name for name in rest if name not in vectors.values()], split=split)
    return ledger.source(KIND)


def _groups(config: Mapping[str, Any], tuned: Folder, vectors: Mapping[int, str], modules: int) -> Groups:
    tying, seed = real(config, "weight_tying", tuned.path), config.get("projection_seed")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**62:
        raise SourceError(f"{tuned.path}: projection_seed = {seed!r} is no seed; mend adapter_config.json")
    wanted = max(1, round(modules * (1.0 - tying))) if 0 <= tying <= 1 else 0
    shape = (count(config, "u", tuned.path),)
    refs = [tuned.tensors[vectors[index]] for index in sorted(vectors)]
    if sorted(vectors) != list(range(wanted)) or any(ref.shape != shape or not ref.is_float for ref in refs):
        raise SourceError(
            f"{tuned.path}: weight_tying = {tying:g} and u = {shape[0]} make {wanted} vectors of {shape[0]} for "
            f"{modules} modules, the file holds {[list(ref.shape) for ref in refs]}; mend adapter_config.json"
        )
    return Groups(tuple(refs), modules, seed)


def _mixture(config: Mapping[str, Any], groups: Groups, where: str, module: str, slots: Slots) -> Mixture | str:
    """The factors of one module, or why there are none."""
    if "tinylora_P" not in slots and config.get("save_projection") is False:
        return f"the random matrices of {module} were not saved (save_projection is false), and its seed is not known"
    why = unusable(slots, _NAMES)
    if why:
        return why
    right, left, projections = (slots[name] for name in _NAMES)
    if len(right.shape) != 2 or len(left.shape) != 2:
        return f"tinylora_A {list(right.shape)} and tinylora_B {list(left.shape)} of {module} are no matrices"
    r = min(count(config, "r", where), left.shape[0], right.shape[1])
    wanted = (groups.vectors[0].shape[0], r, r)
    if right.shape[0] != r or left.shape[1] != r or projections.shape != wanted:
        shapes = f"{list(left.shape)}, {list(right.shape)} and {list(projections.shape)}"
        return f"the config says r = {r} for {module}, the factors and random matrices in {where} are {shapes}"
    return Mixture(left, right, projections, groups)
