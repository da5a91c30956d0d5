"""The planner's byte estimates against what a process really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from spectra import open_source
from spectra.engine.costs import needed
from spectra.engine.solve import solve
from spectra.deltas.delta import WeightDelta

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def measured(delta, top):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    solve(delta, top=top)
    return {"measured": status("VmHWM") - before, "needed": needed(delta, top)}

def stored(m, n):
    folders = [Path(sys.argv[1]) / f"{side}-{m}-{n}" for side in ("base", "tuned")]
    for folder in folders:
        folder.mkdir()
        save_file({"a.weight": torch.randn(m, n).bfloat16()}, folder / "model.safetensors")
    return open_source(folders[1], folders[0]).deltas[0]

torch.set_num_threads(1)
dense = lambda m, n: WeightDelta.from_tensor("a", torch.randn(m, n))
thin = lambda r: WeightDelta.from_factors("a", torch.randn(3000, r), torch.randn(r, 3000))
solve(dense(1030, 1030), top=4); solve(thin(8), top=4); solve(stored(64, 64))
print(json.dumps([
    measured(dense(1400, 1400), None), measured(dense(1400, 1400), 8), measured(dense(700, 3000), None),
    measured(dense(3000, 700), 8), measured(thin(128), None), measured(thin(128), 30),
    measured(stored(300, 16384), None), measured(stored(1400, 1400), None), measured(stored(9000, 500), 8),
]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell")
def test_estimates_hold_and_are_not_far_off(tmp_path):
    # Every large block comes from the kernel and goes back at once: what is counted is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for case in json.loads(done.stdout):
        assert 0.3 * case["needed"] < case["measured"] < 1.1 * case["needed"], case
