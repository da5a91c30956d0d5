"""LoRA as AdapterHub's `adapters` saves it: ΔW = s·B·A with s = alpha/r of the config inside the config.

Settled by adapter-hub/adapters, src/adapters/methods/lora.py (`LoRA`, `LoRALinear`, `LoRAMergedLinear`). What is
not one B·A there is refused: a gate that the input sets, factors that multiply the weights ((IA)³), VeRA, and the
fused q, k, v of GPT-2 with one A for each part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectra.deltas.recipes import Factors, Term
from spectra.errors import UnsupportedFormatError
from spectra.sources.adapter import Refusal, Slots, add_modules
from spectra.sources.config import Config
from spectra.sources.ledger import Ledger


def read(ledger: Ledger) -> None:
    """Enter every module's factors.

    Raises:
        UnsupportedFormatError: the config says that the factors are no B·A.
        SourceError: r or alpha is unusable.
    """
    inner = ledger.config.get("config")
    options: Mapping[str, Any] = inner if isinstance(inner, Mapping) else {}
    why = _other_than_lora(options)
    if why:
        raise UnsupportedFormatError(f"{ledger.where} is an adapter of AdapterHub, and {why}: it is not read")
    s, r = Config(options, ledger.where).scaling("", alpha_key="alpha")

    def build(module: str, slots: Slots) -> Factors:
        if not {"lora_A", "lora_B"} <= set(slots):
            raise Refusal(f"{'lora_B' if 'lora_A' in slots else 'lora_A'} of {module} is missing in {ledger.where}")
        A, B = slots.real("lora_A", "lora_B")
        if len(A.shape) == len(B.shape) == 2 and B.shape[1] == r and A.shape[0] in (2 * r, 3 * r):
            raise Refusal(f"{module} is a fused projection whose parts have factors of their own")
        if len(A.shape) != 2 or len(B.shape) != 2 or B.shape[1] != A.shape[0]:
            raise Refusal(f"lora_A {list(A.shape)} and lora_B {list(B.shape)} of {module} cannot be multiplied")
        if A.shape[0] != r:
            raise Refusal(f"the config says r = {r} for {module}, the factors in {ledger.where} have {A.shape[0]}")
        return Factors((Term((B,), A, s),))

    add_modules(ledger, ledger.modules(r"loras\.(?P<adapter>[^.]+)\.(?P<slot>lora_[AB])"), build)


def _other_than_lora(options: Mapping[str, Any]) -> str:
    """What the config says that makes it something else than s·B·A, or ""."""
    architecture, mode = options.get("architecture"), options.get("composition_mode", "add")
    if architecture != "lora":
        return f"its adapter_config.json says architecture {architecture!r}, not 'lora'"
    if mode != "add":
        return f"composition_mode {mode!r} multiplies the weights instead of adding to them"
    if options.get("use_gating"):
        return "use_gating weighs the update anew for every input, so no one ΔW exists"
    if options.get("vera_d") is not None or options.get("vera_b") is not None:
        return "vera_d, vera_b make its factors shared random ones (VeRA)"
    return ""
