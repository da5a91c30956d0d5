"""Weights that are stored as codes: each becomes one weight that is decoded when it is read, or is refused by name.

What belongs to a weight (scales, zero points, maxima) leaves the list of tensors with it, decoded or not. A new
format is a file in `codecs/` and its place in `_FINDERS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spectra.errors import SourceError
from spectra.files.codecs import awq, bitsandbytes, compressed_tensors, fp8, gptq, mlx, mxfp4, undecoded
from spectra.files.codecs.coded import BROKEN, Candidate, Coded
from spectra.files.tensors import TensorRef

# In this order: a tensor belongs to the first format that recognises it.
_FINDERS: tuple[Callable[[Mapping[str, TensorRef], Mapping[str, Any]], list[Candidate]], ...] = (
    bitsandbytes.find, awq.find, gptq.find, mlx.find, mxfp4.find, compressed_tensors.find, undecoded.find, fp8.find,
)  # fmt: skip

# Where AutoGPTQ and AutoAWQ wrote what transformers keeps in config.json since it reads them.
SETTINGS_FILES = ("quantize_config.json", "quant_config.json")
_OLD_WORDS = {"w_bit": "bits", "q_group_size": "group_size"}


def todays_settings(said: Mapping[str, Any]) -> dict[str, Any]:
    """What such a file says, as `quantization_config` of config.json says it.

    The method is GPTQ unless the layout is AWQ's, as AutoGPTQ, auto_gptq/quantization/config.py, reads both files.

    >>> todays_settings({"w_bit": 4, "q_group_size": 128, "version": "GEMM"})
    {'quant_method': 'awq', 'bits': 4, 'group_size': 128, 'version': 'GEMM'}
    """
    method = "awq" if str(said.get("version")).lower() == "gemm" else "gptq"
    marlin = {"checkpoint_format": "marlin"} if said.get("is_marlin_format") is True else {}
    return {"quant_method": method} | {_OLD_WORDS.get(key, key): value for key, value in said.items()} | marlin


@dataclass(frozen=True)
class Decoded:
    """A folder's tensors after decoding.

    Attributes:
        tensors: name → reference that reads as real numbers, and whatever is not a weight's code.
        packed: weight → why it cannot be decoded.
        broken: name → why it cannot be read; a coded weight's own name where that is one of its parts.
        warnings: what was decoded.
    """

    tensors: dict[str, TensorRef]
    packed: dict[str, str]
    broken: dict[str, str]
    warnings: tuple[str, ...] = ()


def decode(
    tensors: Mapping[str, TensorRef], config: Mapping[str, Any], broken: Mapping[str, str] | None = None
) -> Decoded:
    """Put one reference, or one reason, in the place of all the tensors that a coded weight is stored in.

    Args:
        tensors: what the files hold.
        config: the model's `config.json`.
        broken: name → why it cannot be read, for tensors that the files name and do not hold.
    """
    lost = broken or {}
    named = {**tensors, **{name: TensorRef("", name, BROKEN, (), "", (0, 0)) for name in lost}}
    places, belonging = _recognised(named, config)
    left: dict[str, TensorRef] = {}
    packed: dict[str, str] = {}
    unreadable = {name: why for name, why in lost.items() if name not in belonging}
    kinds: Counter[str] = Counter()
    for name, ref in named.items():
        if name in places:
            weight, title = places[name].weight, places[name].title
            gone = next((f"{part}: {lost[part]}" for part in places[name].names if part in lost), None)
            if gone is not None:
                unreadable[weight] = gone
                continue
            try:
                left[weight] = _built(places[name], tensors).as_ref(weight)
            except SourceError as problem:
                packed[weight] = f"{title} codes in {ref.path} are not decoded: {problem}"
            else:
                kinds[title if title == fp8.TITLE else f"{left[weight].dtype} ({title})"] += 1
        elif name not in belonging and name not in lost:
            left[name] = ref
    first = next((ref.path for ref in tensors.values()), "")
    said = tuple(f"{first}: {_said(kind, count)}" for kind, count in kinds.items())
    return Decoded(left, packed, unreadable, said)


def _recognised(
    tensors: Mapping[str, TensorRef], config: Mapping[str, Any]
) -> tuple[dict[str, Candidate], frozenset[str]]:
    """In whose place each coded weight is listed, and every name that belongs to one."""
    places: dict[str, Candidate] = {}
    rest = dict(tensors)
    for find in _FINDERS:
        for candidate in find(dict(rest), config):
            mine = [name for name in candidate.names if name in rest]
            if mine:
                places[mine[0]] = candidate
            for name in mine:
                del rest[name]
    return places, frozenset(tensors) - frozenset(rest)


def _built(candidate: Candidate, tensors: Mapping[str, TensorRef]) -> Coded:
    """How a weight is decoded.

    Raises:
        SourceError: a part of it is missing or does not fit, or the weight is there twice.
    """
    if candidate.weight in tensors and candidate.weight not in candidate.names:
        raise SourceError(f"{candidate.weight} is there in plain numbers, too; keep one of the two")
    return candidate.build()


def _said(kind: str, count: int) -> str:
    weights = f"{count} weights are" if count > 1 else "1 weight is"
    if kind == fp8.TITLE:
        return f"{weights} fp8 codes times scales, so ΔW includes what fp8 rounded away"
    return f"{weights} {kind}: ΔW is relative to the decoded weights"
