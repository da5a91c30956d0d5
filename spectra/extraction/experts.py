"""Experts as PEFT adapts them: one stacked parameter of a module, one pair of factors for all of its experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spectra import naming
from spectra.deltas.delta import WeightDelta
from spectra.extraction.weights import Place, Rows
from spectra.files.tensors import TensorRef
from spectra.models import experts, renames
from spectra.models.architectures import model_type, repeated
from spectra.models.pairing import unwrap

_KEY = re.compile(r"(?P<owner>.*experts)\.(?P<index>\d+)\.(?P<part>gate|up|gate_up|down)_proj\.weight")
# Of the architectures that keep an expert as (in, out), the ones whose module tells PEFT so.
_TELL_PEFT = ("gpt_oss",)


@dataclass(frozen=True)
class ExpertMatrix:
    """What a matrix is in its stack.

    Attributes:
        owner: the module that holds the stack, in memory.
        parameter: the stack's name in the module.
        index: which expert.
        half: "gate" or "up" for half of the rows, or "".
    """

    owner: str
    parameter: str
    index: int
    half: str = ""

    @property
    def stack(self) -> str:
        """The stack's name in memory."""
        return f"{self.owner}.{self.parameter}"


def expert_of(config: Mapping[str, Any], delta: WeightDelta) -> ExpertMatrix | None:
    """Which expert's matrix an update is of; None for any other weight.

    Architectures whose stacks are not in the table keep a module per expert, which is a weight like any other.
    """
    name, parts = naming.split_parts(delta.name)
    name = renames.current(config, unwrap(name))
    if model_type(config, name) not in experts.STACKS:
        return None
    key = experts.single(config, name)
    if key is None and delta.base is not None and parts:
        own = "".join(f"[{part}]" for part in parts)
        members = experts.unstacked(config, name, delta.base.stored, split=len(parts) > 1)
        key = next((member.key for member in members if member.part == own), None)
    match = _KEY.fullmatch(key or "")
    if not match:
        return None
    half = match["part"] if match["part"] in ("gate", "up") else ""
    return ExpertMatrix(match["owner"], "gate_up_proj" if half else f"{match['part']}_proj", int(match["index"]), half)


def place_of(config: Mapping[str, Any], matrix: ExpertMatrix, shape: tuple[int, ...]) -> tuple[tuple[int, int], Place]:
    """The shape of the expert's whole matrix, and where in it a matrix of this shape lies."""
    if not matrix.half:
        return (shape[0], shape[1]), None
    rows = 2 * shape[0]
    interleaved = experts.STACKS[model_type(config, matrix.stack)].interleaved
    cuts = repeated(rows, shape[0] if interleaved else 1, {"gate": 1, "up": 1})
    return (rows, shape[1]), Rows.of(rows, cuts[matrix.half])


def is_crossed(config: Mapping[str, Any], stack: str) -> bool:
    """Whether PEFT takes the inputs of these experts for their outputs: they are (in, out), and do not say so."""
    kind = model_type(config, stack)
    return experts.STACKS[kind].transposed and kind not in _TELL_PEFT


def counts(config: Mapping[str, Any], stored: Mapping[str, TensorRef]) -> dict[str, int]:
    """How many experts each stack of a base has: stack → number."""
    counted: dict[str, int] = {}
    for stored_name, ref in stored.items():
        name = renames.current(config, unwrap(stored_name))
        key = experts.single(config, name)
        last = _KEY.fullmatch(key or "")
        if last:
            stack = experts.stack_of(key or "") or ""
            counted[stack] = max(counted.get(stack, 0), int(last["index"]) + 1)
        elif experts.is_stacked(config, name) and len(ref.shape) == 3:
            first = next(iter(experts.unstacked(config, name, ref, split=False)), None)
            counted[experts.stack_of(first.key if first else "") or name] = ref.shape[0]
    return counted
