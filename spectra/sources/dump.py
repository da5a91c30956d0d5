"""Dumps of whole PEFT models, by zero_to_fp32.py or as an FSDP full state dict: the factors beside all weights.

An adapted weight lies in it as `<module>.base_layer.weight`. Where no base is given, it is the base. Where one is, the
two are compared before any number is given: training may have moved it, and the base given may be another model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePath

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Form
from spectra.deltas.recipe import Recipe
from spectra.deltas.recipes import FromTensors
from spectra.errors import SourceError
from spectra.files.choice import FULL_NAMES
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.models import tied
from spectra.models.pairing import unwrap
from spectra.naming import split_parts
from spectra.sources.ledger import Ledger

_MARK = ".base_layer.weight"
_NARROWER = ("bfloat16", "float16", "float32")
_BLOCK_ENTRIES = 2**22


@dataclass(frozen=True)
class OnSameBase(FromTensors):
    """An update whose file holds the weight that it was trained on, which must be the base's.

    Attributes:
        update: ΔW.
        held: the weight in the update's own file.
        base: W₀ as it lies in the base's file.
    """

    update: Recipe
    held: TensorRef
    base: TensorRef

    @property
    def factored(self) -> bool:
        """As ΔW."""
        return self.update.factored

    @property
    def reading_bytes(self) -> int:
        """Both weights as they are stored and blocks of them in float64, or what ΔW takes."""
        compared = self.held.nbytes + self.base.nbytes + 32 * min(self.held.numel, _BLOCK_ENTRIES)
        return max(compared, getattr(self.update, "reading_bytes", 0))

    def read(self, device: str = "cpu") -> Form:
        """Compare, then form ΔW.

        Raises:
            SourceError: the two weights differ by more than a cast to the type in which one was trained.
        """
        self._compare()
        return self.update.read(device)

    def _compare(self) -> None:
        if self.held.shape != self.base.shape:
            raise SourceError(f"{self.held.name} is {list(self.held.shape)}, the base weight {list(self.base.shape)}")
        held, base = self.held.read_real().reshape(-1), self.base.read_real().reshape(-1)
        squares, norms, casts = 0.0, 0.0, set(_NARROWER)
        for start in range(0, len(held), _BLOCK_ENTRIES):
            ours, theirs = (part[start : start + _BLOCK_ENTRIES].to(torch.float64) for part in (held, base))
            squares += float((ours - theirs).square().sum())
            norms += float(theirs.square().sum())
            casts = {name for name in casts if torch.equal(theirs.to(getattr(torch, name)).to(torch.float64), ours)}
        if squares != 0 and not casts:  # NaN is a difference, too
            share = (squares / norms) ** 0.5 if norms else float("inf")
            raise SourceError(
                f"{self.held.name} in {self.held.path} differs by {share:.2g} of its norm from {self.base.name} in "
                f"{self.base.path}: it was trained, too, or base= (--base) is another model; merge the adapter and "
                "compare the result, or leave the base out to have the adapter's part alone"
            )


def is_dump(folder: Folder) -> bool:
    """Whether a file holds adapted weights beside their factors; PEFT puts those of the vocabulary into any adapter."""
    marked = [name for name in folder.tensors if name.endswith(_MARK)]
    if any(not tied.is_vocabulary(_clean(name)) for name in marked):
        return True
    return bool(marked) and all(PurePath(folder.tensors[name].path).name.startswith(FULL_NAMES) for name in marked)


def inner_base(folder: Folder) -> Folder | None:
    """The adapted weights that a dump holds, under the model's names; None for what is no dump.

    A dump of a model with layers of Conv1D has no base inside without a config: which those are is not known.
    """
    conv1d = (folder.adapter_config or {}).get("fan_in_fan_out")
    if not is_dump(folder) or (conv1d and not folder.config):
        return None
    held = {_clean(name): ref for name, ref in folder.tensors.items() if name.endswith(_MARK)}
    return replace(folder, tensors=held, broken={}, adapter_config=None)


def compare_base_layers(ledger: Ledger) -> None:
    """Let every update whose weight the file holds, too, compare it with the base when it is read."""
    for name, held in ledger.tuned.tensors.items():
        if not name.endswith(_MARK) or name in ledger.named:
            continue
        clean = _clean(name)
        embedding = next((weight for weight, heads in ledger.tied.items() if clean in heads), clean)
        weight = ledger.base_names.get(embedding, embedding)
        places = [place for place, delta in enumerate(ledger.deltas) if split_parts(delta.name)[0] == weight]
        compared = [place for place in places if ledger.deltas[place].base]
        if ledger.base is None:
            ledger.skip(name, "the base weight that the file itself holds" if compared else "a copy of the base weight")
        elif compared:
            ledger.skip(name, "the base weight: compared with the base when ΔW is read")
            for place in compared:
                ledger.deltas[place] = _checked(ledger.deltas[place], held)
        elif places:
            ledger.skip(name, "the base weight: not compared, as the base's cannot be")


def _checked(delta: WeightDelta, held: TensorRef) -> WeightDelta:
    if delta.recipe is None or delta.base is None:
        return delta
    return replace(delta, recipe=OnSameBase(delta.recipe, held, delta.base.stored))


def _clean(name: str) -> str:
    return unwrap(name).removesuffix(_MARK) + ".weight"
