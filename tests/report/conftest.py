"""Runs that pages are made of, and one of them with names from a stranger."""

from __future__ import annotations

import pytest
from support.hostile_names import ATTACK, HOSTILE
from support.spectra_runs import matrices

import spectra
from spectra.results import run_file
from spectra.spectrum import Spectrum


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
    run = run_file.read(folder / "run.json")
    attack = f"</dd></script><script>{ATTACK}</script>\u202e"
    run["inputs"] = {"tuned": attack, "kind": attack, "options": {attack: attack}, "files": {attack: {"size": attack}}}
    run |= {"command": [attack], "versions": {attack: attack}, "coverage": {"skipped": {attack: attack}}}
    run["coverage"]["warnings"] = [attack]
    run_file.write(folder / "run.json", run)
    return folder
