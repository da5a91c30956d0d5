"""Models below URLs as copies on this machine: whole, of one version, and no byte twice."""

from __future__ import annotations

import json

import fsspec
import numpy as np
import pytest
import torch
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import run
from support.hub_server import HubServer
from support.memory import in_fsspecs_memory

import spectra
from spectra.errors import NotFoundError, SourceError
from spectra.files import copies, hub, patience

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("SPECTRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(patience, "PATIENCE", 1.0)
    monkeypatch.setattr(patience, "answered", set())
    with HubServer() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def serve(server, folder):
    """The URL below which the files of a folder are."""
    for file in folder.rglob("*"):
        if file.is_file():
            server.plain[f"/{folder.name}/{file.relative_to(folder)}"] = file.read_bytes()
    return f"{server.cdn}/{folder.name}"


def same_files(copied, folder):
    found = {str(file.relative_to(copied)): file.read_bytes() for file in copied.rglob("*") if file.is_file()}
    assert found == {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def copied(url):
    return copies.Path(hub.resolve(url, fetch=True).path)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_copied_once(server, tmp_path, shards):
    url = serve(server, write_checkpoint(tmp_path / "model", llama_tensors(), shards=shards))
    folder = copied(url)
    same_files(folder, tmp_path / "model")
    before = [seen for seen in server.seen if seen.sent > 1 and seen.path.endswith(".safetensors")]
    assert copied(url) == folder
    assert [seen for seen in server.seen if seen.sent > 1 and seen.path.endswith(".safetensors")] == before


def test_the_command_reads_the_copies(server, tmp_path):
    base = serve(server, write_checkpoint(tmp_path / "base", llama_tensors(), shards=2))
    tuned = serve(server, write_checkpoint(tmp_path / "tuned", nudged(llama_tensors()), shards=2))
    options = ("--layer", "layers.1.self_attn.v_proj", "--download", "--out", tmp_path / "out", "--no-figures")
    _, said = run("svd", tuned, "--base", base, *options)
    assert "missing" not in said
    chosen = spectra.open_source(tmp_path / "tuned", tmp_path / "base").select("layers.1.self_attn.v_proj")
    shards = {f"{ref.file.parent.name}/{ref.file.name}" for delta in chosen for ref in delta.refs}
    copied = {
        f"{file.parent.name.rpartition('-')[0]}/{file.name}" for file in (tmp_path / "cache").rglob("*.safetensors")
    }
    assert copied == shards, "the shards of the chosen matrices and no others"
    inputs = json.loads((tmp_path / "out" / "run.json").read_text())["inputs"]
    assert inputs["tuned"].startswith(str(tmp_path / "cache" / "models" / "tuned-"))
    for spectrum in spectra.decompose(chosen):
        np.testing.assert_array_equal(spectra.load(tmp_path / "out")[spectrum.name].S, spectrum.S)


@pytest.mark.parametrize("alone", [True, False])
def test_a_torch_file_can_be_read_once_it_is_here(server, tmp_path, alone):
    (tmp_path / "bin").mkdir()
    torch.save(llama_tensors(), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_text('{"model_type": "llama"}')
    url = serve(server, tmp_path / "bin") + ("/pytorch_model.bin" if alone else "")
    with pytest.raises(SourceError, match="no part can be read alone: download the model"):
        spectra.inspect(url)
    read = spectra.inspect(hub.resolve(url, fetch=True)).folder
    assert read.tensors.keys() == llama_tensors().keys()
    assert read.config == {"model_type": "llama"}


def test_what_was_broken_off_goes_on_where_it_stopped(server, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "_CHUNK", 1000)
    url = serve(server, write_checkpoint(tmp_path / "model", llama_tensors()))
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    server.faults.append(
        lambda handler, seen: (
            seen.range is not None
            and seen.path.endswith("model.safetensors")
            and int(seen.range.removeprefix("bytes=").partition("-")[0]) >= 3000
            and not handler.say(404)
        )
    )
    with pytest.raises(SourceError):
        copied(url)
    server.faults.clear()
    same_files(copied(url), tmp_path / "model")
    whole = sum(seen.sent for seen in server.requests("model.safetensors") if seen.range != "bytes=0-0")
    assert whole == size


def test_another_version_is_another_copy(server, tmp_path):
    url = serve(server, write_checkpoint(tmp_path / "model", llama_tensors()))
    first = copied(url)
    write_checkpoint(tmp_path / "model", nudged(llama_tensors()))
    serve(server, tmp_path / "model")
    second = copied(url)
    assert first != second
    same_files(second, tmp_path / "model")


def test_a_pipeline_is_copied_with_its_components(server, tmp_path):
    folder = tmp_path / "pipe"
    for name in ("unet", "vae"):
        write_checkpoint(folder / name, {f"{name}.weight": torch.randn(4, 4)})
        (folder / name / "model.safetensors").rename(folder / name / "diffusion_pytorch_model.safetensors")
    index = {"_class_name": "P", "unet": ["d", "U"], "vae": ["d", "V"], "scheduler": ["d", "S"], "../up": ["d", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    same_files(copied(serve(server, folder)), folder)


def test_what_fsspec_opens_is_copied_too(server, tmp_path):
    write_checkpoint(tmp_path / "model", llama_tensors(), shards=2)
    place = in_fsspecs_memory(tmp_path / "model")
    fsspec.filesystem("memory").pipe_file(f"{place.path}/pytorch_model.bin", b"the same once more")
    same_files(copied(str(place)), tmp_path / "model")


def test_an_adapter_by_the_url_of_its_file_keeps_its_config(server, tmp_path):
    from support.command_line import lora_folder

    folder = lora_folder(tmp_path / "lora", seed=1)
    file = next(folder.glob("*.safetensors")).name
    found = spectra.open_source(hub.resolve(f"{serve(server, folder)}/{file}", fetch=True))
    assert [delta.max_rank for delta in found] == [4, 4]


def test_where_there_are_no_weights_nothing_is_copied(server, tmp_path):
    server.plain["/empty/config.json"] = b"{}"
    for url in (f"{server.cdn}/empty", f"{server.cdn}/nothing"):
        with pytest.raises(NotFoundError):
            copied(url)
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_written_is_one_sentence(server, tmp_path):
    url = serve(server, write_checkpoint(tmp_path / "model", llama_tensors()))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SourceError, match="cannot be copied to"):
        copied(url)
