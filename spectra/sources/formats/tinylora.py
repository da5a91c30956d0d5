"""TinyLoRA: between frozen factors of W₀, a mixture of random matrices with few trained weights (PEFT 0.21)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import LowRank
from spectra.deltas.recipes import FromTensors
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules, slot_pattern
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = ("tinylora_A", "tinylora_B", "tinylora_P")
_SLOTS = slot_pattern("|".join(_NAMES))
_VECTOR = re.compile(r"(?:^|\.)tinylora_v\.(\d+)$")
_SAME = 0.02  # how far a saved random matrix may be from the drawn one, in standard deviations: bfloat16's rounding


@dataclass(frozen=True)
class Groups(FromTensors):
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
class Mixture(FromTensors):
    """ΔW = B (Σᵢ vᵢ Pᵢ) A, B and A from the largest singular triplets of W₀ and saved with the adapter.

    Attributes:
        left: B (out, r).
        right: A (r, in).
        projections: P (u, r, r).
        groups: where v (u,) is found.
    """

    factored = True
    left: TensorRef
    right: TensorRef
    projections: TensorRef
    groups: Groups

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.left.shape[0], self.right.shape[1])

    @property
    def rank(self) -> int:
        """At most r."""
        return min(self.right.shape[0], *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """The mixture in the left factor."""
        projections = self.projections.read_float64()
        vector = self.groups.vector_for(projections, self.projections.name).read_float64(device)
        middle = torch.einsum("i,ijk->jk", vector, projections.to(device))
        return LowRank(self.left.read_float64(device) @ middle, self.right.read_float64(device))


def read(ledger: Ledger) -> None:
    """Enter the factors of every module with the shared vectors.

    Raises:
        SourceError: the vectors are not those that the config counts.
    """
    groups = _groups(ledger)
    ledger.use(groups.vectors)

    def build(module: str, slots: Slots) -> Mixture:
        if "tinylora_P" not in slots and ledger.config.get("save_projection") is False:
            raise Refusal(
                f"the random matrices of {module} were not saved (save_projection is false), and its seed is not known"
            )
        right, left, projections = slots.real(*_NAMES)
        if len(right.shape) != 2 or len(left.shape) != 2:
            shapes = f"tinylora_A {list(right.shape)} and tinylora_B {list(left.shape)}"
            raise Refusal(f"{shapes} of {module} are no matrices")
        r = min(ledger.config.count("r"), left.shape[0], right.shape[1])
        wanted = (groups.vectors[0].shape[0], r, r)
        if right.shape[0] != r or left.shape[1] != r or projections.shape != wanted:
            shapes = f"{list(left.shape)}, {list(right.shape)} and {list(projections.shape)}"
            raise Refusal(
                f"the config says r = {r} for {module}, the factors and random matrices in {ledger.where} are {shapes}"
            )
        return Mixture(left, right, projections, groups)

    add_modules(ledger, ledger.modules(_SLOTS), build)


def _groups(ledger: Ledger) -> Groups:
    """The trained vectors, as many as the config makes for the modules of the file."""
    config, tuned = ledger.config, ledger.tuned
    modules = len([name for name in (*tuned.tensors, *tuned.broken) if ".tinylora_A" in name])
    vectors = {int(match[1]): name for name in tuned.tensors if (match := _VECTOR.search(name))}
    tying, seed = config.real("weight_tying"), config.get("projection_seed")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**62:
        raise SourceError(f"{ledger.where}: projection_seed = {seed!r} is no seed; mend adapter_config.json")
    wanted = max(1, round(modules * (1.0 - tying))) if 0 <= tying <= 1 else 0
    shape = (config.count("u"),)
    refs = [tuned.tensors[vectors[index]] for index in sorted(vectors)]
    if sorted(vectors) != list(range(wanted)) or any(ref.shape != shape or not ref.is_float for ref in refs):
        raise SourceError(
            f"{ledger.where}: weight_tying = {tying:g} and u = {shape[0]} make {wanted} vectors of {shape[0]} for "
            f"{modules} modules, the file holds {[list(ref.shape) for ref in refs]}; mend adapter_config.json"
        )
    return Groups(tuple(refs), modules, seed)
