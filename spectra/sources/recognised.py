"""Formats that are known by their names and not read: refused by name, so that none is misread."""

from __future__ import annotations

import re

from spectra.sources.folder import Folder

_BY_KEY: tuple[tuple[str, str], ...] = (
    (r"\.lora_lambdas$|\.lora_B_w$", "MTL-LoRA (per-task mixtures)"),
    (r"\.lora_A\d+(\.weight)?$", "LoRAMoE or ALoRA (several A)"),
    (r"\.loraA\.", "MOELoRA"),
    (r"experts\.\d+\.lora_A|moe_gate\.weight", "MixLoRA or MoLA (an adapter per expert)"),
    (r"\.lora_AB(\.weight)?$", "MoSLoRA"),
    (r"hada_w1_a", "LoHa"),
    (r"lokr_w1", "LoKr"),
    (r"lora_down\.weight|lora_up\.weight", "a kohya or diffusers LoRA"),
    (r"\.qweight$|\.qzeros$", "GPTQ or AWQ quantised weights"),
    (r"\.absmax$|\.quant_state", "bitsandbytes quantised weights"),
    (r"_proj\.weight_scale_inv$", "fp8 weights with block scales"),
)


def name_of(folder: Folder) -> str | None:
    """What the folder holds, if it is a format that is recognised and not supported."""
    for pattern, title in _BY_KEY:
        if any(re.search(pattern, name) for name in folder.tensors):
            return title
    declared = (folder.adapter_config or {}).get("peft_type")
    return f"an adapter of peft_type {declared!r}" if declared and declared != "LORA" else None
