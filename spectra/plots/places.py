"""Where a weight sits: its place in the model's depth, and what it does there, as rows and columns of a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from spectra import naming

# Words before a number that counts depth; what merely ends in one of them (down_blocks) counts, too.
_NUMBER = re.compile("[0-9]{1,9}")  # as layers have it; what is longer is a stranger's name
_CONTAINER = re.compile(r"(?:^|_)(?:layers?|h|blocks?|encoder|decoder|resblocks|stages?|attentions|resnets)$")
_SAMPLERS = {"downsamplers": "down", "upsamplers": "up"}  # behind the numbered layers of their block
_INSIDE_MIDDLE = frozenset({"attentions", "resnets"})  # of the one middle block, which has no number
# Stacks in the order in which data flows through them, by the first of these words that a stack's name has.
_FLOW = (
    r"text_model|text_encoder|^te\d?\b", r"vision|visual|image|audio", r"encoder|down_blocks|input_blocks",
    r"mid_block|middle_block", r"decoder|up_blocks|output_blocks", r"single_(?:transformer_)?blocks",
)  # fmt: skip
_FLOW_DEFAULT = 3.5  # a plain stack of layers: after encoders, and before what is joined to it
_CROSS = frozenset({
    "attn2", "EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "cross_attention", "multihead_attn",
})  # fmt: skip
_KNOWN = 2**16  # names whose place is kept: a picture asks for each many times
_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
_JOINT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_ORDER = (
    *_ATTENTION, *_JOINT, *(f"cross {role}" for role in _ATTENTION), *_MLP, *(f"context {role}" for role in _MLP),
    "router", *(f"{role}, experts" for role in _MLP), *(f"{role}, shared expert" for role in _MLP),
)  # fmt: skip
_OUTSIDE = ("embed_tokens", "wpe", "position_embeddings", "token_type_embeddings", "shared", "*", "pooler.dense",
            "classifier", "score", "lm_head")  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A column: a layer of a stack.

    Attributes:
        stack: the part of the names before the layer's number; "" outside all layers.
        index: the numbers, the block's first; () outside all layers.
        sampler: "down" or "up" for the layer that ends a block of a UNet, which has no number there; else "".
    """

    stack: str
    index: tuple[int, ...]
    sampler: str = ""

    @property
    def label(self) -> str:
        """The layer's number as people write it."""
        return ".".join([*map(str, self.index), *filter(None, [self.sampler])])


OUTSIDE = Place("", ())


@lru_cache(_KNOWN)
def place_of(name: str) -> Place:
    """The layer that a weight belongs to, with the stack of layers that it is of.

    >>> place_of("decoder.block.3.layer.1.EncDecAttention.q.weight")
    Place(stack='decoder.block', index=(3,), sampler='')
    >>> place_of("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight").label
    '1.0'
    >>> place_of("down_blocks.1.downsamplers.0.conv.weight").label
    '1.down'
    """
    stack: list[str] = []
    index: list[int] = []
    words = _words(name)
    for place, (before, word) in enumerate(pairwise(words[:-1]), start=1):
        if before == "experts":
            break
        if before in _SAMPLERS and index:
            return Place(".".join(stack), tuple(index), _SAMPLERS[before])
        is_sublayer = before == "layer" and "block" in words[: place - 1]  # T5: block.3.layer.1
        is_first_inside = bool(index) and before == "transformer_blocks" and word == "0"  # with what is around it
        if _NUMBER.fullmatch(word) and _CONTAINER.search(before) and not is_sublayer and not is_first_inside:
            stack = stack or words[: place - 1 if before in _INSIDE_MIDDLE else place]
            index.append(int(word))
    return Place(".".join(stack), tuple(index))


@lru_cache(_KNOWN)
def row_of(name: str) -> str:
    """What a weight does in its layer: its role, told apart from those of cross-attention and of experts.

    >>> row_of("decoder.block.3.layer.1.EncDecAttention.q.weight")
    'cross q_proj'
    >>> row_of("model.layers.0.mlp.experts.7.gate_proj.weight"), row_of("model.layers.0.mlp.gate.weight")
    ('gate_proj, experts', 'router')
    """
    words = _words(name)
    role = naming.role_of(name) if "." in name else naming.role_of(".".join(words))
    if "shared_expert" in words or "shared_experts" in words:
        return f"{role}, shared expert"
    if "experts" in words:
        return f"{role}, experts"
    if _CROSS.intersection(words):
        return f"cross {role}"
    context = "ff_context" in words or any(word.startswith("txt_") for word in words)
    return f"context {role}" if context else role


def _words(name: str) -> list[str]:
    """The words of a module's path; trainers of diffusion models write underscores for the dots."""
    module = naming.module_of(name)
    if "." not in module and module.startswith("lora_"):
        module = re.sub(r"_(\d+)(?=_|$)", r".\1", module.removeprefix("lora_"))
        module = re.sub(r"(?<=\.\d)_|(?<=\.\d\d)_|(?<=^unet)_|(?<=mid_block)_|(?<=^te)_|(?<=^te\d)_", ".", module)
        module = re.sub(r"\b(self_attn|attn[12]?|mlp|ff)_", r"\1.", module)
    return module.split(".")


def ordered_rows(names: Iterable[str]) -> list[str]:
    """The rows that these weights make: attention, cross-attention, MLP, experts, others; last what is in no layer."""
    inside: dict[str, int] = {}
    outside: dict[str, int] = {}
    for name in names:
        rows = inside if place_of(name).index else outside
        rows.setdefault(row_of(name), len(rows))
    known = {row: place for place, row in enumerate(_ORDER)}
    ends = {row: place for place, row in enumerate(_OUTSIDE)}
    first = sorted(inside, key=lambda row: (known.get(row, len(known)), inside[row]))
    last = sorted(set(outside) - set(inside), key=lambda row: (ends.get(row, ends["*"]), outside[row]))
    return first + last


def ordered_places(names: Iterable[str]) -> list[Place]:
    """The layers that these weights lie in, in the order of the data's flow; last what is in no layer.

    >>> [place.stack for place in ordered_places(["decoder.block.0.a.weight", "encoder.block.0.a.weight"])]
    ['encoder.block', 'decoder.block']
    """
    places = dict.fromkeys(map(place_of, names))
    stacks = {stack: place for place, stack in enumerate(dict.fromkeys(place.stack for place in places))}
    return sorted(places, key=lambda place: (not place.index, _flow(place.stack), stacks[place.stack], _within(place)))


def _within(place: Place) -> tuple[float, ...]:
    return (*place.index, math.inf) if place.sampler else place.index


def _flow(stack: str) -> float:
    places = [place for place, pattern in enumerate(_FLOW) if re.search(pattern, stack)]
    if not places:
        return _FLOW_DEFAULT
    return places[0] if places[0] == 0 else places[-1]  # a text encoder comes first, a vision tower's encoder does not


def stack_labels(places: Sequence[Place]) -> dict[str, str]:
    """Stack → the words by which it differs from the others; "" where there is one only.

    >>> stack_labels([Place("encoder.block", (0,)), Place("decoder.block", (0,)), OUTSIDE])
    {'encoder.block': 'encoder', 'decoder.block': 'decoder', '': 'outside'}
    """
    stacks = list(dict.fromkeys(place.stack for place in places if place.index))
    labels = dict.fromkeys(stacks, "")
    if len(stacks) > 1:
        words = [stack.split(".") for stack in stacks]
        common = set.intersection(*map(set, words))
        told = [".".join(word for word in line if word not in common) or ".".join(line) for line in words]
        labels = {stack: re.sub(r"_blocks?$", "", label) for stack, label in zip(stacks, told, strict=True)}
    return labels | ({"": "outside"} if any(not place.index for place in places) else {})
