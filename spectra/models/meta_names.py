"""LLaMA as Meta distributes it: its names, its order of query and key rows, and its tensor-parallel parts.

`consolidated.NN.pth` beside `params.json` hold the model under other names than transformers. The rows of
one attention head of wq and wk alternate between the two halves that rotary embeddings pair, (d/2, 2),
where transformers puts the halves one after the other, (2, d/2). Of a larger model each file holds one
part of every matrix, under the whole matrix' name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef

_OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_BLOCK = re.compile(rf"layers\.(\d+)\.({'|'.join(map(re.escape, _INSIDE))})\.weight")
# Which axis of a matrix is the model's width, and so is whole in every part.
_WHOLE_COLUMNS = ("wq", "wk", "wv", "w1", "w3", "output")
_WHOLE_ROWS = ("wo", "w2")


def transformers_name(name: str) -> str | None:
    """What transformers calls one of Meta's tensors; None for a name that is not one of them.

    >>> transformers_name("layers.3.feed_forward.w2.weight")
    'model.layers.3.mlp.down_proj.weight'
    """
    match = _BLOCK.fullmatch(name)
    return f"model.layers.{match[1]}.{_INSIDE[match[2]]}.weight" if match else _OUTSIDE.get(name)


def is_meta(folder: Folder) -> bool:
    """Whether a folder's tensors have Meta's names; its config then is `params.json`."""
    return any(re.fullmatch(r"layers\.\d+\.attention\.wq\.weight", name) for name in folder.tensors)


def in_transformers_order(ref: TensorRef, heads: int) -> TensorRef:
    """Rows of wq or wk (heads, d/2, 2) as those of q_proj or k_proj (heads, 2, d/2).

    Args:
        ref: the matrix, (heads · d, in).
        heads: the number of query heads for wq, of key-value heads for wk.

    Raises:
        SourceError: the rows are not so many heads of even width.
    """
    half = _half_head(ref, heads)
    return _exchanged(ref, heads, half, 2)


def in_meta_order(ref: TensorRef, heads: int) -> TensorRef:
    """The inverse of `in_transformers_order`."""
    half = _half_head(ref, heads)
    return _exchanged(ref, heads, 2, half)


def _half_head(ref: TensorRef, heads: int) -> int:
    rows = ref.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise SourceError(f"{ref.name} in {ref.path} has {rows} rows, which are not {heads} heads: check params.json")
    return rows // heads // 2


def _exchanged(ref: TensorRef, heads: int, first: int, second: int) -> TensorRef:
    rows, columns = ref.shape
    return ref.reshape(heads, first, second, columns).permute(0, 2, 1, 3).reshape(rows, columns)


def as_transformers(folder: Folder) -> Folder:
    """The folder under transformers' names, with query and key rows in transformers' order and a config in its words.

    Names that are not Meta's (`rope.freqs`) stay as they are. For a pair of which one side has Meta's
    names; two of Meta's are compared as they are.

    Raises:
        SourceError: `params.json` does not say how many heads there are, or is that of a mixture of experts.
    """
    params = folder.config
    if "moe" in params:
        raise SourceError(f"{folder.path} is a mixture of experts in Meta's format: convert it to transformers' first")
    heads = _needed(params, "n_heads", folder)
    of = {"wq": heads, "wk": _count(params, "n_kv_heads") or heads}
    tensors = {}
    for name, ref in folder.tensors.items():
        part = name.split(".")[-2] if "." in name else ""
        ordered = in_transformers_order(ref, of[part]) if part in of and len(ref.shape) == 2 else ref
        tensors[transformers_name(name) or name] = ordered
    return replace(
        folder,
        tensors=tensors,
        broken={transformers_name(name) or name: why for name, why in folder.broken.items()},
        config=transformers_config(params),
    )


def transformers_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """What `params.json` says, in the words of a LLaMA's config.json; what it leaves out is left out.

    >>> transformers_config({"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": -1})
    {'model_type': 'llama', 'hidden_size': 4096, 'num_hidden_layers': 32, 'num_attention_heads': 32}
    """
    words = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "hidden_dim": "intermediate_size",
        "vocab_size": "vocab_size",
    }
    return {"model_type": "llama"} | {new: params[old] for old, new in words.items() if _count(params, old)}


@dataclass(frozen=True)
class Joined:
    """How the parts of one tensor make the whole.

    Attributes:
        axis: along which they lie one after the other; None where each part is a copy of the whole.
        shape: of the whole.
    """

    axis: int | None
    shape: tuple[int, ...]


def how_joined(params: Mapping[str, Any], name: str, shapes: Sequence[tuple[int, ...]]) -> Joined:
    """How the tensor-parallel parts of a tensor are joined, by its name and the sizes in `params.json`.

    wq, wk, wv, w1, w3 and output are cut along their rows, wo and w2 along their columns; tok_embeddings
    along columns up to LLaMA 2 and along rows since LLaMA 3, whichever gives the model's width; vectors are
    copies. One part alone is a whole only if the sizes say so.

    Raises:
        SourceError: the name is not known, or the parts do not make a tensor of the size that the config says.

    >>> how_joined({"dim": 16, "n_heads": 4}, "layers.0.attention.wo.weight", [(16, 8), (16, 8)])
    Joined(axis=1, shape=(16, 16))
    """
    first = shapes[0]
    if len(set(shapes)) > 1:
        raise SourceError(f"the parts of {name} have the shapes {_listed(shapes)}: they are not of one model")
    if len(first) == 1:
        return Joined(None, first)
    width = _count(params, "dim")
    part = name.split(".")[-2] if "." in name else ""
    axis = _cut_axis(part, first, width, len(shapes)) if width and len(first) == 2 else None
    if axis is None:
        raise SourceError(
            f"how the {len(shapes)} parts {list(first)} of {name} are joined is not known: join them first"
        )
    shape = tuple(size * len(shapes) if i == axis else size for i, size in enumerate(first))
    _check_whole(params, name, len(shapes), shape)
    return Joined(axis, shape)


def _check_whole(params: Mapping[str, Any], name: str, count: int, shape: tuple[int, ...]) -> None:
    wanted = _sizes(params, name.split(".")[-2])
    if all(size is None or size == real for size, real in zip(wanted, shape, strict=True)):
        return
    said = " × ".join("any" if size is None else str(size) for size in wanted)
    made = f"{count} {'part' if count == 1 else 'parts'} of {name} make {list(shape)}, and params.json says {said}"
    if any(size is not None and size < real for size, real in zip(wanted, shape, strict=True)):
        raise SourceError(f"{made}: some parts are copies, or of another model; join them before")
    raise SourceError(f"{made}: name the folder that holds all parts of the model")


def _cut_axis(part: str, shape: tuple[int, ...], width: int, count: int) -> int | None:
    if part == "tok_embeddings":
        return 0 if shape[1] == width else 1 if shape[1] * count == width else None
    if part in _WHOLE_COLUMNS:
        return 0
    return 1 if part in _WHOLE_ROWS else None


def _sizes(params: Mapping[str, Any], part: str) -> tuple[int | None, int | None]:
    """The (rows, columns) of the whole matrix, as far as `params.json` has them."""
    width, heads = _count(params, "dim"), _count(params, "n_heads")
    head = _count(params, "head_dim") or (width // heads if width and heads else None)
    queries = heads * head if heads and head else None
    values = (_count(params, "n_kv_heads") or heads or 0) * (head or 0) or None
    hidden, vocabulary = _count(params, "hidden_dim"), _count(params, "vocab_size")
    return {
        "wq": (queries, width),
        "wk": (values, width),
        "wv": (values, width),
        "wo": (width, queries),
        "w1": (hidden, width),
        "w2": (width, hidden),
        "w3": (hidden, width),
        "output": (vocabulary, width),
        "tok_embeddings": (vocabulary, width),
    }[part]


def joined(
    params: Mapping[str, Any], parts: Sequence[Mapping[str, TensorRef]]
) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """The whole tensors of a model whose files each hold a part of every matrix, and the others' names → why not.

    Args:
        params: what `params.json` says.
        parts: name → reference, one mapping for each of `consolidated.00`, `.01`, …, in this order.

    Raises:
        SourceError: the sizes of wq say that there are more parts, or fewer.
    """
    _check_count(params, parts)
    tensors: dict[str, TensorRef] = {}
    refused: dict[str, str] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        refs = [part[name] for part in parts if name in part]
        try:
            if len(refs) < len(parts):
                raise SourceError(f"{name} is in {len(refs)} of the {len(parts)} files only; download the model again")
            how = how_joined(params, name, [ref.shape for ref in refs])
            tensors[name] = refs[0] if how.axis is None or len(refs) == 1 else TensorRef.joined(refs, how.axis)
        except SourceError as problem:
            refused[name] = str(problem)
    return tensors, refused


def _check_count(params: Mapping[str, Any], parts: Sequence[Mapping[str, TensorRef]]) -> None:
    """Compare the files with the parts that wq is in: `params.json` does not always say how large the others are."""
    for name, ref in parts[0].items():
        if not name.endswith(".attention.wq.weight") or len(ref.shape) != 2:
            continue
        rows = _sizes(params, "wq")[0]
        if rows and ref.shape[0] and rows != ref.shape[0] * len(parts):
            raise SourceError(
                f"{ref.path} is one of {rows // ref.shape[0]} parts of a model, as {name} {list(ref.shape)} and "
                f"params.json say, and {len(parts)} came: name the folder that holds them all"
            )
        return


def _needed(params: Mapping[str, Any], key: str, folder: Folder) -> int:
    value = _count(params, key)
    if value is None:
        raise SourceError(f"{folder.path} has Meta's names and no params.json beside it that says {key}: put it back")
    return value


def _count(params: Mapping[str, Any], key: str) -> int | None:
    value = params.get(key)
    return value if type(value) is int and value > 0 else None


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
