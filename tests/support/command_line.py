"""Commands as a user types them, and what they leave behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from matplotlib.figure import Figure

from spectra.cli import main
from support.checkpoints import write_adapter


def run(*arguments: object, status: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command that ends with this status and without a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


def strict(text: str) -> Any:
    """A document that is JSON by the standard: no NaN, no infinity."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not strict JSON")

    return json.loads(text, parse_constant=refuse)


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file."""
    return list(csv.DictReader(path.open(encoding="utf-8")))


def titles(figure: Figure) -> list[str]:
    """The first line of each panel's title, row by row."""
    return [ax.get_title().splitlines()[0] for ax in figure.axes if ax.images]


def lora_folder(folder: Path, seed: int, rank: int = 4) -> Path:
    """A PEFT LoRA of the values of two layers, 8×16."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, 16, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(8, rank, generator=generator)
    return write_adapter(folder, tensors, {"peft_type": "LORA", "r": rank, "lora_alpha": 8})
