"""Runs that pages are made of, and one of them with names from a stranger."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.hostile_names import ATTACK, HOSTILE

import spectra
from spectra.spectrum import Spectrum


def matrices(seed=0, roles=("q_proj", "v_proj"), layers=3, size=24):
    rng = np.random.default_rng(seed)
    for layer in range(layers):
        for role in roles:
            vectors = [np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2)]
            S = np.sort(rng.exponential(0.1 * (1 + layer), size))[::-1]
            yield Spectrum(
                f"model.layers.{layer}.self_attn.{role}.weight", (size, size), S=S, U=vectors[0], Vh=vectors[1].T,
                base_norm=10.0, base_cosine=0.99, noise_edge=0.01, unmoved_share=0.0, method="gram-eigh-f64",
            )  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """`first` and `second`, and `same`, their comparison on both sides; the first has rows without numbers."""
    odd = [
        Spectrum("model.layers.3.self_attn.q_proj.weight", (24, 24), "nonfinite", reason="3 entries are NaN"),
        Spectrum("model.layers.3.self_attn.v_proj.weight", (24, 24), "unchanged", S=[0.0] * 24, note="shared by two"),
        Spectrum("lm_head.weight", (40, 24), S=[0.5, 0.25], max_rank=2),
    ]
    spectra.save([*matrices(1), *odd], tmp_path / "first")
    spectra.save(list(matrices(2)), tmp_path / "second")
    pair = (spectra.load(tmp_path / "first"), spectra.load(tmp_path / "second"))
    list(spectra.compare(*pair, top=5, sides=("left", "right"), out=tmp_path / "same"))
    return tmp_path


@pytest.fixture
def hostile(tmp_path):
    """A run whose names, reasons, notes, paths and versions are attacks on the page."""
    found = [
        Spectrum(name, (2, 2), S=[2.0 + i, 1.0], note=f"<b onclick='{ATTACK}'>", method=f"<i>{ATTACK}")
        for i, name in enumerate(HOSTILE)
    ]
    found += [Spectrum("bad.weight", (2, 2), "unsupported", reason=f"</li><script>{ATTACK}</script>")]
    folder = tmp_path / "hostile"
    spectra.save(found, folder)
    run = json.loads((folder / "run.json").read_text())
    attack = f"</dd></script><script>{ATTACK}</script>\u202e"
    run["inputs"] = {"tuned": attack, "kind": attack, "options": {attack: attack}, "files": {attack: {"size": attack}}}
    run |= {"command": [attack], "versions": {attack: attack}, "coverage": {"skipped": {attack: attack}}}
    run["coverage"]["warnings"] = [attack]
    (folder / "run.json").write_text(json.dumps(run))
    return folder
