"""Models on a server: which bytes are read, and how they come."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import lora_folder, run
from support.remote_models import SHARDS, TOKEN, assert_right, data_of, larger, remotely, write_adapter_of

import spectra
from spectra.files import far, http, lanes, ranges


def test_bytes_read_are_headers_and_chosen_tensors(server, tmp_path):
    assert_right(remotely(), tmp_path)
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in tmp_path.glob("*/*.safetensors"))
    chosen = sum(
        ref.nbytes for delta in spectra.open_source(tmp_path / "tuned", tmp_path / "base").select("v_proj")
        for ref in delta.refs
    )  # fmt: skip
    sent = sum(seen.sent for seen in server.seen if seen.server == "cdn")
    assert headers + chosen <= sent <= 1.02 * (headers + chosen)
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*.safetensors")) > 15 * chosen


def test_opening_reads_headers_only_and_asks_each_shard_twice(server):
    spectra.open_source("org/tuned", "org/base")
    per_shard = [seen for seen in server.seen if seen.server == "cdn"]
    assert len(per_shard) == 2 * 2 * SHARDS
    assert sum(seen.sent for seen in per_shard) < 5000
    assert len(server.requests(".index.json")) == 2, "an index is read once"


def test_large_tensors_come_in_pieces_side_by_side(server, tmp_path, monkeypatch):
    monkeypatch.setattr(lanes, "PIECE", 1000)
    assert_right(remotely(), tmp_path)


def test_a_recipe_is_read_by_another_process(server, tmp_path):
    delta = spectra.open_source("org/tuned", "org/base").select("v_proj").deltas[0]
    (tmp_path / "recipe").write_bytes(pickle.dumps(delta))
    assert TOKEN.encode() not in (tmp_path / "recipe").read_bytes()
    code = (
        "import pickle, sys; delta = pickle.load(open(sys.argv[1], 'rb')); "
        "print(repr(delta.read().to_dense().sum().item()))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "recipe"], env=environment, capture_output=True, text=True
    )
    assert float(result.stdout) == delta.read().to_dense().sum().item(), result.stderr


def test_a_file_in_the_local_cache_is_not_asked_for(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for repo in ("base", "tuned"):
        commit = server.models[f"org/{repo}"].branches["main"]
        snapshot = tmp_path / "cache" / f"models--org--{repo}" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in (tmp_path / repo).glob("model-0000[12]*"):
            (snapshot / file.name).write_bytes(file.read_bytes())
    assert_right(remotely(), tmp_path)
    asked = {seen.path.partition("?")[0].rpartition("/")[2] for seen in server.seen if seen.server == "cdn"}
    assert asked == {"model-00003-of-00003.safetensors"}


def test_the_factors_of_an_adapter_come_in_one_request(server, tmp_path):
    lora_folder(tmp_path / "lora", seed=1)
    server.add("org/lora", tmp_path / "lora")
    source = spectra.open_source("org/lora")
    start = len(server.seen)
    found = {spectrum.name: spectrum.S for spectrum in spectra.decompose(source)}
    assert len(server.seen) == start + 1
    for spectrum in spectra.decompose(spectra.open_source(tmp_path / "lora")):
        np.testing.assert_array_equal(found[spectrum.name], spectrum.S)
    assert not far._ahead


def test_a_gguf_file_is_read_by_ranges(server, tmp_path):
    gguf = pytest.importorskip("gguf")
    (tmp_path / "gguf").mkdir()
    writer = gguf.GGUFWriter(tmp_path / "gguf" / "model.gguf", "llama")
    tensors = {f"blk.{i}.attn_v.weight": np.full((1024, 1024), i + 1, np.float32) for i in range(6)}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    server.add("org/gguf", tmp_path / "gguf")
    ref = spectra.inspect("org/gguf").folder.tensors["model.layers.3.self_attn.v_proj.weight"]
    assert torch.equal(ref.read(), torch.full((1024, 1024), 4.0))
    assert sum(seen.sent for seen in server.seen if seen.server == "cdn") < 5.1 * 2**20


def test_a_gguf_file_is_read_by_its_url(server, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for i in range(4):
        writer.add_tensor(f"blk.{i}.attn_v.weight", np.full((512, 512), i + 1, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    server.plain["/model.gguf"] = (tmp_path / "model.gguf").read_bytes()
    folder = spectra.inspect(f"{server.cdn}/model.gguf").folder
    before = http.received()
    assert torch.equal(folder.tensors["model.layers.2.self_attn.v_proj.weight"].read(), torch.full((512, 512), 3.0))
    assert http.received() - before == 2**20


def test_inspect_tells_what_a_command_reads(server):
    said = spectra.inspect("org/tuned", "org/base")
    assert said.to_read["v_proj"] == 2 * 2 * 4 * (4 * 8) * (4 * 16)
    start = len(server.seen)
    remotely("v_proj")
    sent = sum(seen.sent for seen in server.seen[start:] if seen.server == "cdn" and seen.sent > 1000)
    assert sent == said.to_read["v_proj"]
    printed, _ = run("inspect", "org/tuned", "--base", "org/base")
    assert "from the server: " in printed
    assert "v_proj 32.0 KiB" in printed


def test_inspect_counts_what_roles_share_once_and_not_what_the_cache_has(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    base = {f"transformer.h.{i}.attn.c_attn.weight": torch.randn(64, 192) for i in range(2)}
    config = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2}
    for name, tensors in {"gpt": base, "gpt-tuned": nudged(base)}.items():
        write_checkpoint(tmp_path / name, tensors, config=config)
        server.add(f"org/{name}", tmp_path / name)
    said, one = spectra.inspect("org/gpt-tuned", "org/gpt"), 2 * 64 * 192 * 4
    before = http.received()
    assert len([*spectra.decompose(said.source)]) == 6
    assert http.received() - before == said.all_from_server == 2 * one
    snapshot = tmp_path / "cache" / "models--org--gpt" / "snapshots" / server.models["org/gpt"].branches["main"]
    shutil.copytree(tmp_path / "gpt", snapshot)
    assert said.all_from_server == one
    assert set(said.from_server.values()) == {one}


READ_ONCE = {
    "svd": ("svd", "org/tuned", "--base", "org/base"),
    "similarity": ("similarity", "org/tuned", "org/other", "--base", "org/base"),
    "alignment": ("alignment", "org/tuned", "--base", "org/base"),
    "interference": ("interference", "org/tuned", "org/other", "--base", "org/base"),
    "extract": ("extract", "org/tuned", "--base", "org/base", "--rank", "2", "--out", "{tmp_path}/lora"),
}


@pytest.mark.parametrize("name", READ_ONCE)
def test_a_command_reads_every_byte_once(server, tmp_path, name):
    write_checkpoint(tmp_path / "other", nudged(larger(llama_tensors()), seed=3), shards=SHARDS)
    server.add("org/other", tmp_path / "other")
    run(*(word.format(tmp_path=tmp_path) for word in READ_ONCE[name]), "--layer", "v_proj")
    asked = [(seen.path, *map(int, seen.range.removeprefix("bytes=").split("-"))) for seen in server.seen
              if seen.server == "cdn" and seen.range != "bytes=0-0"]  # fmt: skip
    data = sorted(item for item in asked if item[2] - item[1] > 2000)
    assert len(data) == 2 * (3 if "other" in str(READ_ONCE[name]) else 2)
    for first, second in pairwise(data):
        assert first[0] != second[0] or first[2] < second[1]
    assert list(ranges.folder().iterdir()) == [], "nothing is left on the disk"


HEADERS_ONCE = {
    **READ_ONCE,
    "verify": ("verify", "--base", "org/base", "--adapter", "org/adapter", "--merged", "org/tuned"),
    "series": ("series", "org/tuned", "org/other", "--step", "1", "--step", "2", "--base", "org/base"),
}


@pytest.mark.parametrize("where", ["hub", "web"])
@pytest.mark.parametrize("name", HEADERS_ONCE)
def test_a_command_reads_every_header_once(server, tmp_path, name, where):
    write_checkpoint(tmp_path / "other", nudged(larger(llama_tensors()), seed=3), shards=SHARDS)
    write_adapter_of(tmp_path / "adapter", tmp_path / "base")
    for folder in ("base", "tuned", "other", "adapter"):
        server.add(f"org/{folder}", tmp_path / folder)
        server.plain |= {f"/w/{folder}/{file.name}": file.read_bytes() for file in (tmp_path / folder).iterdir()}
    words = [word.format(tmp_path=tmp_path) for word in HEADERS_ONCE[name]]
    words = [word.replace("org/", f"{server.cdn}/w/") for word in words] if where == "web" else words
    run(*words, "--layer", "layers.0.self_attn.v_proj", status=1 if name == "verify" else 0)
    starts = Counter(seen.path for seen in server.seen if seen.server == "cdn" and seen.range == "bytes=0-7")
    assert len([path for path in starts if path.partition("?")[0].endswith(".safetensors")]) >= 2 * SHARDS
    assert set(starts.values()) == {1}


def test_a_series_reads_the_base_once(server, tmp_path):
    paths = []
    for step in (100, 200, 300):
        write_checkpoint(tmp_path / f"checkpoint-{step}", nudged(larger(llama_tensors()), seed=step), shards=SHARDS)
        server.add(f"org/checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        paths.append(f"org/checkpoint-{step}")
    rows = spectra.series(paths, "org/base", layers="v_proj", top=2, out=tmp_path / "out")
    sent, asked = data_of(server, "org/base")
    assert sent == 2 * 4 * (4 * 8) * (4 * 16)
    assert len(asked) == 2
    assert all(len(data_of(server, path)[1]) == 2 for path in paths)
    assert list(ranges.folder().iterdir()) == [], "nothing is left on the disk"
    local = spectra.series([tmp_path / path.removeprefix("org/") for path in paths], tmp_path / "base",
                           layers="v_proj", top=2, out=tmp_path / "local")  # fmt: skip
    np.testing.assert_array_equal(rows["norm"], local["norm"])
    np.testing.assert_array_equal(rows["phi_to_last"], local["phi_to_last"])


def test_the_base_that_rounding_is_replayed_on_is_not_read_again(server):
    form = spectra.open_source("org/tuned", "org/base").select("v_proj").deltas[0].read()
    start = len(server.seen)
    noise = next(noise for noise in form.noise if noise.grid)
    assert form.rounded(noise, torch.zeros(form.shape, dtype=torch.float64)).isfinite().all()
    assert len(server.seen) == start


def test_while_a_matrix_is_at_work_its_base_waits_on_the_disk_and_not_in_memory(server, tmp_path):
    write_checkpoint(tmp_path / "wide", {"layers.0.v_proj.weight": torch.randn(300, 300)})
    write_checkpoint(tmp_path / "wider", {"layers.0.v_proj.weight": torch.randn(300, 300)})
    for name in ("wide", "wider"):
        server.add(f"org/{name}", tmp_path / name)
    (delta,) = spectra.open_source("org/wider", "org/wide")
    assert delta.read().rounded.keywords["base"] is not None, "read by itself it is held, not asked for again"
    with far.expected([delta.refs]):
        form = delta.read()
        start = len(server.seen)
        assert form.rounded.keywords["base"] is None
        noise = next(noise for noise in form.noise if noise.grid)
        again = form.rounded(noise, torch.zeros(form.shape, dtype=torch.float64))
        assert len(server.seen) == start
        far.done(delta.refs)
        assert list(ranges.folder().iterdir()) == []
    (local,) = spectra.open_source(tmp_path / "wider", tmp_path / "wide")
    assert torch.equal(again, local.read().rounded(noise, torch.zeros(form.shape, dtype=torch.float64)))


def test_the_parts_of_a_fused_weight_that_are_columns_come_in_one_reading(server, tmp_path):
    base = {f"transformer.h.{i}.attn.c_attn.weight": torch.randn(64, 192) for i in range(2)}
    config = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2}
    write_checkpoint(tmp_path / "gpt", base, config=config)
    write_checkpoint(tmp_path / "gpt-tuned", nudged(base), config=config)
    for name in ("gpt", "gpt-tuned"):
        server.add(f"org/{name}", tmp_path / name)
    source = spectra.open_source("org/gpt-tuned", "org/gpt")
    assert len(source) == 6
    before = http.received()
    found = {spectrum.name: spectrum.S for spectrum in spectra.decompose(source)}
    assert http.received() - before == 2 * 2 * 64 * 192 * 4
    for spectrum in spectra.decompose(spectra.open_source(tmp_path / "gpt-tuned", tmp_path / "gpt")):
        np.testing.assert_array_equal(found[spectrum.name], spectrum.S)
