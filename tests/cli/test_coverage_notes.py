"""What several updates leave out is said once where it is true of all of them, and with a name where it is not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import lora_folder, run

NORM = "base_model.model.model.norm.weight"


def with_vectors(folder, *names):
    """An adapter that holds vectors, which are no matrices."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {name: torch.ones(8) for name in names}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("command", [("interference",), ("similarity", "--top", "2")])
def test_a_note_of_all_updates_is_said_once_and_of_some_with_their_name(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        lora_folder(tmp_path / name, seed=seed)
        with_vectors(tmp_path / name, NORM, *([NORM.replace("norm", "other_norm")] if name == "b" else []))
    _, err = run(*command, *"abc")
    lines = [line for line in err.splitlines() if "norm.weight" in line]
    assert len(lines) == 2, err
    assert [line.split(": ")[0] for line in lines] == ["a, c", "b"]
    _, err = run(*command, *"ac")
    (line,) = [line for line in err.splitlines() if "norm.weight" in line]
    assert not line.startswith("a")
