"""How many entries moved, per matrix and over the model, and o_proj beside q_proj, against counts of the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.checkpoints import llama_tensors, write_checkpoint
from support.command_line import lora_folder, run, strict, table

import spectra
from spectra.deltas import forms
from spectra.deltas.forms import Dense
from spectra.results.tables import MOVED

LEAST = dict(zip(MOVED, (0.0, 1e-6, 1e-5), strict=True))


@pytest.fixture
def pair(tmp_path):
    """A model of which some entries moved by 1e-7, some by 3e-6, some by much, one matrix not at all."""
    generator = torch.Generator().manual_seed(0)
    base = llama_tensors(dtype=torch.float64)
    tuned = {}
    for name, tensor in base.items():
        steps = torch.tensor([0.0, 1e-7, 3e-6, -1e-3]).double()
        moves = steps[torch.randint(0, 4, tensor.shape, generator=generator)]
        tuned[name] = tensor if name.endswith("0.self_attn.k_proj.weight") else tensor + moves
    return write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "tuned", tuned), base, tuned


def counted(base, tuned, names, least):
    moves = [(tuned[name] - base[name]).numpy() for name in names]
    return sum((np.abs(move) > least).sum() for move in moves) / sum(move.size for move in moves)


def test_the_columns_are_the_counts_of_each_matrix_and_of_all(pair, monkeypatch):
    monkeypatch.setattr(forms, "_BLOCK_ENTRIES", 50)
    base, tuned, before, after = pair
    found = spectra.decompose(spectra.open_source(tuned, base)).collect()
    rows = found.to_frame().set_index("name")
    for name in found.names:
        for key, least in LEAST.items():
            assert rows.loc[name, key] == pytest.approx(counted(before, after, [name], least)), (name, key)
    assert rows.loc["model.layers.0.self_attn.k_proj.weight", "moved"] == 0
    assert (1 - rows["unmoved_share"]).tolist() == pytest.approx(rows["moved"].tolist())
    whole = found.to_frame(by="model").iloc[0]
    for key, least in LEAST.items():
        assert whole[key] == pytest.approx(counted(before, after, found.names, least))
    relative = rows.groupby("role")["relative_norm"].mean()
    assert whole["o_over_q"] == pytest.approx(relative["o_proj"] / relative["q_proj"])
    assert (whole["matrices"], whole["unchanged_matrices"]) == (len(found), 1)


def test_they_are_stored_and_come_back(pair, tmp_path):
    base, tuned, _, _ = pair
    _, err = run("svd", "--base", base, "--tuned", tuned, "--out", tmp_path / "run", "--no-figures")
    rows = table(tmp_path / "run/summary.csv")
    fresh = spectra.decompose(spectra.open_source(tuned, base)).collect().to_frame().set_index("name")
    for row in rows:
        assert [float(row[key]) for key in MOVED] == fresh.loc[row["name"], list(MOVED)].tolist()
    whole = spectra.load(tmp_path / "run").to_frame(by="model").iloc[0]
    assert f"{whole['moved']:.1%} of {int(whole['moved_entries']):,} entries moved" in err
    assert "relative norm of o_proj over q_proj" in err
    document = strict(run("svd", "--base", base, "--tuned", tuned, "--json")[0])
    assert document["model"]["moved"] == whole["moved"]


def test_factors_are_not_multiplied_out_to_count(tmp_path):
    lora_folder(tmp_path / "lora", seed=1)
    found = spectra.decompose(spectra.open_source(tmp_path / "lora")).collect()
    assert all(spectrum.moved is None for spectrum in found)
    whole = found.to_frame(by="model").iloc[0]
    assert (whole["moved"], whole["moved_entries"], whole["o_over_q"]) == (None, 0, None)


def test_a_matrix_without_entries_has_no_share():
    assert Dense(torch.zeros(0, 3).double()).moved is None
    assert Dense(torch.zeros(2, 3).double()).moved == (0, 0, 0)


def test_the_real_fine_tune_moved_almost_everywhere(real_pair):
    base, tuned = real_pair
    found = spectra.decompose(spectra.open_source(tuned, base).select("layer.0.attention.self.query")).collect()
    (row,) = found.to_frame().to_dict("records")
    assert 1 >= row["moved"] >= row["moved_1e-6"] >= row["moved_1e-5"] > 0.9
    assert row["top_8_share"] < row["top_20_share"] < 1
    assert row["base_cosine"] > 0.99
