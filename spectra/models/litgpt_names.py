"""LitGPT's names: where each of its matrices is in transformers' files, and its query, key and value in one.

`transformer.h.N.attn.qkv` stacks q, k and v; before December 2024 the same lay group by group under
`transformer.h.N.attn.attn`. Settled by Lightning-AI/litgpt: litgpt/scripts/convert_hf_checkpoint.py (names,
`qkv_reassemble`), litgpt/model.py (`CausalSelfAttention`) and commit fabf765b, which dropped the old order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models.architectures import Cut, repeated, section, stacked

_QKV, _OLD_QKV = "transformer.h.{}.attn.qkv", "transformer.h.{}.attn.attn"
_GATE, _UP = "transformer.h.{}.mlp.fc_1", "transformer.h.{}.mlp.fc_2"
_QKV_APART = "model.layers.{{}}.self_attn.{}_proj"
_QKV_STACKED = (_QKV, "model.layers.{}.self_attn.qkv_proj")
_QKV_GROUPED = ("gpt_neox.layers.{}.attention.query_key_value", "transformer.h.{}.self_attention.query_key_value")
_GATE_UP = "model.layers.{}.mlp.gate_up_proj"
_EXPERT = "transformer.h.{}.mlp.experts.{}."
# Where a module may be elsewhere: LitGPT's own name is tried first, and the first of these is taken if none is there.
_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "transformer.wte": ("model.embed_tokens", "gpt_neox.embed_in", "transformer.word_embeddings"),
    "transformer.ln_f": ("model.norm", "model.final_layernorm", "gpt_neox.final_layer_norm"),
    "lm_head": ("lm_head", "embed_out"),
    "transformer.h.{}.attn.proj": (
        "model.layers.{}.self_attn.o_proj", "model.layers.{}.self_attn.dense", "gpt_neox.layers.{}.attention.dense",
        "transformer.h.{}.self_attention.dense",
    ),
    "transformer.h.{}.attn.norm_q": ("model.layers.{}.self_attn.q_norm",),
    "transformer.h.{}.attn.norm_k": ("model.layers.{}.self_attn.k_norm",),
    "transformer.h.{}.norm_1": (
        "model.layers.{}.input_layernorm", "gpt_neox.layers.{}.input_layernorm", "transformer.h.{}.input_layernorm",
        "transformer.h.{}.ln_attn",
    ),
    "transformer.h.{}.norm_2": (
        "model.layers.{}.pre_feedforward_layernorm", "model.layers.{}.post_attention_layernorm",
        "gpt_neox.layers.{}.post_attention_layernorm", "transformer.h.{}.ln_mlp",
    ),
    "transformer.h.{}.post_attention_norm": ("model.layers.{}.post_attention_layernorm",),
    "transformer.h.{}.post_mlp_norm": ("model.layers.{}.post_feedforward_layernorm",),
    "transformer.h.{}.mlp.fc": (
        "model.layers.{}.mlp.fc1", "gpt_neox.layers.{}.mlp.dense_h_to_4h", "transformer.h.{}.mlp.dense_h_to_4h",
    ),
    "transformer.h.{}.mlp.proj": (
        "model.layers.{}.mlp.down_proj", "model.layers.{}.mlp.fc2", "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "transformer.h.{}.mlp.dense_4h_to_h",
    ),
    _GATE: ("model.layers.{}.mlp.gate_proj",),
    _UP: ("model.layers.{}.mlp.up_proj",),
    "transformer.h.{}.mlp.gate": ("model.layers.{}.block_sparse_moe.gate", "model.layers.{}.mlp.gate"),
    f"{_EXPERT}fc_1": ("model.layers.{}.block_sparse_moe.experts.{}.w1", "model.layers.{}.mlp.experts.{}.gate_proj"),
    f"{_EXPERT}fc_2": ("model.layers.{}.block_sparse_moe.experts.{}.w3", "model.layers.{}.mlp.experts.{}.up_proj"),
    f"{_EXPERT}proj": ("model.layers.{}.block_sparse_moe.experts.{}.w2", "model.layers.{}.mlp.experts.{}.down_proj"),
}  # fmt: skip
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_OWN = re.compile(
    r"(?:^|\.)transformer\.h\.\d+\.(?:attn\.(?:qkv|attn|proj)|mlp\.(?:experts\.\d+\.)?(?:fc|fc_1|fc_2|proj))\."
)


@dataclass(frozen=True)
class Heads:
    """The sizes that say which rows of the joint matrix are q, k and v.

    Attributes:
        queries: how many query heads there are.
        groups: how many key-value heads.
        width: rows of one head.
    """

    queries: int
    groups: int
    width: int

    @property
    def rows(self) -> dict[str, int]:
        """The rows of q, k and v."""
        return {"q": self.queries * self.width, "k": self.groups * self.width, "v": self.groups * self.width}

    def cuts(self, *, grouped: bool) -> dict[str, Cut]:
        """How to cut q, k and v out of their joint matrix, stacked or group by group."""
        if not grouped:
            return stacked(self.rows)
        return repeated(sum(self.rows.values()), self.groups, {"q": self.queries // self.groups, "k": 1, "v": 1})


@dataclass(frozen=True)
class Place:
    """Where a LitGPT module, or one part of it, is in another file.

    Attributes:
        module: the module there.
        part: which part of a fused module it is, "" for the whole.
        grouped: whether the parts lie group by group there.
    """

    module: str
    part: str = ""
    grouped: bool = False


def speaks(names: Iterable[str]) -> bool:
    """Whether modules are called as LitGPT calls them, in full weights or in an adapter."""
    return any(_OWN.search(name) for name in names)


def is_whole(folder: Folder) -> bool:
    """Whether a folder holds full weights in LitGPT's names."""
    return any(re.fullmatch(r"transformer\.h\.\d+\.attn\.(?:qkv|attn)\.weight", name) for name in folder.tensors)


def config(params: Mapping[str, Any]) -> dict[str, Any]:
    """What `model_config.yaml` says, in transformers' words; it has none for the architecture.

    >>> config({"n_embd": 16, "n_head": 4, "n_query_groups": None})
    {'model_type': 'litgpt', 'hidden_size': 16, 'num_attention_heads': 4, 'num_key_value_heads': 4}
    """
    words = {
        "n_layer": "num_hidden_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "head_size": "head_dim",
        "n_query_groups": "num_key_value_heads",
        "intermediate_size": "intermediate_size",
        "padded_vocab_size": "vocab_size",
    }
    said: dict[str, Any] = {"model_type": "litgpt"}
    said |= {new: params[old] for old, new in words.items() if _count(params, old)}
    if "num_attention_heads" in said:
        said.setdefault("num_key_value_heads", said["num_attention_heads"])
    return said


def heads_of(*configs: Mapping[str, Any]) -> Heads | None:
    """The sizes from the first config that says them, in transformers' words."""
    for whole in configs:
        said = section(whole, "")
        queries = _count(said, "num_attention_heads")
        hidden, groups = _count(said, "hidden_size"), _count(said, "num_key_value_heads") or queries
        width = _count(said, "head_dim") or (hidden // queries if hidden and queries else 0)
        if queries and width and queries % groups == 0:
            return Heads(queries, groups, width)
    return None


def listing(names: Iterable[str]) -> str:
    """Names with their numbers left open, as one text in which `places` searches."""
    return "\n".join(sorted({_NUMBER.sub("{}", f".{name}") for name in names}))


def places(there: str, module: str) -> dict[str, Place]:
    """Part → where it is, for a module of LitGPT's in a file with such a `listing`; "" is the whole module.

    >>> places(listing(["model.layers.0.self_attn.qkv_proj.weight"]), "transformer.h.3.attn.qkv")["k"]
    Place(module='model.layers.3.self_attn.qkv_proj', part='k', grouped=False)
    >>> places(listing(["model.layers.0.mlp.up_proj.weight"]), "transformer.h.3.mlp.fc_2")
    {'': Place(module='model.layers.3.mlp.up_proj', part='', grouped=False)}
    """
    numbers = _NUMBER.findall(f"{module}.")
    own = _NUMBER.sub("{}", f"{module}.").removesuffix(".")
    if own == _QKV:
        return {part: replace(place, module=place.module.format(*numbers)) for part, place in _joint(there).items()}
    if own in (_GATE, _UP) and f"{own}." not in there and f"{_GATE_UP}." in there:
        return {"": Place(_GATE_UP.format(*numbers), "gate" if own == _GATE else "up")}
    candidates = _ELSEWHERE.get(own, ())
    module_there = next((name for name in (own, *candidates) if f"{name}." in there), next(iter(candidates), own))
    return {"": Place(module_there.format(*numbers))}


def _joint(there: str) -> dict[str, Place]:
    """Where q, k and v are: in a fused module if there is one, else apart."""
    for candidates, grouped in ((_QKV_STACKED, False), (_QKV_GROUPED, True)):
        for name in candidates:
            if f"{name}." in there:
                return {part: Place(name, part, grouped) for part in "qkv"}
    return {part: Place(_QKV_APART.format(part)) for part in "qkv"}


def in_todays_order(folder: Folder) -> Folder:
    """The folder with what lies group by group under the old name stacked under today's.

    The factors of an adapter were stacked then, too; they change their name only.
    """
    old = re.compile(r"(transformer\.h\.\d+\.attn)\.attn\.(.+)")
    if not any(map(old.fullmatch, folder.listing.split("\n"))):
        return folder
    heads = heads_of(folder.config)
    tensors: dict[str, TensorRef] = {}
    broken = {old.sub(r"\1.qkv.\2", name): why for name, why in folder.broken.items()}
    for name, ref in folder.tensors.items():
        match = old.fullmatch(name)
        new = f"{match[1]}.qkv.{match[2]}" if match else name
        if not match or match[2] not in ("weight", "bias"):
            tensors[new] = ref
        elif heads is None or not ref.shape or ref.shape[0] != sum(heads.rows.values()):
            broken[new] = f"q, k and v lie group by group in {name}, and {_unknown(folder)}"
        else:
            cuts = heads.cuts(grouped=True)
            tensors[new] = TensorRef.joined([cuts[part](ref) for part in "qkv"], 0)
    return replace(folder, tensors=tensors, broken=broken)


def _unknown(folder: Folder) -> str:
    return f"no model_config.yaml beside {folder.path} says heads that fit its rows: put it back"


def as_transformers(folder: Folder, other: Folder) -> Folder:
    """Full weights under the names of the file that they are compared with, fused as that has them.

    Raises:
        SourceError: neither side says how many heads there are, where it takes that to cut or to order q, k and v.
    """
    there = listing((*other.tensors, *other.unusable))
    heads = heads_of(folder.config, other.config)
    tensors: dict[str, TensorRef] = {}
    broken: dict[str, str] = {}
    parts: dict[str, dict[Place, TensorRef]] = {}
    for name, ref in folder.tensors.items():
        module, _, kind = name.rpartition(".")
        names_there = places(there, module)
        if "" not in names_there:
            cuts = _checked(folder, name, ref, heads).cuts(grouped=False)
        for part, place in names_there.items():
            new, piece = f"{place.module}.{kind}", cuts[part](ref) if part else ref
            if place.part:
                parts.setdefault(new, {})[place] = piece
            else:
                tensors[new] = piece
    for name, why in folder.broken.items():
        module, _, kind = name.rpartition(".")
        broken |= {f"{place.module}.{kind}": why for place in places(there, module).values()}
    for new, pieces in parts.items():
        if new not in broken:
            try:
                tensors[new] = _fused(pieces, heads)
            except SourceError as problem:
                broken[new] = str(problem)
    said = {key: value for key, value in folder.config.items() if key != "model_type"}
    return replace(folder, tensors=tensors, broken=broken, config={**other.config, **said})


def _checked(folder: Folder, name: str, ref: TensorRef, heads: Heads | None) -> Heads:
    if heads is None or not ref.shape or ref.shape[0] != sum(heads.rows.values()):
        raise SourceError(f"which rows of {name} are q, k and v is not known: {_unknown(folder)}")
    return heads


def _fused(pieces: Mapping[Place, TensorRef], heads: Heads | None) -> TensorRef:
    """The parts of a fused weight, or bias, as one.

    Raises:
        SourceError: a part is missing, or they do not fit together.
    """
    by_part = {place.part: ref for place, ref in pieces.items()}
    order = "qkv" if "q" in by_part else ("gate", "up")
    missing = [part for part in order if part not in by_part]
    if missing:
        raise SourceError(f"its part {missing[0]} is not there")
    refs = [by_part[part] for part in order]
    if heads is None or not next(iter(pieces)).grouped:
        return TensorRef.joined(refs, 0)
    grouped = [ref.reshape(heads.groups, ref.shape[0] // heads.groups, *ref.shape[1:]) for ref in refs]
    whole = TensorRef.joined(grouped, 1)
    return whole.reshape(whole.shape[0] * whole.shape[1], *whole.shape[2:])


def _count(said: Mapping[str, Any], key: str) -> int:
    value = said.get(key)
    return value if type(value) is int and value > 0 else 0
