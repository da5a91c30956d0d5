"""Models on a server: what is read is one version, or an error."""

from __future__ import annotations

import pytest
from support.checkpoints import llama_tensors, write_checkpoint
from support.command_line import lora_folder, run
from support.remote_models import SHARDS, assert_right, data_of, larger, serve_plainly, write_adapter_of

import spectra
from spectra.files import http
from spectra.results.series import series_rows


def test_the_commit_is_the_one_of_the_opening(server, tmp_path):
    source = spectra.open_source("org/tuned", "org/base").select("v_proj")
    write_checkpoint(tmp_path / "other", larger(llama_tensors(seed=7)), shards=SHARDS)
    server.add("org/tuned", tmp_path / "other")
    assert_right({spectrum.name: spectrum for spectrum in spectra.decompose(source)}, tmp_path)


def test_a_series_is_held_against_one_commit_of_its_base(server, tmp_path):
    stream = series_rows(["org/tuned", "org/base"], "org/base", layers=("v_proj",), steps=(2, 1), top=2)
    next(stream)
    write_checkpoint(tmp_path / "moved", larger(llama_tensors(seed=7)), shards=SHARDS)
    server.add("org/base", tmp_path / "moved")
    commits = {path.split("/")[4] for path, _ in data_of(server, "org/base")[1]}
    list(stream)
    assert {path.split("/")[4] for path, _ in data_of(server, "org/base")[1]} == commits


@pytest.mark.parametrize("kind", ["hub", "plain"])
def test_a_file_that_changes_is_an_error(server, tmp_path, kind):
    if kind == "plain":
        serve_plainly(server, tmp_path)
        source = spectra.open_source(f"{server.cdn}/plain/tuned", f"{server.cdn}/plain/base")
        for path in [path for path in server.plain if "tuned" in path and path.endswith(".safetensors")]:
            server.plain[path] = server.plain[path][:-1] + b"\0"
    else:
        source = spectra.open_source("org/tuned", "org/base")
        model = server.models["org/tuned"]
        files = model.commits[model.branches["main"]]
        files |= {name: body[:-1] + b"\0" for name, body in files.items() if name.endswith(".safetensors")}
    found = list(spectra.decompose(source.select("v_proj")))
    assert {spectrum.status for spectrum in found} == {"unreadable"}
    assert all("changed after it was opened" in spectrum.reason for spectrum in found), found[0].reason


@pytest.mark.parametrize(("tag", "size"), [({}, 7), ({"ETag": '"a"'}, 5)])
def test_a_file_that_changed_this_very_second_is_looked_at_again_where_the_date_is_all(server, tag, size):
    """What it becomes before the second is over would have the same date."""
    now = "Fri, 01 Mar 2024 10:00:00 GMT"
    sizes, clock = [5, 7], [now, "Fri, 01 Mar 2024 10:00:01 GMT"]

    def answer(handler, seen):
        handler.date_time_string = lambda: clock.pop(0) if len(clock) > 1 else clock[0]
        total = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        handler.say(206, tag | {"Last-Modified": now, "Content-Range": f"bytes 0-0/{total}"}, b"{")
        return True

    server.faults.append(answer)
    assert http.stat(f"{server.cdn}/config.json") == (size, tag.get("ETag", now).strip('"'))


@pytest.mark.parametrize("command", ["similarity", "verify", "extract"])
def test_a_base_that_moves_while_models_are_opened_is_one_commit(server, tmp_path, command):
    lora_folder(tmp_path / "lora", seed=1)
    commits = {repo: server.add(repo, tmp_path / repo.removeprefix("org/")) for repo in ("org/tuned", "org/base")}
    write_checkpoint(tmp_path / "moved", larger(llama_tensors(seed=7)), shards=SHARDS)
    asked = []

    def moves(handler, seen):
        if "/api/models/org/base/revision/main" in seen.path:
            asked.append(seen)
            if len(asked) == 2:
                server.add("org/base", tmp_path / "moved")
        return False

    server.faults.append(moves)
    if command == "verify":
        server.add("org/merged", tmp_path / "tuned")
        write_adapter_of(tmp_path / "adapter", tmp_path / "base")
        server.add("org/adapter", tmp_path / "adapter")
        run("verify", "--base", "org/base", "--adapter", "org/adapter", "--merged", "org/merged", status=1)
    elif command == "similarity":
        run("similarity", "org/tuned", "org/tuned", "--base", "org/base", "--layer", "v_proj")
    else:
        run("extract", "org/tuned", "org/tuned", "--base", "org/base", "--layer", "v_proj", "--rank", "1", "--dry-run")
    read = {seen.path.split("/")[4] for seen in server.seen if seen.server == "cdn" and "/org/base/" in seen.path}
    assert read == {commits["org/base"]}
