"""Every command × every way to name a model elsewhere × what may go wrong: the disk's numbers, or one message."""

from __future__ import annotations

import itertools
import json
from functools import cache

import pytest
import torch
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from support.checkpoints import llama_tensors, nudged, write_adapter, write_checkpoint
from support.command_line import strict
from support.memory import in_fsspecs_memory
from support.remote_models import ONE, SHARDS, TOKEN, larger, times, write_adapter_of

from spectra.cli import main
from spectra.files import cloud, far, patience

COMMANDS = {
    "inspect": ("inspect", "{tuned}", "--base", "{base}"),
    "svd": ("svd", "{tuned}", "--base", "{base}", "--layer", ONE, "--top", "3"),
    "similarity": ("similarity", "{tuned}", "{other}", "--base", "{base}", "--layer", ONE, "--no-figures"),
    "alignment": ("alignment", "{tuned}", "--base", "{base}", "--layer", ONE),
    "interference": ("interference", "{tuned}", "{other}", "--base", "{base}", "--layer", ONE),
    "series": ("series", "{tuned}", "{other}", "--base", "{base}", "--layer", ONE, "--step", "1", "--step", "2"),
    "extract": ("extract", "{tuned}", "--base", "{base}", "--layer", ONE, "--rank", "2", "--dry-run"),
    "verify": ("verify", "--base", "{base}", "--adapter", "{lora}", "--merged", "{tuned}", "--layer", ONE),
    "heads": ("heads", "{heads}", "--base", "{base}"),
}
MODELS = ("base", "tuned", "other", "lora", "heads")
SOURCES = {
    "id": "org/{name}",
    "revision": "org/{name}@v1",
    "page": "{hub}/org/{name}/tree/v1",
    "hf": "hf://org/{name}",
    "folder": "{web}/plain/{name}/",
    "fsspec": "{memory}/{name}",
}


def say(status, headers=None):
    return lambda handler, seen: not handler.say(status, headers)


def busy(server, monkeypatch):
    for on in ("hub", "cdn"):
        server.faults.append(times(2, say(503), on))
        server.faults.append(times(1, say(429, {"Retry-After": "0"}), on))


def cut(server, monkeypatch):
    def act(handler, seen):
        handler.close_connection = True

    server.faults.append(times(3, act))


def expired(server, monkeypatch):
    """All links that were given out end, twice."""
    asked = itertools.count(1)

    def act(handler, seen):
        if "/blobs/" in seen.path and next(asked) in (3, 8):
            server.generation += 1
        return False

    server.faults.append(act)


def gated(server, monkeypatch):
    for model in server.models.values():
        model.gated = True
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")


def not_let_in(server, monkeypatch):
    server.faults.append(
        lambda handler, seen: "/resolve/" in seen.path and say(403, {"X-Error-Code": "GatedRepo"})(handler, seen)
    )


def wrong_token(server, monkeypatch):
    server.faults.append(say(401, {"X-Error-Message": "Invalid credentials in Authorization header"}))


def offline(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def gone(server, monkeypatch):
    server.models.clear()
    server.plain.clear()


def forbidden(server, monkeypatch):
    server.faults.append(say(403))


def another_commit(server, monkeypatch):
    for model in server.models.values():
        model.branches.clear()


def no_keys(server, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)


def flaky(server, monkeypatch):
    left, real = [2], MemoryFileSystem.cat_file

    def sometimes(self, *args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError("reset by peer")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", sometimes)


PASSING = {None: tuple(SOURCES), busy: ("id", "folder"), cut: ("id", "folder"), expired: ("page",), flaky: ("fsspec",)}
FATAL = {  # what goes wrong → whose models it happens to, and what is said
    gated: (("id", "page"), "it is gated: accept its terms on the hub, then `hf auth login`"),
    not_let_in: (("hf",), "it is gated, and the token that was sent has no access"),
    wrong_token: (("revision",), "the hub refuses the token that was sent (401)"),
    offline: (("id", "folder"), "HF_HUB_OFFLINE is set"),
    gone: (("id", "page"), "the hub has no such model, or it is private and the token that was sent may not see it"),
    another_commit: (("revision", "page"), "the hub has the model, but not this revision"),
    forbidden: (("folder",), "the server refuses it (403), and no password or token is sent to it"),
    no_keys: (("fsspec",), "access is refused (Forbidden); give the keys"),
}
CASES = [(source, fault) for fault, sources in PASSING.items() for source in sources]
REFUSED = [(source, fault) for fault, (sources, _) in FATAL.items() for source in sources]


def called(value):
    return value if isinstance(value, str) else getattr(value, "__name__", "nothing wrong")


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """name → folder of the models."""
    home = tmp_path_factory.mktemp("models")
    base, columns, rows = larger(llama_tensors()), 64, 32
    write_checkpoint(home / "base", base, shards=SHARDS)
    write_checkpoint(home / "tuned", nudged(base), shards=SHARDS)
    write_checkpoint(home / "other", nudged(base, seed=5), shards=2)
    write_adapter_of(home / "lora", home / "base")
    prefix = f"base_model.model.model.{ONE}"
    heads = {f"{prefix}.lora_A.weight": torch.randn(2, columns)}
    heads |= {f"{prefix}.lora_B{i}.weight": torch.randn(rows, 2) for i in range(3)}
    write_adapter(home / "heads", heads, {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_nums": 3})
    return {name: home / name for name in MODELS}


@pytest.fixture(scope="module")
def here(disk):
    """command → what it gives of the models on the disk."""
    return cache(lambda command: ran(command, disk))


@pytest.fixture
def models(server, disk, monkeypatch):
    """Kind of address → name → address of the models."""
    monkeypatch.setattr(cloud, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(patience, "_LONGEST_WAIT", 0.01)
    server.models.clear()
    for name, folder in disk.items():
        for branch in ("main", "v1"):
            server.add(f"org/{name}", folder, branch)
        server.plain |= {f"/plain/{name}/{file.name}": file.read_bytes() for file in folder.iterdir()}
    memory = in_fsspecs_memory(disk["base"].parent)
    far._heads.clear()
    places = {"hub": server.endpoint, "web": server.cdn, "memory": str(memory)}
    return {
        source: {name: pattern.format(name=name, **places) for name in MODELS} for source, pattern in SOURCES.items()
    }


def ran(command, addresses):
    """The exit status, stdout and stderr."""
    words = [word.format(**addresses) for word in COMMANDS[command]]
    done = CliRunner().invoke(main, [*words, "--json"])
    assert isinstance(done.exception, SystemExit | None), done.exception
    for secret in (TOKEN, "sig=", "secret", "Traceback"):
        assert secret not in done.output
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize(("source", "fault"), CASES, ids=called)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_passes_ends_in_what_the_disk_gives(server, monkeypatch, models, here, command, source, fault):
    status, expected, _ = here(command)
    if fault:
        fault(server, monkeypatch)
    found, out, err = ran(command, models[source])
    assert found == status, err
    rows = [[{**row, "checkpoint": ""} for row in strict(text)["matrices"]] for text in (expected, out)]
    assert rows[0]
    assert json.dumps(rows[1]) == json.dumps(rows[0])


@pytest.mark.parametrize(("source", "fault"), REFUSED, ids=called)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_stays_is_one_message(server, monkeypatch, models, command, source, fault):
    fault(server, monkeypatch)
    status, out, err = ran(command, models[source])
    assert status == 1
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert FATAL[fault][1] in err
