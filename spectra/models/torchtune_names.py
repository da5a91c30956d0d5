"""torchtune's names of a decoder, and the rows of q and k, which it keeps in Meta's order for LLaMA and kin.

Settled by pytorch/torchtune: torchtune/models/convert_weights.py and the `_convert_weights.py` of gemma2, qwen2, qwen3
and phi3 (whose q, k, v and gate, up transformers keeps fused).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models.architectures import model_type, section
from spectra.models.meta_names import in_transformers_order

_MATRICES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_NORMS = {
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "sa_norm": "input_layernorm",
    "sa_scale": "post_attention_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_scale": "post_feedforward_layernorm",
}
_OUTSIDE = {
    "output": "lm_head",
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "norm.rms_norm": "model.norm",
}
_MODULE = re.compile(rf"layers\.(\d+)\.({'|'.join(map(re.escape, (*_MATRICES, *_NORMS)))})")
_OWN = re.compile(rf"layers\.\d+\.(?:{'|'.join(map(re.escape, _MATRICES))})\.")
_FUSED = (("self_attn.qkv_proj", "qkv", "self_attn.{}_proj"), ("mlp.gate_up_proj", ("gate", "up"), "mlp.{}_proj"))
_IN_METAS_ORDER = frozenset({"llama", "mistral", "gemma", "gemma2"})
_AS_STORED = frozenset({"qwen2", "qwen3", "phi3"})


def speaks(names: Iterable[str]) -> bool:
    """Whether modules are called as torchtune calls them, in full weights or in an adapter."""
    return any(_OWN.match(name) for name in names)


def is_whole(folder: Folder) -> bool:
    """Whether a folder holds full weights in torchtune's names."""
    return any(re.fullmatch(r"layers\.\d+\.attn\.q_proj\.weight", name) for name in folder.tensors)


def transformers_module(module: str) -> str:
    """What transformers calls a module of torchtune's decoder; other modules keep their names.

    >>> transformers_module("layers.3.mlp.w2"), transformers_module("output")
    ('model.layers.3.mlp.down_proj', 'lm_head')
    """
    match = _MODULE.fullmatch(module)
    if match:
        return f"model.layers.{match[1]}.{(_MATRICES | _NORMS)[match[2]]}"
    return _OUTSIDE.get(module, module)


def fused_module(module: str) -> tuple[str, str] | None:
    """The module in which some architectures of transformers' fuse one, and which part of it that is; None if none do.

    >>> fused_module("model.layers.3.mlp.up_proj"), fused_module("model.layers.3.mlp.down_proj")
    (('model.layers.3.mlp.gate_up_proj', 'up'), None)
    """
    for fused, parts, apart in _FUSED:
        for part in parts:
            if module.endswith(f".{apart.format(part)}"):
                return module.removesuffix(apart.format(part)) + fused, part
    return None


def heads_to_reorder(config: Mapping[str, Any], name: str) -> int | None:
    """How many heads' rows lie in Meta's order in a matrix; None for one whose rows are as transformers has them.

    Args:
        config: of the model under transformers' names.
        name: the module's name there.

    Raises:
        SourceError: the model type is not one that torchtune is known to reorder or to leave, or the heads are unknown.
    """
    if not name.endswith((".q_proj", ".k_proj")):
        return None
    kind = model_type(config, name)
    if kind in _AS_STORED:
        return None
    if kind not in _IN_METAS_ORDER:
        raise SourceError(
            f"whether torchtune reorders the rows of q and k is not known for model_type {kind!r} of the base"
        )
    said = section(config, name)
    heads = said.get("num_attention_heads")
    if name.endswith(".k_proj"):
        heads = said.get("num_key_value_heads", heads)
    if type(heads) is not int or heads < 1:
        raise SourceError("the base's config.json does not say how many heads there are, which the order of rows takes")
    return heads


def reordered(ref: TensorRef, heads: int | None) -> TensorRef:
    """Rows in transformers' order.

    Raises:
        SourceError: they are not so many heads.
    """
    if heads is None:
        return ref
    if ref.shape[0] % (2 * heads):
        raise SourceError(
            f"the {ref.shape[0]} rows of {ref.name} are not {heads} heads, as the base's config.json says"
        )
    return in_transformers_order(ref, heads)


def as_transformers(folder: Folder, other: Folder) -> Folder:
    """Full weights under transformers' names and in its order of rows, fused where the other side is.

    What takes the other side's config and does not find it there is broken, with that reason.
    """
    four_norms = any(".sa_scale." in name for name in folder.tensors)
    tensors: dict[str, TensorRef] = {}
    broken = {_name(name, four_norms): why for name, why in folder.broken.items()}
    for name, ref in folder.tensors.items():
        new = _name(name, four_norms)
        try:
            heads = heads_to_reorder(other.config, new.removesuffix(".weight")) if new.endswith(".weight") else None
            tensors[new] = reordered(ref, heads) if len(ref.shape) == 2 else ref
        except SourceError as problem:
            broken[new] = f"{problem}; it takes the config of the model in transformers' names"
    _fuse(tensors, broken, other)
    return replace(folder, tensors=tensors, broken=broken, config=folder.config or other.config)


def _name(stored: str, four_norms: bool) -> str:
    module, _, kind = stored.rpartition(".")
    new = transformers_module(module)
    if four_norms and module.endswith(".mlp_norm"):
        new = new.replace("post_attention_layernorm", "pre_feedforward_layernorm")
    return f"{new}.{'weight' if kind == 'scale' else kind}"


def _fuse(tensors: dict[str, TensorRef], broken: dict[str, str], other: Folder) -> None:
    """Stack the parts of what is one matrix on the other side."""
    for fused, parts, apart in _FUSED:
        for name in [name for name in other.tensors if name.endswith(f".{fused}.weight")]:
            stem = name.removesuffix(f"{fused}.weight")
            refs = [tensors.pop(f"{stem}{apart.format(part)}.weight", None) for part in parts]
            there = [ref for ref in refs if ref is not None]
            try:
                if len(there) < len(refs):
                    raise SourceError(f"a part of it is not in {next(iter(tensors.values())).path}")
                tensors[name] = TensorRef.joined(there, 0)
            except SourceError as problem:
                broken[name] = str(problem)
