"""A model's stored tensors as matrices under names that two versions of the model share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models import architectures, experts, renames
from spectra.models.pairing import unwrapped
from spectra.spectrum import Status

_BIAS = re.compile(r"(?:^|[._])bias$")
_CONVOLUTION = re.compile(r"conv[^.]*(?:\.[^.]+)?\.weight$")
_POSITIONS = re.compile(r"(?:^|\.)(?:pos_embed|pos_embedding|position_embeddings?|positional_embedding)$")
_WEIGHT_NORM = re.compile(r"\.(?:weight_[gv]|parametrizations\.weight\.original[01])$")
_COMPLEX = ("C64", "C128", "complex64", "complex128", "complex32")
_BUFFERS = ("I64", "BOOL")


@dataclass(frozen=True)
class Weight:
    """One tensor of one side, or one expert of it.

    Attributes:
        name: what its own file calls it, with `[part]` for a part of a stack.
        ref: the matrix in Linear orientation, or the vector; None if it gives no numbers.
        why: why it gives none.
        status: the status that goes with `why`.
        skip: why it is not a matrix to analyse, "" if it is one.
        same_as: the name of the tensor that it shares its storage with.
        stored: the tensor as it lies in the file, of which `ref` is a view.
    """

    name: str
    ref: TensorRef | None
    why: str = ""
    status: Status = "unreadable"
    skip: str = ""
    same_as: str = ""
    stored: TensorRef | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or () where the file does not say."""
        return self.ref.shape if self.ref else ()


def weights_of(folder: Folder, other: Folder, *, split_experts: bool) -> dict[str, Weight]:
    """Shared name → weight, for every tensor of the folder; the other's config stands in for a missing one.

    Raises:
        SourceError: two tensors are the same weight in two layouts.
    """
    weights: dict[str, Weight] = {}
    same = folder.same
    copies = {name: folder.tensors[first] for name, first in same.items()}
    named = {**copies, **folder.tensors, **dict.fromkeys(folder.unusable)}
    bare = unwrapped(named)
    rules: dict[int, renames.Compiled] = {}  # of each config, by its identity
    for name, ref in named.items():
        config = folder.config_of(name) or other.config_of(name)
        if id(config) not in rules:
            rules[id(config)] = renames.rules_of(config)
        renamed = renames.renamed(rules[id(config)], bare[name])
        for key, weight in _of_tensor(folder, config, name, renamed, ref, split_experts, same.get(name, "")):
            if key in weights:
                raise SourceError(
                    f"{folder.path} holds {weights[key].name} and {weight.name}, which are one weight in two layouts; "
                    "save it in one of them"
                )
            weights[key] = weight
    return weights


def stacks_experts(folder: Folder, other: Folder) -> bool:
    """Whether any tensor of the folder is a stack of experts."""
    bare = unwrapped(folder.tensors)
    return any(
        experts.is_stacked(folder.config_of(name) or other.config_of(name), short) for name, short in bare.items()
    )


def _of_tensor(
    folder: Folder,
    config: Mapping[str, Any],
    name: str,
    key: str,
    ref: TensorRef | None,
    split_experts: bool,
    same_as: str,
) -> Iterator[tuple[str, Weight]]:
    if ref is None:
        status: Status = "unreadable" if name in folder.broken else "unsupported"
        yield experts.single(config, key) or key, Weight(name, None, folder.unusable[name], status)
        return
    stacked = list(experts.unstacked(config, key, ref, split=split_experts)) if ref.is_float else []
    for expert in stacked:
        yield expert.key, Weight(name + expert.part, expert.ref, stored=ref)
    if not stacked:
        key = experts.single(config, key) or key
        yield key, _weight(config, name, ref, same_as)


def _weight(config: Mapping[str, Any], name: str, ref: TensorRef, same_as: str) -> Weight:
    skip = _not_a_matrix(name, ref)
    if skip:
        return Weight(name, ref, skip=skip, same_as=same_as)
    why = _unknown(name, ref)
    if why:
        return Weight(name, None, why, "unsupported", same_as=same_as)
    matrix = as_matrix(architectures.oriented(config, name, _positions(name, ref)))
    return Weight(name, matrix, same_as=same_as, stored=ref)


def _not_a_matrix(name: str, ref: TensorRef) -> str:
    if len(ref.shape) < 2 or (len(ref.shape) > 2 and sum(size > 1 for size in ref.shape) < 2 and ref.numel):
        return "a vector, not a matrix"
    if _BIAS.search(name):
        return "biases, not a matrix"
    if not ref.numel:
        return "empty"
    return f"a buffer of {ref.dtype}, not weights" if ref.dtype in _BUFFERS else ""


def _unknown(name: str, ref: TensorRef) -> str:
    """Why a tensor of numbers cannot be read as a matrix, "" if it can."""
    if ref.dtype in _COMPLEX:
        return f"stored as {ref.dtype} in {ref.path}: complex numbers, of which no real ΔW is known"
    if not ref.is_float:
        return f"stored as {ref.dtype} in {ref.path}: quantised weights are not decoded"
    if _WEIGHT_NORM.search(name) and len(ref.shape) > 1:
        return "one factor of a weight normalisation: remove it from the model before saving"
    axes = len(ref.shape)
    known = axes == 2 or (axes == 3 and _CONVOLUTION.search(name)) or (axes > 3 and name.endswith(".weight"))
    if known or _is_position_table(name, ref):
        return ""
    return f"{list(ref.shape)} has {axes} axes, and what they mean is not known for this architecture"


def _is_position_table(name: str, ref: TensorRef) -> bool:
    return len(ref.shape) == 3 and ref.shape[0] == 1 and _POSITIONS.search(name) is not None


def _positions(name: str, ref: TensorRef) -> TensorRef:
    return ref.item(0) if _is_position_table(name, ref) else ref


def as_matrix(ref: TensorRef) -> TensorRef:
    """A convolution (out, in, k, …) as (out, in·k·…)."""
    return ref if len(ref.shape) <= 2 else ref.reshape(ref.shape[0], math.prod(ref.shape[1:]))
