"""Models on the test server, their copies on the disk, and what is sent of them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import torch
from safetensors.torch import load_file

import spectra
from support.checkpoints import write_adapter
from support.hub_server import md5

TOKEN = "hf_thesecretofthistest"


SHARDS = 3


ONE = "layers.0.self_attn.v_proj"


def larger(tensors):
    """The same model with matrices of 4 KiB and more, beside which headers are small."""
    return {name: tensor.repeat(*[4] * tensor.ndim) for name, tensor in tensors.items()}


def on_disk(tmp_path, pattern="v_proj"):
    source = spectra.open_source(tmp_path / "tuned", tmp_path / "base").select(pattern)
    return {spectrum.name: spectrum.S for spectrum in spectra.decompose(source)}


def remotely(pattern="v_proj", **options):
    source = spectra.open_source("org/tuned", "org/base").select(pattern)
    return {spectrum.name: spectrum for spectrum in spectra.decompose(source, **options)}


def assert_right(found, tmp_path):
    expected = on_disk(tmp_path)
    assert found.keys() == expected.keys()
    for name, spectrum in found.items():
        assert spectrum.status == "ok", spectrum.reason
        np.testing.assert_array_equal(spectrum.S, expected[name])


def serve_plainly(server, tmp_path, name="plain"):
    for folder in ("base", "tuned"):
        for file in (tmp_path / folder).iterdir():
            server.plain[f"/{name}/{folder}/{file.name}"] = file.read_bytes()


def data_of(server, repo, start=0):
    """Bytes of matrices that were sent of a model, and the ranges."""
    seen = [seen for seen in server.seen[start:] if seen.server == "cdn" and f"/{repo}/" in seen.path]
    asked = [(one.path.partition("?")[0], one.range) for one in seen if one.sent > 2000]
    return sum(one.sent for one in seen if one.sent > 2000), asked


def times(count, act, on="cdn"):
    """A fault that happens to so many of the requests for ranges of data."""
    left = [count]

    def fault(handler, seen):
        if seen.server != on or not left[0] or "safetensors" not in seen.path or "index" in seen.path:
            return False
        left[0] -= 1
        return act(handler, seen) is not False

    return fault


def body_of(handler):
    owner, name, commit, file = handler.path.partition("?")[0].removeprefix("/blobs/").split("/", 3)
    return handler.server.hub.models[f"{owner}/{name}"].commits[commit][file]


def tag_of(handler):
    return md5(body_of(handler))


def write_adapter_of(folder, base):
    """A LoRA of one matrix of the base."""
    (shard,) = (
        file for file in base.glob("*.safetensors") if "model.layers.0.self_attn.v_proj.weight" in load_file(file)
    )
    rows, columns = load_file(shard)["model.layers.0.self_attn.v_proj.weight"].shape
    name = "base_model.model.model.layers.0.self_attn.v_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, columns), f"{name}.lora_B.weight": torch.ones(rows, 2)}
    return write_adapter(folder, tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["v_proj"]})


def downloaded(tmp_path, *words, status=0, offline=False, streams=False):
    """stdout, or that and stderr, of a command in a process of its own: the client looks at the environment once."""
    environment = {**os.environ, "HF_HUB_OFFLINE": f"{offline:d}", "HF_HUB_DISABLE_XET": "1"}
    environment |= {
        "HF_HUB_CACHE": f"{tmp_path}/hub",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "SPECTRA_CACHE": f"{tmp_path}/ours",
    }
    command = [sys.executable, "-c", "from spectra.cli import main; main()", *words, "--download"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout + done.stderr if streams else done.stdout
