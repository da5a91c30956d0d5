"""What a LoRA leaves behind: vectors, biases, whatever was not paired; and which modules can be kept whole instead."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from spectra.deltas.source import Source
from spectra.errors import SourceError
from spectra.extraction.gather import CHECKPOINT
from spectra.extraction.modules import Architecture
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models.matrices import Weight, weights_of
from spectra.models.pairing import align
from spectra.sources.targets import saved_name


@dataclass(frozen=True)
class LeftOut:
    """What of one source no LoRA holds.

    Attributes:
        reasons: name → why, of what is lost.
        kept: module in memory → its tensors by their names in it, for modules that could be kept whole.
        names: module in memory → the names among `reasons` that keeping it would save.
        biases: module in memory → its bias, and before it the name of that among `reasons`; of modules that lose
            nothing else.
    """

    reasons: Mapping[str, str]
    kept: Mapping[str, Mapping[str, TensorRef]] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, TensorRef]] = field(default_factory=dict)


def left_out(source: Source, tuned: Folder, base: Folder | None, architecture: Architecture) -> LeftOut:
    """Look at everything that the source lists as not used.

    Of full weights, vectors are compared with the base's: what tuning did not change is not lost, and is not listed.

    Args:
        source: the updates.
        tuned: what they were read from.
        base: the base, or None.
        architecture: what names mean.
    """
    coverage = source.coverage
    lost = {**coverage.base_only, **coverage.tuned_only, **coverage.shape_mismatch, **coverage.unsupported}
    if source.kind == CHECKPOINT and base is not None:
        pairs = _pairs(tuned, base)
        for name, why in coverage.skipped.items():
            moved = _moved(*pairs[name]) if name in pairs else math.inf
            if moved and name not in base.same:
                lost[name] = f"{why}, which tuning changed" if math.isfinite(moved) else why
        refs = {name: tuned.tensors[after.name] for name, (after, _) in pairs.items() if after.name in tuned.tensors}
        paired = {after.name for after, _ in pairs.values()}
        refs |= {name: ref for name, ref in tuned.tensors.items() if name not in paired}
        inside = {architecture.in_memory(name): ref for name, ref in refs.items()}
        return _with_modules(lost, {architecture.in_memory(name): name for name in lost}, inside)
    # PEFT saves the base's weight beside an embedding's factors: a copy, which the source has compared.
    lost |= {name: why for name, why in coverage.skipped.items() if not name.endswith(".base_layer.weight")}
    return _with_modules(
        lost, {saved_name(name): name for name in lost}, {saved_name(n): ref for n, ref in tuned.tensors.items()}
    )


def _pairs(tuned: Folder, base: Folder) -> dict[str, tuple[Weight, Weight]]:
    """The base's name → the two weights of that name."""
    after, before = weights_of(tuned, base, split_experts=True), weights_of(base, tuned, split_experts=True)
    shapes = [{key: weight.shape for key, weight in side.items()} for side in (after, before)]
    names, _ = align(*shapes)
    return {before[new].name: (after[key], before[new]) for key, new in names.items() if new in before}


def _moved(after: Weight, before: Weight) -> float:
    """‖tuned − base‖_F of two tensors; infinite where they cannot be subtracted."""
    if after.ref is None or before.ref is None or after.ref.shape != before.ref.shape:
        return math.inf
    try:
        return float((after.ref.read().double() - before.ref.read().double()).norm())
    except SourceError:
        return math.inf


def _with_modules(lost: Mapping[str, str], in_memory: Mapping[str, str], tensors: Mapping[str, TensorRef]) -> LeftOut:
    """Group what is lost by modules whose weight is there, so that all of the module can be kept.

    Where the bias alone is lost, the weight is none to keep: it has a LoRA, or none was asked for.
    """
    kept: dict[str, dict[str, TensorRef]] = {}
    names: dict[str, tuple[str, ...]] = {}
    biases: dict[str, tuple[str, TensorRef]] = {}
    for name, own in in_memory.items():
        module, _, last = name.rpartition(".")
        if name in tensors and last == "bias" and f"{module}.weight" not in in_memory:
            biases[module] = own, tensors[name]
        elif name in tensors and f"{module}.weight" in tensors:
            inside = {key.rpartition(".")[2]: ref for key, ref in tensors.items() if key.rpartition(".")[0] == module}
            kept[module] = inside
            names[module] = (*names.get(module, ()), own)
    return LeftOut(lost, kept, names, biases)


def why_not_whole(module: str, adapted: Collection[str], all_modules: Collection[str]) -> str:
    """Why PEFT cannot keep a module whole; "" if it can.

    It takes every module whose path ends with the text, and none that has a LoRA.

    Example:
        >>> why_not_whole("norm", [], ["norm", "layers.0.input_layernorm"])
        'PEFT would take layers.0.input_layernorm for it, too'
    """
    if module in adapted:
        return "its module has a LoRA, and PEFT keeps no module both ways"
    other = next((path for path in all_modules if path != module and path.endswith(module)), "")
    return f"PEFT would take {other} for it, too" if other else ""
