"""Models on a server: what is read is one version, or an error."""

from __future__ import annotations

import re
from email.utils import formatdate

import pytest
from support.checkpoints import llama_tensors, write_checkpoint
from support.command_line import lora_folder, run
from support.remote_models import SHARDS, assert_right, body_of, data_of, larger, serve_plainly, write_adapter_of

import spectra
from spectra.errors import StoreError
from spectra.files import http
from spectra.files.versions import tells_content
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


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("tag", [{"ETag": '"other"'}, {}])
def test_other_bytes_under_another_tag_behind_a_new_link_are_no_numbers(server, tmp_path, tag, always):
    """The hub's own name of the file is the same throughout; what comes from the other server is not."""
    source = spectra.open_source("org/tuned", "org/base").select("v_proj")
    http._links.clear()
    left = [10**9 if always else 1]

    def other(handler, seen):
        if seen.server != "cdn" or left[0] == 0:
            return False
        left[0] -= 1
        body = body_of(handler)
        first, last = map(int, re.findall(r"\d+", seen.range))
        part = body[first : last + 1]
        head = tag | {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(body)}"}
        handler.say(206, head, bytes(255 - byte for byte in part))
        return True

    server.faults.append(other)
    found = {spectrum.name: spectrum for spectrum in spectra.decompose(source)}
    if not always:
        assert_right(found, tmp_path)
        return
    assert {spectrum.status for spectrum in found.values()} == {"unreadable"}
    said = "another version than before" if tag else "tells no version"
    assert all(said in spectrum.reason and "\n" not in spectrum.reason for spectrum in found.values())


def test_a_process_that_begins_in_the_middle_of_a_file_is_not_taken_in_by_one_answer(server, tmp_path):
    """As a worker of a cluster does, which got its recipe from the process that read the header."""
    source = spectra.open_source("org/tuned", "org/base").select("v_proj")
    for known in (http._links, http._tags, http._met):
        known.clear()
    wrong = []

    def other(handler, seen):
        if seen.server != "cdn" or seen.range == "bytes=0-0" or len(wrong) == 2:
            return False
        wrong.append(seen)
        body = body_of(handler)
        first, last = map(int, re.findall(r"\d+", seen.range))
        head = {"ETag": '"other"', "Content-Range": f"bytes {first}-{last}/{len(body)}"}
        handler.say(206, head, bytes(255 - byte for byte in body[first : last + 1]))
        return True

    server.faults.append(other)
    found = {spectrum.name: spectrum for spectrum in spectra.decompose(source)}
    assert len(wrong) == 2
    assert_right(found, tmp_path)


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


def as_nginx(server, written=0x65E1A5A0, date=False):
    """Plain files with a date of change and, unless that is all, a tag of it and the size."""

    def answer(handler, seen):
        body = server.plain.get(seen.path)
        if body is None:
            return False
        more = {"Last-Modified": formatdate(written, usegmt=True)}
        first, last = map(int, re.findall(r"\d+", seen.range))
        more |= {"Content-Range": f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"}
        more |= {} if date else {"ETag": f'"{written:x}-{len(body):x}"'}
        handler.say(206, more, body[first : last + 1])
        return True

    return answer


@pytest.mark.parametrize("date", [False, True])
def test_a_file_that_is_another_under_the_same_date_and_size_is_not_taken_for_it(server, tmp_path, date):
    serve_plainly(server, tmp_path)
    server.faults.append(as_nginx(server, date=date))
    models = f"{server.cdn}/plain/tuned", f"{server.cdn}/plain/base"
    source = spectra.open_source(*models).select("v_proj")
    before = http.received()
    first = {spectrum.name: spectrum for spectrum in spectra.decompose(source, out=tmp_path / "out")}
    assert_right(first, tmp_path)
    files = {part.path for delta in source for ref in delta.refs for part in ref.parts}
    assert http.received() - before <= sum(ref.nbytes for delta in source for ref in delta.refs) + len(files) * 8 * 4096
    again = spectra.decompose(spectra.open_source(*models).select("v_proj"), out=tmp_path / "out")
    assert {spectrum.name for spectrum in again} == set(again.reused) == first.keys()
    tuned = [path for path in server.plain if "/tuned/model-" in path and f"{server.cdn}{path}" in files]
    for path in tuned:
        body = server.plain[path]
        start = 8 + int.from_bytes(body[:8], "little")
        server.plain[path] = body[:start] + bytes(len(body) - start)
    with pytest.raises(StoreError, match="files"):
        list(spectra.decompose(spectra.open_source(*models).select("v_proj"), out=tmp_path / "out"))


def test_a_header_that_is_another_under_the_same_date_and_size_is_read_when_it_is_opened_again(server, tmp_path):
    serve_plainly(server, tmp_path)
    server.faults.append(as_nginx(server))
    url = f"{server.cdn}/plain/base/model-00001-of-{SHARDS:05}.safetensors"
    names = set(spectra.inspect(url).folder.tensors)
    path = url.removeprefix(server.cdn)
    server.plain[path] = server.plain[path].replace(b"model.layers.0", b"model.layers.7")
    assert set(spectra.inspect(url).folder.tensors) != names


@pytest.mark.parametrize(
    ("size", "tag", "told"),
    [
        (500, "d41d8cd98f00b204e9800998ecf8427e", True),
        (500, "d41d8cd98f00b204e9800998ecf8427e-38", True),  # of an upload in parts
        (500, "65e1a5a0-1f4", False),  # nginx
        (500, "65e1a5a0-1f4-gzip", False),
        (500, "1f4-612a7b3c4d5e6", False),  # Apache
        (500, "2a3f-1f4-612a7b3c4d5e6", False),
        (500, "s9q2m8dw", False),  # Caddy
        (500, "65e1a5a0-1f5", True),
        (500, "Fri, 01 Mar 2024 10:00:00 GMT", False),
        (500, "2024-03-01 10:00:00+00:00", False),
        (500, "1709287200.123", False),
        (500, "1709287200123456", True),  # a generation
        (500, "0x8DC39D8A7E5B2F0", True),
    ],
)
def test_which_versions_tell_the_content(size, tag, told):
    assert tells_content((size, tag)) is told
