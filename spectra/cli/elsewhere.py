"""Options that have another name in other tools: what to write here instead."""

from __future__ import annotations

from collections.abc import Iterable

# Words of an option, as mergekit, kohya's scripts, LyCORIS and PEFT's users write it → what it is called here.
_HERE: dict[str, tuple[str, ...]] = {
    "base_model": ("--base",),
    "model_org": ("--base",),
    "pretrained": ("--base",),
    "pretrained_model_name_or_path": ("--base",),
    "model": ("--tuned", "--merged"),
    "model_tuned": ("--tuned",),
    "finetuned": ("--tuned",),
    "finetuned_model": ("--tuned",),
    "tuned_model": ("--tuned",),
    "checkpoint": ("--tuned",),
    "lora": ("--adapter", "--tuned"),
    "adapter": ("--tuned",),
    "peft": ("--adapter", "--tuned"),
    "lora_path": ("--adapter", "--tuned"),
    "merged_model": ("--merged",),
    "out_path": ("--out",),
    "output": ("--out",),
    "output_dir": ("--out",),
    "save_to": ("--out",),
    "save_path": ("--out",),
    "max_rank": ("--rank", "--top"),
    "rank": ("--top",),
    "dim": ("--rank", "--top"),
    "linear_dim": ("--rank", "--top"),
    "new_rank": ("--rank",),
    "k": ("--top",),
    "top_k": ("--top", "--k"),
    "topk": ("--top", "--k"),
    "num_workers": ("--workers",),
    "threads": ("--workers",),
    "jobs": ("--workers",),
    "gpu": ("--device",),
    "cuda": ("--device",),
    "cpu": ("--device",),
    "target_modules": ("--layer",),
    "modules": ("--layer",),
    "layers": ("--layer",),
    "filter": ("--layer",),
    "alpha": ("--scale",),
    "lora_alpha": ("--scale",),
    "save_precision": ("--dtype",),
    "dtype": ("--vectors",),
    "precision": ("--dtype", "--vectors"),
    "format": ("--json",),
    "max_memory": ("--memory",),
}


def here(option: str, known: Iterable[str]) -> list[str]:
    """What an option that a command does not have is called in it; [] if nobody calls anything so.

    >>> here("--base-model", ["--base", "--out"]), here("--rank", ["--top"]), here("--new", ["--top"])
    (['--base'], ['--top'], [])
    """
    there = set(known)
    return [name for name in _HERE.get(option.lstrip("-").replace("-", "_").lower(), ()) if name in there][:1]
