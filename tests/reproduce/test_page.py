"""What the page about the reproduction says is what its numbers say."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from reproduce.tiny import ROOT

from spectra.reproduce.controls import controls
from spectra.reproduce.page import tables
from spectra.reproduce.plan import FULL

PICTURES = ROOT / "figures" / "reproduction"
PAGE = (ROOT / "docs" / "reproduction.md").read_text()


def test_the_pages_tables_are_made_of_the_numbers():
    made = tables(PICTURES)
    assert (PICTURES / "tables.md").read_text() == made
    for table in re.findall(r"(?:^\|.*\n)+", made, re.M):
        assert table in PAGE


def test_every_link_of_the_page_leads_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)", PAGE)
    assert len(targets) >= 6
    for target in targets:
        assert (ROOT / "docs" / target).exists(), target


def test_the_numbers_are_of_the_plan_in_the_code():
    runs = pd.read_csv(PICTURES / "runs.csv").set_index("name")
    planned = [*FULL.main_runs(), *FULL.sensitivity_runs()]
    assert list(runs.index) == [run.name for run in planned]
    for run in planned:
        assert runs.loc[run.name, "steps"] == run.steps
        assert runs.loc[run.name, "lr"] == pytest.approx(run.lr, rel=1e-4)


def test_the_kept_values_give_the_kept_summaries():
    values = pd.read_csv(PICTURES / "values.csv.gz")
    spectra = pd.read_csv(PICTURES / "spectra.csv")
    last = spectra[spectra["step"] == FULL.steps].set_index(["run", "role"])
    for (run, role), group in values.groupby(["run", "role"]):
        shares = group.groupby("name")["sigma"].apply(lambda sigma: (sigma**2).max() / (sigma**2).sum())
        assert last.loc[(run, role), "top_1_share"] == pytest.approx(shares.median(), rel=1e-3)
        assert last.loc[(run, role), "matrices"] == len(shares)


def orthonormal(rng, count):
    return np.linalg.qr(rng.standard_normal((20, count)))[0]


def test_the_controls_are_what_their_definitions_say(tmp_path):
    """One layer with known vectors, of which the page's files hold the grid and the values."""
    rng = np.random.default_rng(0)
    U, V = orthonormal(rng, 20), orthonormal(rng, 20)
    sigma = {
        "multilora-n3": np.r_[5.0, 2.0, 1.0, 1.0],
        "multilora-n3-origin": np.ones(4),
        "full": np.linspace(4, 1, 20),
    }
    rows = [
        {"run": run, "label": run.replace("full", "full fine-tuning"), "name": "layers.0.x", "role": role, "out": 20,
         "in": 30, "max_rank": len(values), "sigma": value}
        for role in ("k_proj", "v_proj") for run, values in sigma.items() for value in values
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    table.to_csv(tmp_path / "values.csv.gz", index=False)
    table.drop_duplicates("run").assign(seed=0, lr=1e-3).to_csv(tmp_path / "spectra.csv", index=False)
    for role in ("k_proj", "v_proj"):
        (tmp_path / f"figure-4-{role}").mkdir()
        grid = [
            {"panel": f"multilora-n3: {role}", "i": i, "j": j,
             "phi": np.sum((U[:, :i].T @ V[:, :j]) ** 2) / min(i, j)}
            for i in range(1, 7) for j in range(1, 7)
        ]  # fmt: skip
        pd.DataFrame(grid).to_csv(tmp_path / f"figure-4-{role}" / "similarity_grid.csv", index=False)
    found = controls(tmp_path).set_index(["role", "run"]).loc[("v_proj", "multilora-n3")]
    assert found["start_share"] == pytest.approx(4 / 31)
    weighted = sum(s**2 * np.sum((V[:, :6].T @ U[:, i]) ** 2) for i, s in enumerate(sigma["multilora-n3"])) / 31
    assert found["captured"] == pytest.approx(weighted)
    assert found["captured_chance"] == pytest.approx(6 / 20)
    assert found["phi_1"] == pytest.approx((U[:, 0] @ V[:, 0]) ** 2)
    assert found["phi_below"] == pytest.approx(np.sum((U[:, 2:6].T @ V[:, 2:6]) ** 2) / 4)
    assert found["phi_below_chance"] == pytest.approx(4 / 20)
    values = np.sort(np.r_[sigma["multilora-n3"], np.zeros(16)])
    differences = np.abs(values[:, None] - values[None, :]).mean()
    assert found["gini_all"] == pytest.approx(differences / (2 * values.mean()))
    assert np.isnan(controls(tmp_path).set_index(["role", "run"]).loc[("v_proj", "full"), "captured"])


def test_rloras_start_has_the_norm_of_its_formula():
    import torch
    from torch import nn

    from spectra.training import RLoRAConfig, inject_adapter

    torch.manual_seed(0)
    adapter = inject_adapter(nn.Sequential(nn.Linear(576, 192)), RLoRAConfig(36, 3, 36))[0].adapter
    norm = float((adapter.rlora_offset_B @ adapter.rlora_offset_A).norm())
    stored = pd.read_csv(PICTURES / "values.csv.gz")
    stored = stored[(stored["run"] == "rlora") & (stored["role"] == "v_proj")]
    energy = (stored["sigma"] ** 2).groupby(stored["name"]).sum()
    share = controls(PICTURES).set_index(["role", "run"]).loc[("v_proj", "rlora"), "start_share"]
    assert share == pytest.approx((norm**2 / energy).median(), rel=0.1)
