"""What is compared: full fine-tuning, LoRA, MultiLoRA, R-LoRA and multi-head LoRA, attached and saved."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spectra.errors import MissingExtraError, SpectraError
from spectra.training import MultiLoRAConfig, RLoRAConfig, inject_adapter, save_adapter

# What every adapter is attached to: all projections of a Llama block, as in Wang et al. 2023.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Method:
    """One way to adapt.

    Attributes:
        kind: which.
        r: rank of one LoRA module; 0 for full fine-tuning.
        n: parallel modules, or heads.
    """

    kind: Literal["full", "lora", "multilora", "rlora", "multihead"]
    r: int = 0
    n: int = 1

    @property
    def total_rank(self) -> int | None:
        """Rank that is trained: n·r where modules are parallel, r where they share A, None without a bound.

        R-LoRA's ΔW relative to the base may have twice that: its offset is another product of rank r.
        """
        return {"full": None, "multilora": self.n * self.r}.get(self.kind, self.r)

    @property
    def label(self) -> str:
        """How legends and tables call it."""
        return {
            "full": "full fine-tuning",
            "lora": f"LoRA r={self.r}",
            "multilora": f"MultiLoRA n={self.n} r={self.r}",
            "rlora": f"R-LoRA N={self.n} r={self.r}",
            "multihead": f"multi-head LoRA N={self.n} r={self.r}",
        }[self.kind]


def attach(model: Any, method: Method) -> Any:
    """Make the model trainable by this method; α = r throughout, so that the scale α/r is 1.

    Raises:
        MissingExtraError: LoRA without PEFT.
        SpectraError: the model has none of the projections.
    """
    if method.kind == "full":
        return model.requires_grad_(True)
    if method.kind == "lora":
        return _attach_lora(model, method)
    configs: dict[str, MultiLoRAConfig | RLoRAConfig] = {
        "multilora": MultiLoRAConfig(method.r, method.n, method.r, target_modules=TARGETS),
        "rlora": RLoRAConfig(method.r, method.n, method.r, target_modules=TARGETS),
        "multihead": RLoRAConfig.hydralora(method.r, method.n, method.r, dropout=0.1, target_modules=TARGETS),
    }
    return inject_adapter(model, configs[method.kind])


def _attach_lora(model: Any, method: Method) -> Any:
    try:
        import peft
    except ImportError:
        raise MissingExtraError("spectra reproduce", "reproduce") from None
    config = peft.LoraConfig(r=method.r, lora_alpha=method.r, target_modules=list(TARGETS))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about what PEFT itself calls
            return peft.get_peft_model(model, config)
    except ValueError as problem:
        raise SpectraError(f"LoRA cannot be attached: {problem}") from None


def causal(model: Any) -> Any:
    """The language model inside, whether PEFT has wrapped it or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def save(model: Any, method: Method, directory: Path) -> None:
    """As others would find it: a checkpoint of safetensors, a PEFT folder, or `save_adapter`'s."""
    if method.kind in ("full", "lora"):
        model.save_pretrained(directory)
    else:
        save_adapter(model, directory)
