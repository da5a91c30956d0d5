"""Experts of mixtures: one matrix per expert, whether the file keeps them apart or stacked.

transformers 5 keeps `experts.gate_up_proj` (experts, 2·ffn, hidden) in memory and writes one tensor
per expert to disk; older and other models stack them transposed or interleaved. Which it is comes
from the table by `model_type`, never from the shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spectra.files.tensors import TensorRef
from spectra.models.architectures import model_type, repeated

# w1, w2 and w3 of one expert, in LLaMA's words.
_NUMBERED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_NUMBERED_TYPES = frozenset({"mixtral", "minimax", "minimax_m2", "phimoe", "lfm2_moe"})
_PER_EXPERT = re.compile(r"(?P<before>.*experts\.)(?P<index>\d+)\.(?P<part>w[123]|gate_proj|up_proj|down_proj)\.weight")
_STACKED = re.compile(
    r"(?P<before>.*experts\.)(?P<part>gate_up_proj|down_proj)"
    r"|(?P<moe>.*block_sparse_moe\.)(?P<linear>input_linear|output_linear)\.weight"
    r"|(?P<dbrx>.*experts\.)mlp\.(?P<glu>w1|v1|w2)"
)
_STACKED_ENDS = ("gate_up_proj", "down_proj", "put_linear.weight", "mlp.w1", "mlp.v1", "mlp.w2")
# MLX's own: one stack per projection, (experts, out, in) for every architecture.
_MLX_STACKED = re.compile(r"(?P<before>.*\.)switch_mlp\.(?P<part>gate_proj|up_proj|down_proj)\.weight")
_UNIT = re.compile(r"(?P<before>.*experts\.)\d+\.(?P<part>gate|up|gate_up|down)_proj\.weight")
_MAX_EXPERTS = 2**16


@dataclass(frozen=True)
class Stack:
    """How an architecture stacks its experts.

    Attributes:
        transposed: each expert is (in, out).
        interleaved: gate and up rows alternate, instead of all gate rows first.
    """

    transposed: bool = False
    interleaved: bool = False


_LINEAR = (
    "mixtral", "minimax", "minimax_m2", "phimoe", "lfm2_moe", "jamba", "qwen2_moe", "qwen3_moe", "qwen3_next",
    "deepseek_v2", "deepseek_v3", "olmoe", "flex_olmo", "glm4_moe", "dots1", "ernie4_5_moe", "hunyuan_v1_moe",
    "granitemoe", "granitemoeshared", "granitemoehybrid", "afmoe", "exaone_moe",
)  # fmt: skip
STACKS: dict[str, Stack] = {
    **dict.fromkeys(_LINEAR, Stack()),
    "llama4_text": Stack(transposed=True),
    "llama4": Stack(transposed=True),
    "aria_text": Stack(transposed=True),
    "gpt_oss": Stack(transposed=True, interleaved=True),
}


@dataclass(frozen=True)
class Expert:
    """One matrix of one expert.

    Attributes:
        key: what both layouts call it: `….experts.3.gate_proj.weight`, or `….experts.3.gate_up_proj.weight`.
        part: what its name adds to that of the stack: `[3]` or `[3][gate]`.
        ref: the matrix, in Linear orientation.
    """

    key: str
    part: str
    ref: TensorRef


def is_stacked(config: Mapping[str, Any], name: str) -> bool:
    """Whether the name is that of a stack of experts whose layout is known."""
    match = _stacked(name)
    if match is None:
        return False
    kind = model_type(config, name)
    return bool(kind == "dbrx" if match["dbrx"] else kind in STACKS)


def _stacked(name: str) -> re.Match[str] | None:
    """The parts of a stack's name; nearly every name is told from one by its end."""
    return _STACKED.fullmatch(name) if name.endswith(_STACKED_ENDS) else None


def holds_gate_and_up(name: str) -> bool:
    """Whether the name is that of a stack whose experts hold gate and up in one matrix.

    >>> holds_gate_and_up("model.layers.0.block_sparse_moe.input_linear.weight")
    True
    """
    match = _stacked(name)
    return match is not None and (match["part"] == "gate_up_proj" or match["linear"] == "input_linear")


def single(config: Mapping[str, Any], name: str) -> str | None:
    """What both layouts call the tensor of one expert; None if it is not one, or not known to be."""
    match = _PER_EXPERT.fullmatch(name)
    if not match:
        return None
    part = match["part"]
    if part in _NUMBERED:
        if model_type(config, name) not in _NUMBERED_TYPES:
            return None
        part = _NUMBERED[part]
    return f"{match['before']}{match['index']}.{part}.weight"


def stack_of(key: str) -> str | None:
    """The stack that an expert's matrix is part of where experts are stacked, both under the shared names.

    >>> stack_of("model.layers.0.mlp.experts.3.up_proj.weight")
    'model.layers.0.mlp.experts.gate_up_proj'
    """
    match = _UNIT.fullmatch(key)
    if not match:
        return None
    return match["before"] + ("down_proj" if match["part"] == "down" else "gate_up_proj")


def unstacked(config: Mapping[str, Any], name: str, ref: TensorRef, *, split: bool) -> Iterator[Expert]:
    """The experts of one stacked tensor, gate and up apart if `split`; nothing if the layout is not known."""
    if "switch_mlp" in name and (mlx := _MLX_STACKED.fullmatch(name)):
        yield from _mlx(mlx["before"], mlx["part"], ref)
    match = _stacked(name)
    if not match or not ref.numel:
        return
    kind = model_type(config, name)
    if match["dbrx"]:
        if kind == "dbrx":
            yield from _dbrx(config, name, match["dbrx"], match["glu"], ref)
        return
    stack = STACKS.get(kind)
    if stack is None or len(ref.shape) != 3 or ref.shape[0] > _MAX_EXPERTS:
        return
    before = match["before"] or f"{match['moe']}experts."
    part = "gate_up_proj" if holds_gate_and_up(name) else "down_proj"
    for index in range(ref.shape[0]):
        matrix = ref.item(index)
        matrix = matrix.T if stack.transposed else matrix
        key, own = f"{before}{index}.", f"[{index}]"
        halves = _halves(stack, matrix) if holds_gate_and_up(name) and split else {}
        for half, cut in halves.items():
            yield Expert(f"{key}{half}_proj.weight", f"{own}[{half}]", cut)
        if not halves:
            yield Expert(f"{key}{part}.weight", own, matrix)


def _mlx(before: str, part: str, ref: TensorRef) -> Iterator[Expert]:
    if len(ref.shape) == 3 and 0 < ref.shape[0] <= _MAX_EXPERTS and ref.numel:
        for index in range(ref.shape[0]):
            yield Expert(f"{before}experts.{index}.{part}.weight", f"[{index}]", ref.item(index))


def _halves(stack: Stack, matrix: TensorRef) -> dict[str, TensorRef]:
    rows = matrix.shape[0]
    cuts = repeated(rows, rows // 2 if stack.interleaved else 1, {"gate": 1, "up": 1})
    return {half: cut(matrix) for half, cut in cuts.items()}


def _dbrx(config: Mapping[str, Any], name: str, before: str, part: str, ref: TensorRef) -> Iterator[Expert]:
    """DBRX stacks the rows of all experts, w2 transposed."""
    settings = config.get("ffn_config")
    count = settings.get("moe_num_experts") if isinstance(settings, Mapping) else None
    if type(count) is not int or not 0 < count <= _MAX_EXPERTS or len(ref.shape) != 2 or ref.shape[0] % count:
        return
    role = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}[part]
    width = ref.shape[0] // count
    for index in range(count):
        matrix = ref.rows(index * width, (index + 1) * width)
        matrix = matrix.T if part == "w2" else matrix
        yield Expert(f"{before}{index}.{role}.weight", f"[{index}]", matrix)
