"""Heads of multi-head adapters: cosines and norms against plain loops, on files of every kind, and the command."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_adapter
from support.command_line import lora_folder, run, strict, table
from support.peft_oracle import tiny_model
from training.adapted import CONFIGS, config_for, trained

import spectra
from spectra.adapters import inject_adapter, save_adapter
from spectra.errors import SelectionError
from spectra.metrics.heads import head_cosines, update_cosines


def slowly(matrices):
    """The mean over pairs of Σ b·b' / (‖b‖‖b'‖), entry by entry."""
    found = []
    for a, b in combinations(matrices, 2):
        pairs = list(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
        lengths = math.sqrt(sum(x * x for x, _ in pairs)) * math.sqrt(sum(y * y for _, y in pairs))
        found.append(sum(x * y for x, y in pairs) / lengths)
    return sum(found) / len(found)


@pytest.fixture
def hydra(tmp_path, monkeypatch):
    """Three heads on one shared A in three layers: alike in the first, of one line in the second, apart in the last."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(3):
        prefix = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        common = torch.randn(8, 2, generator=generator)
        heads = {
            0: [common, common, 2 * common],
            1: [common, -common, common],
            2: [torch.randn(8, 2, generator=generator) for _ in range(3)],
        }[layer]
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(2, 16, generator=generator)
        tensors |= {f"{prefix}.lora_B{k}.weight": head.clone() for k, head in enumerate(heads)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_nums": 3}
    return write_adapter(tmp_path / "hydra", tensors, config)


def test_planted_heads_come_out_exactly_and_the_others_as_the_loops_say(hydra):
    rows = spectra.head_similarity(spectra.open_source(hydra, heads="each"))
    assert rows["name"].tolist() == [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    assert rows["cosine"][0] == pytest.approx(1, abs=1e-15)
    assert rows["cosine"][1] == pytest.approx(-1 / 3, abs=1e-15)
    assert rows["update_cosine"][1] == pytest.approx(-1 / 3)
    tensors = load_file(hydra / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.2.mlp.up_proj"
    heads = [tensors[f"{prefix}.lora_B{k}.weight"].double() for k in range(3)]
    updates = [3 * head @ tensors[f"{prefix}.lora_A.weight"].double() for head in heads]
    assert rows["cosine"][2] == pytest.approx(slowly(heads))
    assert rows["update_cosine"][2] == pytest.approx(slowly(updates))
    assert rows["norms"][2] == pytest.approx([float(head.norm()) for head in heads])
    assert rows["update_norms"][2] == pytest.approx([float(update.norm()) for update in updates])
    assert rows["chance"][2] == pytest.approx(1 / 4)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_our_own_trainers_save_is_read_head_by_head(name, tmp_path):
    model = trained(inject_adapter(tiny_model("llama"), config_for(name)))
    save_adapter(model, tmp_path / "adapter")
    rows = spectra.head_similarity(spectra.open_source(tmp_path / "adapter", heads="each")).set_index("name")
    modules = {path: module for path, module in model.named_modules()
               if hasattr(module, "rlora_B") or hasattr(module, "multilora_B")}  # fmt: skip
    assert len(rows) == len(modules) > 0
    for path, module in modules.items():
        heads = getattr(module, "rlora_B" if hasattr(module, "rlora_B") else "multilora_B").detach().double()
        (found,) = [rows.loc[weight] for weight in rows.index if path.startswith(weight.removesuffix(".weight"))]
        assert found["cosine"] == pytest.approx(slowly(heads), abs=1e-6)
        assert found["heads"] == 3


def test_a_change_of_basis_moves_the_heads_and_not_their_updates():
    rng = np.random.default_rng(0)
    B, A = (torch.as_tensor(rng.standard_normal(shape)) for shape in ((3, 9, 2), (2, 7)))
    R = torch.as_tensor(rng.standard_normal((2, 2)) + 3 * np.eye(2))
    plain = [spectra.LowRank(head, A) for head in B]
    moved = [spectra.LowRank(head @ torch.linalg.inv(R), R @ A) for head in B]
    assert np.allclose(update_cosines(plain), update_cosines(moved))
    assert not np.allclose(head_cosines(list(B)), head_cosines([update.left for update in moved]))


def test_a_head_that_is_zero_has_no_cosine_and_the_others_keep_theirs(hydra):
    tensors = load_file(hydra / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B2.weight"
    save_file(tensors | {name: torch.zeros(8, 2)}, hydra / "adapter_model.safetensors")
    rows = spectra.head_similarity(spectra.open_source(hydra, heads="each"))
    assert rows["cosine"][0] == pytest.approx(1)
    assert np.isnan(rows["cosines"][0][2]).all()
    save_file(tensors | {name: torch.full((8, 2), torch.nan)}, hydra / "adapter_model.safetensors")
    rows = spectra.head_similarity(spectra.open_source(hydra, heads="each"))
    assert (rows["status"][0], rows["reason"][0]) == ("unreadable", "entries are NaN or infinite")
    assert rows["status"].tolist()[1:] == ["ok", "ok"]


def test_an_adapter_without_heads_or_opened_as_their_mean_is_told_so(hydra, tmp_path):
    with pytest.raises(SelectionError, match=r'opened with heads="each" in Python'):
        spectra.head_similarity(spectra.open_source(hydra))
    lora_folder(tmp_path / "lora", seed=1)
    _, err = run("heads", tmp_path / "lora", status=1)
    assert "no module has two heads to compare" in err


def test_the_command_prints_stores_and_draws(hydra):
    out, err = run("heads", "hydra", "--out", "found")
    assert max(map(len, out.splitlines())) <= 80
    assert "figure: found/heads.png" in err
    document = strict(run("heads", "hydra", "--json")[0])
    assert strict((hydra.parent / "found/heads.json").read_text()) == document
    rows = table(hydra.parent / "found/heads.csv")
    assert [float(row["cosine"]) for row in rows] == [row["cosine"] for row in document["matrices"]]
    figure = spectra.heads_figure(document["matrices"])
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert line.get_ydata().tolist() == [row["cosine"] for row in document["matrices"]]
    assert run("heads", "hydra", "--layer", "re:layers.2", "--json")[0].count('"name"') == 1
