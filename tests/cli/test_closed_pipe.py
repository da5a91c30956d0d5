"""A reader of stdout that goes away, such as `head`: what --out keeps is there all the same."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import lora_folder

COMMANDS = {
    "svd": ("svd", "tuned", "--base", "base"),
    "alignment": ("alignment", "tuned", "--base", "base", "--layer", "v_proj"),
    "intruders": ("alignment", "tuned", "--base", "base", "--layer", "v_proj", "--intruders-only"),
    "interference": ("interference", "a", "b"),
    "verify": ("verify", "--base", "base", "--adapter", "a", "--merged", "tuned"),
    "similarity": ("similarity", "a", "b", "--top", "2"),
    "pairs": ("similarity", "a", "b", "d", "--top", "2"),
    "series": ("series", "a", "b", "--step", "1", "--step", "2"),
    "extract": ("extract", "a", "--rank", "2"),
}
KEPT = {
    "svd": "summary.csv",
    "pairs": "pairs.csv",
    "similarity": "similarity.csv",
    "extract": "adapter_model.safetensors",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = llama_tensors()
    write_checkpoint(folder / "base", base)
    write_checkpoint(folder / "tuned", nudged(base))
    for seed, name in enumerate("abd"):
        lora_folder(folder / name, seed=seed)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_kept_is_kept(name, folder):
    reading, writing = os.pipe()
    os.close(reading)
    words = [*COMMANDS[name], "--out", f"kept-{name}", *([] if name == "extract" else ["--no-figures"])]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "spectra", *words], cwd=folder, stdout=writing, stderr=subprocess.PIPE, text=True,
            timeout=120, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert "Traceback" not in done.stderr
    file = folder / f"kept-{name}" / KEPT.get(name, f"{name}.csv")
    assert file.stat().st_size > 0, done.stderr
    if name not in KEPT and name != "series":
        assert json.loads(file.with_suffix(".json").read_text())["matrices"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_one_that_leads_nowhere(closed, folder):
    words = shlex.join([sys.executable, "-m", "spectra", *COMMANDS["svd"]])
    done = subprocess.run(["bash", "-c", f"{words} {closed}"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert bool(done.stdout) == (closed == "2>&-")
