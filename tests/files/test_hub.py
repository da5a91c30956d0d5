"""From what the user typed to a path: every route, and what is said when none leads anywhere."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import types

import pytest
import torch
from click.testing import CliRunner
from support.checkpoints import llama_tensors, nudged, write_adapter, write_checkpoint

import spectra
from spectra.cli import main
from spectra.errors import NotFoundError, SourceError
from spectra.files import hub
from spectra.files.storage import Place


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache as huggingface_hub lays it out: snapshots of links to blobs."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(repo, commit, tensors, ref="main", **options):
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        plain = write_checkpoint(tmp_path / "plain" / commit, tensors, **options)
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (folder / "blobs").mkdir(exist_ok=True)
        for file in plain.iterdir():
            blob = folder / "blobs" / f"{commit}{file.name}"
            blob.write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
        return snapshot

    return add


def test_a_path_is_itself(tmp_path):
    assert hub.resolve(tmp_path) == Place.of(tmp_path)


def test_a_hub_id_is_found_in_the_cache_through_its_links(cache):
    base = llama_tensors()
    main = cache("org/base", "a" * 40, base)
    old = cache("org/base", "b" * 40, nudged(base), ref="v1.0")
    assert hub.resolve("org/base") == Place.of(main)
    assert hub.resolve("org/base@v1.0") == Place.of(old)
    assert hub.resolve(f"org/base@{'b' * 40}") == Place.of(old)
    assert hub.resolve("org/base@bbbbbbbb") == Place.of(old)
    source = spectra.open_source("org/base@v1.0", "org/base")
    difference = nudged(base)["lm_head.weight"].double() - base["lm_head.weight"].double()
    assert torch.equal(source["lm_head.weight"].read().to_dense(), difference)


def test_the_built_in_aliases_name_the_llama_family(cache):
    assert hub.resolve_alias("LLaMA-7B") == "huggyllama/llama-7b"
    snapshot = cache("huggyllama/llama-7b", "c" * 40, llama_tensors())
    assert hub.resolve("llama-7b") == Place.of(snapshot)


def test_the_models_folder(tmp_path, monkeypatch):
    (tmp_path / "llama-7b").mkdir()
    monkeypatch.setenv("SPECTRA_MODELS", str(tmp_path))
    assert hub.resolve("llama-7b") == Place.of(tmp_path / "llama-7b")


def test_the_users_aliases_come_before_the_built_in_ones(tmp_path, monkeypatch, cache):
    config = tmp_path / "config.toml"
    monkeypatch.setenv("SPECTRA_CONFIG", str(config))
    (tmp_path / "mine").mkdir()
    config.write_text(f'[aliases]\nllama-7b = "{tmp_path / "mine"}"\nother = "org/base@v2"\n')
    assert hub.resolve("llama-7b") == Place.of(tmp_path / "mine")
    snapshot = cache("org/base", "d" * 40, llama_tensors(), ref="v2")
    assert hub.resolve("other") == Place.of(snapshot)
    config.write_text("[aliases]\nllama-7b = 3\n")
    with pytest.raises(SourceError, match=r"config\.toml: \[aliases\]"):
        hub.resolve("llama-7b")
    config.write_text("[[[")
    with pytest.raises(SourceError, match="not readable TOML"):
        hub.resolve("llama-7b")


def test_not_found_lists_what_was_tried():
    with pytest.raises(NotFoundError) as caught:
        hub.resolve("llama-7b")
    for part in ("the path llama-7b", "config.toml", "$SPECTRA_MODELS", "huggyllama/llama-7b", "hub cache", "OFFLINE"):
        assert part in str(caught.value)
    with pytest.raises(NotFoundError, match=r"'no-such-thing' was not found. Tried: the path"):
        hub.resolve("no-such-thing")


def fake_hub(files, folder):
    """A stand-in for huggingface_hub, which no test can reach."""
    module = types.ModuleType("huggingface_hub")
    module.calls = []
    siblings = [types.SimpleNamespace(rfilename=file) for file in files]
    module.model_info = lambda repo, **_: types.SimpleNamespace(siblings=siblings)
    module.HfApi = lambda endpoint: types.SimpleNamespace(model_info=lambda *args, **kw: module.model_info(*args, **kw))
    module.snapshot_download = lambda repo, **options: module.calls.append((repo, options)) or str(folder)
    module.constants = types.SimpleNamespace(ENDPOINT="https://hub.example")
    module.get_session = lambda: None
    utils = types.ModuleType("huggingface_hub.utils")
    utils.build_hf_headers = lambda **_: {}
    errors = types.ModuleType("huggingface_hub.errors")
    errors.HfHubHTTPError = type("HfHubHTTPError", (Exception,), {})
    errors.RepositoryNotFoundError = type("RepositoryNotFoundError", (errors.HfHubHTTPError,), {})
    module.errors = errors
    return {"huggingface_hub": module, "huggingface_hub.errors": errors, "huggingface_hub.utils": utils}


@pytest.mark.parametrize(
    ("files", "patterns"),
    [
        (["model.safetensors", "pytorch_model.bin", "modeling.py"], ["*.safetensors", "*.json"]),
        (["pytorch_model.bin"], ["*.safetensors", "*.json", "*.bin"]),
    ],
)
def test_a_download_takes_weights_and_json_only(monkeypatch, tmp_path, files, patterns):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    modules = fake_hub(files, tmp_path)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert hub.resolve("org/base@v1", fetch=True) == Place.of(tmp_path)
    assert modules["huggingface_hub"].calls == [
        ("org/base", {"revision": "v1", "allow_patterns": patterns, "etag_timeout": 5.0})
    ]


def test_a_failed_download_is_one_message(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    modules = fake_hub([], tmp_path)
    errors = modules["huggingface_hub.errors"]

    def refuse(repo, **_):
        raise {"org/base": errors.HfHubHTTPError, "org/gone": errors.RepositoryNotFoundError}[repo](
            "404 Client Error\nmore lines"
        )

    modules["huggingface_hub"].model_info = refuse
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(NotFoundError, match=r"a download of org/base \(404 Client Error\)$"):
        hub.resolve("org/base", fetch=True)
    with pytest.raises(NotFoundError, match=r"a download of org/gone \(the hub has no such model, or it is private"):
        hub.resolve("org/gone", fetch=True)


ASK = """
import sys, time
from spectra.errors import NotFoundError
from spectra.files import hub
start = time.monotonic()
try:
    hub.resolve(sys.argv[1])
except NotFoundError as problem:
    print(problem)
assert time.monotonic() - start < 15, "the client's own retries take 23 s"
"""


def ask(name, endpoint, cwd):
    """What the real client ends in, in a process of its own, since it reads its environment when it is imported."""
    pytest.importorskip("huggingface_hub")
    settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HUB_ETAG_TIMEOUT": "1", "NO_PROXY": "*"}
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", ASK, name], env=environment, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


@pytest.fixture
def silent():
    """The port of a server that takes connections and says nothing, and one where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as there, socket.create_server(("127.0.0.1", 0)) as closing:
        closed = closing.getsockname()[1]
        closing.close()
        yield there.getsockname()[1], closed


def test_an_unreachable_hub_is_one_message_at_once(silent, tmp_path):
    port, closed = silent
    said = ask("llama-7b", f"http://127.0.0.1:{closed}", tmp_path)
    assert said.startswith("'llama-7b' was not found. Tried: the path llama-7b;")
    assert f"huggyllama/llama-7b on the hub (http://127.0.0.1:{closed} cannot be reached: " in said
    assert "gave no answer within 1 s" in ask("org/name", f"http://127.0.0.1:{port}", tmp_path)
    assert "org/name on the hub ($HF_ENDPOINT is no address of a server" in ask("org/name", "nonsense", tmp_path)


def test_what_looks_like_a_path_is_never_asked_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    modules = fake_hub(["model.safetensors"], tmp_path)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "step-100").mkdir(parents=True)
    (tmp_path / "file.pt").write_bytes(b"")
    for name, said in {
        "runs/step-10": r"runs is there and holds no step-10; did you mean runs/step-100\?",
        "./nothere": "./nothere is written as a path",
        "../nothere": "is written as a path",
        "runs/step-100/deep": "runs/step-100 is there and holds no deep",
        "a/b/c": "the path a/b/c",
        "/nothere/model": "/ is there and holds no nothere",
        "~/nothere": "the path /",
        "~nobody-of-this-name/x": "the path ~nobody",
        "runs\\step-100": "the path",
        "file.pt/x": "file.pt is a file",
        "run": r"did you mean runs\?",
        "x" * 5000: "the path x",
        "": "an empty name",
    }.items():
        with pytest.raises(NotFoundError, match=said):
            hub.resolve(name)
    assert modules["huggingface_hub"].calls == []
    assert hub.resolve("runs/step-10@main", fetch=True) == Place.of(tmp_path), "a revision says that it is the hub's"


@pytest.mark.parametrize(
    ("written", "path"),
    [("./nothere", "nothere"), ("../nothere", "../nothere"), ("/nothere", "/nothere"), ("/no/where/at/all", None),
     ("~/nothere", None), (".hidden/model", None), ("~nobody-of-this-name/x", None)],
)  # fmt: skip
def test_the_message_lists_no_place_that_was_not_looked_at(written, path, monkeypatch, tmp_path):
    """Of what is written as a path only the path; an alias that leads to one is no name for the hub, either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECTRA_MODELS", str(tmp_path))
    monkeypatch.setattr(hub, "_from_hub", lambda *_, **__: pytest.fail("looked for in the hub's cache"))
    with pytest.raises(NotFoundError) as caught:
        hub.resolve(written)
    said = str(caught.value)
    assert said.startswith(f"{written!r} was not found. Tried: the path {path or os.path.expanduser(written)}")
    assert said.endswith(f"; nothing else, since {written} is written as a path")
    assert not any(word in said for word in ("hub cache", "SPECTRA_MODELS", "aliases", "config.toml"))
    monkeypatch.setenv("SPECTRA_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text(f'[aliases]\nmine = "{written}"\n')
    with pytest.raises(NotFoundError) as caught:
        hub.resolve("mine")
    tried = [f"its alias {written}", f"nothing else, since {written} is written as a path"]
    assert str(caught.value).split("; ")[-2:] == tried


def test_three_parts_are_looked_for_where_a_name_is_and_not_in_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        hub.resolve("a/b/c")
    assert str(caught.value).count(";") == 2
    for part in ("the path a/b/c; aliases in ", "; $SPECTRA_MODELS (not set)"):
        assert part in str(caught.value)


@pytest.mark.parametrize("place", ["tuned", "base"])
@pytest.mark.parametrize(
    "command",
    ["svd --base BASE --tuned TUNED", "inspect TUNED --base BASE", "similarity TUNED tuned --base BASE",
     "verify --base BASE --adapter TUNED --merged tuned", "extract --base BASE --tuned TUNED --rank 2 --out out",
     "alignment --base BASE --tuned TUNED", "interference TUNED tuned --base BASE", "series --base BASE --step 1 TUNED",
     "heads TUNED --base BASE"],
)  # fmt: skip
def test_every_command_says_it(command, place, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_from_hub", lambda *_, **__: pytest.fail("looked for in the hub's cache"))
    given = {"BASE": "./base", "TUNED": "./tuned"} | {place.upper(): "./nothere"}
    shown = CliRunner().invoke(main, [given.get(word, word) for word in command.split()])
    assert shown.exit_code == 1, shown.output
    assert "'./nothere' was not found. Tried: the path nothere; nothing else, since ./nothere is" in shown.stderr
    assert "Traceback" not in shown.output


def test_without_huggingface_hub_the_install_command_is_given(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(NotFoundError, match=r"weight-spectra\[hub\]"):
        hub.resolve("org/base")


# -- snapshots that lack something


def partial(cache, *, keep, shards=1):
    """A snapshot of which only some files came."""
    snapshot = cache("org/base", "a" * 40, llama_tensors(), shards=shards)
    for link in snapshot.iterdir():
        if not keep(link.name):
            link.unlink()
    return snapshot


def test_a_snapshot_of_configs_leads_to_the_download(cache):
    snapshot = partial(cache, keep=lambda name: name == "config.json")
    for path in ("org/base", snapshot):
        with pytest.raises(NotFoundError, match=r"hub cache of org/base, and no weights.*`hf download org/base`"):
            spectra.open_source(path)


@pytest.mark.parametrize("offline", [True, False])
def test_a_snapshot_without_weights_is_downloaded(cache, monkeypatch, tmp_path, offline):
    snapshot = partial(cache, keep=lambda name: name == "config.json")
    whole = write_checkpoint(tmp_path / "whole", llama_tensors())
    modules = fake_hub(["model.safetensors"], whole)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    if not offline:
        monkeypatch.delenv("HF_HUB_OFFLINE")
    assert hub.resolve("org/base", fetch=True) == Place.of(snapshot if offline else whole)
    assert len(modules["huggingface_hub"].calls) == (not offline)


def test_a_download_that_fails_says_what_the_cache_lacks(cache, monkeypatch):
    partial(cache, shards=3, keep=lambda name: "00002" not in name)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    modules = fake_hub([], "unused")

    def refuse(repo, **_):
        raise modules["huggingface_hub.errors"].HfHubHTTPError("401 Client Error")

    modules["huggingface_hub"].model_info = refuse
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(NotFoundError, match=r"without model-00002-of-00003\.safetensors\).*401 Client Error"):
        hub.resolve("org/base")


def test_a_lost_shard_costs_its_own_tensors(cache):
    partial(cache, shards=3, keep=lambda name: "00002" not in name)
    source = spectra.open_source("org/base", cache("org/whole", "b" * 40, llama_tensors()))
    assert {delta.status for delta in source} == {"ok", "unreadable"}
    assert all("00002-of-00003.safetensors is missing" in delta.reason for delta in source if delta.status != "ok")


def test_the_index_of_a_format_that_was_not_downloaded_is_no_loss(cache, monkeypatch):
    snapshot = cache("org/base", "a" * 40, llama_tensors(), shards=2)
    (snapshot / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a.weight": "pytorch_model-1-of-1.bin"}}')
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert hub.resolve("org/base") == Place.of(snapshot)


@pytest.mark.parametrize("shards", [1, 2])
def test_an_interrupted_download_is_said(cache, shards):
    snapshot = cache("org/base", "a" * 40, llama_tensors(), shards=shards)
    for link in snapshot.glob("*.safetensors"):
        blob = link.resolve()
        blob.rename(f"{blob}.5e0a.incomplete")
    for path in ("org/base", snapshot):
        with pytest.raises(NotFoundError) as caught:
            spectra.open_source(path)
        assert f"{shards} of its downloads did not end (.incomplete)" in str(caught.value)
        assert ".safetensors leads to a file that is not there" in str(caught.value) or shards == 2
        assert "`hf download org/base`" in str(caught.value)


def test_the_cache_of_a_repository_leads_to_its_snapshots(cache):
    snapshot = cache("org/base", "a" * 40, llama_tensors())
    for folder in (snapshot.parent, snapshot.parent.parent):
        with pytest.raises(NotFoundError, match="hub cache of org/base: pass org/base, or the path of one of its"):
            spectra.open_source(folder)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_config_that_is_a_link_to_nothing_is_not_called_absent(tmp_path, name):
    tensors = {f"base_model.model.a.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    folder = write_adapter(tmp_path, tensors, None)
    (folder / name).symlink_to("../blobs/gone")
    with pytest.raises(SourceError, match=rf"{name} is a link to a file that is not there"):
        spectra.open_source(folder)


def test_weights_that_are_a_link_to_nothing(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(NotFoundError, match=r"model\.safetensors leads to a file that is not there"):
        spectra.open_source(tmp_path)
    with pytest.raises(NotFoundError, match=r"model\.safetensors"):
        spectra.open_source(tmp_path / "model.safetensors")
