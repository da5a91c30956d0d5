"""Models on a server that fails: a result, a retry that works, or one message."""

from __future__ import annotations

import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
from support import hub_server
from support.remote_models import assert_right, body_of, remotely, tag_of, times

import spectra
from spectra.errors import SourceError
from spectra.files import http, lanes, patience

FAULTS = {
    "503": lambda handler, seen: handler.say(503),
    "429 with Retry-After": lambda handler, seen: handler.say(429, {"Retry-After": "0"}),
    "a body that is cut": lambda handler, seen: handler.give(body_of(handler), tag_of(handler), keep=3),
    "no answer": lambda handler, seen: setattr(handler, "close_connection", True),
    "another range": lambda handler, seen: handler.say(
        206,
        {"ETag": f'"{tag_of(handler)}"', "Content-Range": f"bytes 5-5/{len(body_of(handler))}"},
        body_of(handler)[5:6],
    ),
    "the whole file": lambda handler, seen: handler.give(body_of(handler), tag_of(handler), ranges=False),
    "an expired link": lambda handler, seen: handler.say(403),
    "a link to another version": lambda handler, seen: handler.give(body_of(handler), "other"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_ends_in_the_right_numbers(server, tmp_path, fault):
    source = spectra.open_source("org/tuned", "org/base").select("v_proj")
    server.faults.append(times(1 if "link" in fault else 2, FAULTS[fault]))
    assert_right({spectrum.name: spectrum for spectrum in spectra.decompose(source)}, tmp_path)


def test_many_faults_at_random_end_in_the_right_numbers(server, tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 60.0)
    monkeypatch.setattr(patience, "_LONGEST_WAIT", 0.01)
    monkeypatch.setattr(lanes, "PIECE", 1500)
    draw, kinds = random.Random(0), [kind for kind in FAULTS if "link" not in kind]
    happened = []

    def fault(handler, seen):
        if seen.server != "cdn" or draw.random() > 0.4:
            return False
        happened.append(draw.choice(kinds))
        if happened[-1] == "a body that is cut":
            handler.give(body_of(handler), tag_of(handler), keep=draw.randrange(1500))
        else:
            FAULTS[happened[-1]](handler, seen)
        return True

    server.faults.append(fault)
    assert_right(remotely(), tmp_path)
    assert len(happened) > 10


def test_what_cannot_be_had_has_a_status_and_the_rest_is_done(server, tmp_path):
    source = spectra.open_source("org/tuned", "org/base").select("v_proj")
    broken = source.deltas[0].refs[0].path.rpartition("/")[2]
    server.faults.append(lambda handler, seen: "tuned" in seen.path and broken in seen.path and not handler.say(500))
    found = list(spectra.decompose(source, out=tmp_path / "out"))
    statuses = {spectrum.name: spectrum.status for spectrum in found}
    assert sorted(statuses.values()) == ["ok", "unreadable"]
    lost = next(spectrum for spectrum in found if spectrum.status == "unreadable")
    assert "the server answered 500" in lost.reason
    assert "secret" not in lost.reason
    server.faults.clear()
    assert_right({s.name: s for s in spectra.decompose(source, out=tmp_path / "out")}, tmp_path)


def test_a_server_that_asks_for_a_long_wait_is_one_message(server):
    source = spectra.open_source("org/tuned", "org/base").select("v_proj")
    server.faults.append(times(-1, lambda handler, seen: handler.say(429, {"Retry-After": "3600"})))
    found = list(spectra.decompose(source))
    assert all("asks to wait 3600 s" in spectrum.reason for spectrum in found)


def slowly(handler, content):
    """Byte after byte, each before anyone calls the server silent."""
    handler.told.status = 206
    handler.close_connection = True
    with suppress(OSError):
        for byte in content:
            handler.wfile.write(bytes([byte]))
            handler.told.sent += 1
            time.sleep(0.05)


def trickling_body(handler, seen):
    first, last = map(int, re.findall(r"\d+", seen.range))
    body = body_of(handler)
    handler.send_response(206)
    handler.send_header("ETag", f'"{tag_of(handler)}"')
    handler.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
    handler.send_header("Content-Length", str(last - first + 1))
    handler.end_headers()
    slowly(handler, body[first : last + 1])


def trickling_headers(handler, seen):
    slowly(handler, b"HTTP/1.1 206 Partial Content\r\nX-Long: " + b"x" * 100_000)


@pytest.mark.parametrize("trickle", [trickling_body, trickling_headers])
def test_a_server_that_trickles_is_not_waited_for_without_end(server, tmp_path, trickle):
    source = spectra.open_source("org/tuned", "org/base").select("v_proj")
    server.faults.append(times(-1, lambda handler, seen: trickle(handler, seen) if "tuned" in seen.path else False))
    began = time.monotonic()
    lost = list(spectra.decompose(source, out=tmp_path / "out"))
    assert time.monotonic() - began < 10 * patience.PATIENCE
    assert {spectrum.status for spectrum in lost} == {"unreadable"}
    said = r"\d+ bytes came in \d s" if trickle is trickling_body else "no whole answer within 2 s"
    assert all(re.search(f"cannot be read: {said}, .*; tried for ", spectrum.reason) for spectrum in lost)
    server.faults.clear()
    assert_right({s.name: s for s in spectra.decompose(source, out=tmp_path / "out")}, tmp_path)


def test_a_hub_that_trickles_is_one_message(server):
    server.faults.append(lambda handler, seen: "/api/" in seen.path and not trickling_headers(handler, seen))
    began = time.monotonic()
    with pytest.raises(SourceError, match="cannot be read: no whole answer within 2 s"):
        spectra.open_source("org/tuned", "org/base")
    assert time.monotonic() - began < 10 * patience.PATIENCE


def test_a_server_that_is_slow_and_comes_to_an_end_is_waited_for(server, tmp_path, monkeypatch):
    """Longer in all than the patience, which is for the time in which next to nothing comes."""
    monkeypatch.setattr(patience, "PATIENCE", 1.0)
    monkeypatch.setattr(patience, "LEAST", 1000)
    whole = hub_server._Handler.say

    def slow(self, status, headers=None, body=b"", keep=None):
        if status == 206 and len(body) > 4000:
            self.told.status = status
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            for start in range(0, len(body), 1024):
                self.wfile.write(body[start : start + 1024])
                time.sleep(0.3)
        else:
            whole(self, status, headers, body, keep)

    monkeypatch.setattr(hub_server._Handler, "say", slow)
    assert_right(remotely(), tmp_path)


def test_who_stops_does_not_wait_for_a_silent_server(server, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 60.0)
    ref = spectra.open_source("org/tuned", "org/base").select("v_proj").deltas[0].refs[0]
    server.faults.append(times(-1, lambda handler, seen: handler.say(429, {"Retry-After": "30"})))
    with ThreadPoolExecutor(1) as pool:
        start, reading = time.monotonic(), pool.submit(ref.read)
        while server.requests(".safetensors")[-1].status != 429:
            time.sleep(0.01)
        patience.give_up()
        with pytest.raises(SourceError, match="reading was given up"):
            reading.result(timeout=20)
    assert time.monotonic() - start < 20


def test_a_busy_hub_is_asked_again(server, tmp_path):
    left = [2]

    def busy(handler, seen):
        if "/api/models/" in seen.path and left[0]:
            left[0] -= 1
            handler.say(503)
            return True
        return False

    server.faults.append(busy)
    assert_right(remotely(), tmp_path)


def test_links_that_expire_are_asked_for_again(server, tmp_path):
    source = spectra.open_source("org/tuned", "org/base").select("v_proj")
    server.generation += 1
    assert_right({spectrum.name: spectrum for spectrum in spectra.decompose(source)}, tmp_path)


def test_a_new_link_that_is_refused_for_a_moment_is_tried_again(server, tmp_path):
    source = spectra.open_source("org/tuned", "org/base").select("v_proj")
    http._links.clear()
    server.faults.append(times(2, FAULTS["an expired link"]))
    assert_right({spectrum.name: spectrum for spectrum in spectra.decompose(source)}, tmp_path)
    http._links.clear()
    server.faults[:] = [times(-1, FAULTS["an expired link"])]
    for spectrum in spectra.decompose(source):
        assert "the server that it leads to, 127.0.0.1" in spectrum.reason
        assert "refuses it (403)" in spectrum.reason
        assert "secret" not in spectrum.reason


def test_a_link_to_a_server_that_is_gone_is_asked_for_again(server, tmp_path):
    source = spectra.open_source("org/tuned", "org/base").select("v_proj")
    for url, link in list(http._links.items()):
        http._links[url] = replace(link, location="http://127.0.0.1:9/gone")
    assert_right({spectrum.name: spectrum for spectrum in spectra.decompose(source)}, tmp_path)


def test_a_shard_whose_header_cannot_be_had_costs_its_own_matrices(server):
    server.faults.append(times(-1, lambda handler, seen: False if "00002" not in seen.path else handler.say(500)))
    source = spectra.open_source("org/tuned", "org/base")
    statuses = {spectrum.status for spectrum in spectra.decompose(source)}
    assert "ok" in statuses
