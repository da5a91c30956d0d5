"""LoRA for llama.cpp, in GGUF: its names, and its order of query and key rows for LLaMA and kin.

ΔW = s·b·a with `<weight>.lora_a` (r, in) and `.lora_b` (out, r); of the embedding s·a·bᵀ with a (vocabulary, r),
b (dim, r); of stacked experts s·bₑ·aₑ. s = α/r with `adapter.lora.alpha` of the header. Settled by ggml-org/llama.cpp,
convert_lora_to_gguf.py, src/llama-adapter.cpp and llama-adapter.h (`get_scale`), and ollama/ollama, convert/convert.go
and convert_llama_adapter.go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from spectra.deltas.recipes import Term
from spectra.errors import SourceError, UnsupportedFormatError
from spectra.files import gguf_names
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models.architectures import section
from spectra.models.meta_names import in_transformers_order
from spectra.sources.adapter import Refusal, Slots, add_factored
from spectra.sources.ledger import Ledger
from spectra.sources.targets import targets

_ALPHA = "adapter.lora.alpha"
_HEADS = {"q": "num_attention_heads", "k": "num_key_value_heads"}
_IN_HEADER = {"q": "attention.head_count", "k": "attention.head_count_kv"}
_EMBEDDING = "token_embd.weight"


def matches(folder: Folder) -> bool:
    """Factors of weights in a GGUF file."""
    return any(ref.container == "gguf" for name, ref in folder.tensors.items() if ".weight.lora_" in name)


def read(ledger: Ledger) -> None:
    """Enter every module's factors, and every expert's, under transformers' names where the architecture is known.

    Raises:
        UnsupportedFormatError: the header says that it is another kind of adapter.
        SourceError: it says no α that is a finite number, and the user gave no s.
    """
    header = ledger.config
    kind = header.get("adapter.type", "lora")
    if kind != "lora":
        raise UnsupportedFormatError(f"{ledger.where} holds an adapter of type {kind!r}; of GGUF's, only lora is read")
    if "adapter.alora.invocation_tokens" in header:
        raise UnsupportedFormatError(
            f"{ledger.where} holds an activated LoRA (aLoRA): it acts on the tokens after its invocation only; there "
            "is no one ΔW to analyse"
        )
    alpha = _alpha(ledger)
    names = _architecture(ledger)
    terms: dict[str, Term] = {}
    for module, slots in ledger.modules(r"weight\.(?P<slot>lora_[ab])").items():
        stored = f"{module}.weight"
        name = (gguf_names.plain_name(stored, names) if names else None) or stored
        factors = None
        with ledger.attempt(name):
            factors = _factors(ledger, module, slots)
        if factors is not None:
            with ledger.attempt(name, () if len(factors[1].shape) > 2 else _shape(stored, *factors)):
                for own, term in _terms(ledger, stored, names, alpha, *factors).items():
                    terms[(own or name).removesuffix(".weight")] = term
    for module, target in targets(ledger, {module: term.shape for module, term in terms.items()}).items():
        add_factored(ledger, target, [terms[module]])


def _alpha(ledger: Ledger) -> float:
    """α, or 0 where the header has none and the user gives s.

    Raises:
        SourceError: it is no finite number, or nobody says what s is.
    """
    alpha = ledger.config.get(_ALPHA, 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise SourceError(
            f"{ledger.where}: {_ALPHA} = {alpha!r} in the header is not a finite number; convert it again"
        )
    if alpha and ledger.scale is not None:
        ledger.warnings.append(f"scale was ignored: the header carries {_ALPHA} = {alpha:g}")
    if not alpha and ledger.scale is None:
        said = f"{_ALPHA} = 0" if _ALPHA in ledger.config else f"no {_ALPHA}"
        raise SourceError(
            f"{ledger.where} holds {ledger.title}, and its header has {said}, so α/r is unknown: pass scale= "
            "(--scale), which is 1 if it is to be what llama.cpp makes of such a file"
        )
    return float(alpha)


def _architecture(ledger: Ledger) -> gguf_names.Architecture | None:
    """How the names map; None, with a warning, where that is not known."""
    name = str(ledger.config.get("general.architecture"))
    mixture = any("_exps." in stored or ".ffn_gate_inp." in stored for stored in ledger.tuned.tensors)
    names = gguf_names.architecture(name, mixture=mixture)
    if names is None:
        ledger.warnings.append(
            f"{ledger.where}: GGUF architecture {name!r} is not in the table, so updates keep llama.cpp's names and "
            "row order"
        )
    return names


def _factors(ledger: Ledger, module: str, slots: Slots) -> tuple[TensorRef, TensorRef]:
    """a and b as llama.cpp multiplies them, a single row as a matrix."""
    missing = next((slot for slot in ("lora_a", "lora_b") if slot not in slots), None)
    if missing:
        raise Refusal(f"{missing} of {module}.weight is missing in {ledger.where}")
    a, b = (ref.reshape(1, *ref.shape) if len(ref.shape) == 1 else ref for ref in slots.real("lora_a", "lora_b"))
    inner = a.shape[-1] if f"{module}.weight" == _EMBEDDING else a.shape[-2]
    stacks = len(a.shape) == len(b.shape) == 3 and a.shape[0] == b.shape[0]
    if not (stacks or len(a.shape) == len(b.shape) == 2) or inner != b.shape[-1] or not a.numel or not b.numel:
        raise Refusal(f"lora_a {list(a.shape)} and lora_b {list(b.shape)} of {module}.weight cannot be multiplied")
    return a, b


def _shape(stored: str, a: TensorRef, b: TensorRef) -> tuple[int, int]:
    """(out, in) of the weight."""
    return (a.shape[0], b.shape[0]) if stored == _EMBEDDING else (b.shape[0], a.shape[1])


def _terms(
    ledger: Ledger, stored: str, found: gguf_names.Architecture | None, alpha: float, a: TensorRef, b: TensorRef
) -> dict[str | None, Term]:
    """Name → product in Linear orientation; of one weight under None, of a stack for each expert under its own."""
    s = alpha / b.shape[-1] if alpha else float(ledger.scale or 0.0)
    if stored == _EMBEDDING:
        return {None: Term((a,), b.T, s)}
    part = gguf_names.permuted_part(stored, found) if found else None
    if len(a.shape) == 2:
        return {None: Term((_reordered(ledger, b, part) if part else b,), a, s)}
    names = gguf_names.expert_names(stored, found, a.shape[0]) if found else []
    if not names:
        raise Refusal(f"{stored} is a stack of {a.shape[0]} matrices, and what they are is not known here")
    return {name: Term((b.item(index),), a.item(index), s) for index, name in enumerate(names)}


def _reordered(ledger: Ledger, b: TensorRef, part: str) -> TensorRef:
    """The rows of q's or k's b in transformers' order, with the heads that the header or the base says."""
    arch = ledger.config.get("general.architecture")
    base: Mapping[str, Any] = section(ledger.base.config, "") if ledger.base else {}
    own = _count(ledger.config, f"{arch}.{_IN_HEADER[part]}", f"{arch}.{_IN_HEADER['q']}")
    there = _count(base, _HEADS[part], _HEADS["q"])
    heads = own or there
    if own and there and own != there:
        raise Refusal(f"the header says {own} heads ({_IN_HEADER[part]}), the base's config {there}")
    if not heads:
        missing = (
            "the base's config.json says neither" if ledger.base else "they follow from the base: pass base= (--base)"
        )
        raise Refusal(
            f"llama.cpp keeps the rows of {part} in another order than transformers, and to turn them back takes the "
            f"number of heads, which the header does not have; {missing}"
        )
    if b.shape[0] % (2 * heads):
        raise Refusal(
            f"the {b.shape[0]} rows of {b.name} are not {heads} heads, as the {'header' if own else 'base'} says"
        )
    if own:
        _note_ollama(ledger)
    return in_transformers_order(b, heads)


def _count(config: Mapping[str, Any], *keys: str) -> int:
    """The first of the keys that is a positive whole number, 0 if none is."""
    return next((config[key] for key in keys if type(config.get(key)) is int and config[key] > 0), 0)


def _note_ollama(ledger: Ledger) -> None:
    said = (
        "the header says how many heads there are, as Ollama's converter writes it, which turns the rows of lora_a of "
        "q and k, not those of lora_b: ΔW is what llama.cpp applies, and may not be what was trained"
    )
    if said not in ledger.warnings:
        ledger.warnings.append(said)
