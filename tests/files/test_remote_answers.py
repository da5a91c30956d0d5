"""Servers whose answers contradict themselves, or are none: never a wrong number."""

from __future__ import annotations

import re
import time
from urllib.parse import unquote, urlsplit

import pytest
from support.hub_server import md5
from support.remote_models import assert_right, remotely

from spectra.errors import NotFoundError, SourceError
from spectra.files import hub, patience


def test_servers_without_ranges_or_versions_are_refused(server, tmp_path):
    content = b"\0" * (20 * 2**20)
    server.plain["/big.safetensors"] = content
    server.faults.append(lambda handler, seen: "big" in seen.path and not handler.give(content, "x", ranges=False))
    place = hub.resolve(f"{server.cdn}/big.safetensors")
    with pytest.raises(SourceError, match="whole files only, not ranges"):
        place.read(17 * 2**20, 10)
    server.faults[:] = [lambda handler, seen: not handler.say(200, {}, b"abc")]
    with pytest.raises(SourceError, match="neither an ETag nor when it last changed"):
        hub.resolve(f"{server.cdn}/m.safetensors").stamp()


def only_matrices(answer):
    """A fault that answers requests for the matrices alone: headers and indices come as they are."""

    def fault(handler, seen):
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", seen.range or "")
        if seen.server != "cdn" or not found or int(found[2]) - int(found[1]) < 2000:
            return False
        _, owner, name, commit, file = unquote(urlsplit(seen.path).path).removeprefix("/blobs").split("/", 4)
        answer(
            handler, handler.server.hub.models[f"{owner}/{name}"].commits[commit][file], int(found[1]), int(found[2])
        )
        return True

    return fault


def of_range(body, first, last):
    return {"ETag": f'"{md5(body)}"', "Content-Range": f"bytes {first}-{last}/{len(body)}"}


def whole_as_a_range(handler, body, first, last):
    handler.say(206, of_range(body, first, last), body)


def whole_as_a_range_in_chunks(handler, body, first, last):
    handler.told.status = 206
    handler.send_response(206)
    for name, value in (of_range(body, first, last) | {"Transfer-Encoding": "chunked"}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))


@pytest.mark.parametrize("answer", [whole_as_a_range, whole_as_a_range_in_chunks])
def test_an_answer_with_other_bytes_than_its_range_is_never_taken(server, answer):
    server.faults.append(only_matrices(answer))
    for spectrum in remotely().values():
        assert spectrum.status == "unreadable"
        assert "sends more or other bytes than the range that it names" in spectrum.reason


def test_a_range_in_chunks_without_a_length_is_taken(server, tmp_path):
    server.faults.append(only_matrices(
        lambda handler, body, first, last: whole_as_a_range_in_chunks(_Part(handler), body, first, last)
    ))  # fmt: skip
    assert_right(remotely(), tmp_path)


class _Part:
    """A handler whose body is cut to the range that its answer names."""

    def __init__(self, handler):
        self.handler, self.span, self.wfile = handler, None, self

    def __getattr__(self, name):
        return getattr(self.handler, name)

    def send_header(self, name, value):
        if name == "Content-Range":
            self.span = [int(text) for text in re.findall(r"\d+", value)][:2]
        self.handler.send_header(name, value)

    def write(self, framed):
        body = framed.partition(b"\r\n")[2].removesuffix(b"\r\n0\r\n\r\n")[self.span[0] : self.span[1] + 1]
        self.handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))


def test_a_server_that_keeps_answering_with_other_ranges_is_believed_soon(server, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 120.0)
    server.faults.append(only_matrices(
        lambda handler, body, first, last: handler.say(206, {"ETag": f'"{md5(body)}"'}, body[first : last + 1])
    ))  # fmt: skip
    began = time.monotonic()
    reasons = {spectrum.reason.partition(": ")[2] for spectrum in remotely().values()}
    assert {reason.partition(":")[0] for reason in reasons} == {"the answer is another range than was asked for"}
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "location",
    ["http://[bad", "ftp://example.org/x", "file:///etc/passwd", "http://127.0.0.1:99999999/", "http://a\x7f/"],
)
def test_a_redirect_to_no_server_is_one_message(server, location):
    server.faults.append(
        lambda handler, seen: seen.server == "hub" and seen.path.endswith(".safetensors")
        and not handler.say(302, {"Location": location})
    )  # fmt: skip
    began = time.monotonic()
    for spectrum in remotely().values():
        assert spectrum.status == "unreadable"
        assert re.search(r"leads to what is no address of a server|Invalid", spectrum.reason)
    assert time.monotonic() - began < patience.PATIENCE, "it is not asked again"


def test_numbers_longer_than_any_file_are_no_numbers(server):
    server.faults.append(only_matrices(
        lambda handler, body, first, last: handler.say(
            206, of_range(body, first, last) | {"Content-Range": f"bytes {first}-{last}/{'9' * 5000}"}
        )
    ))  # fmt: skip
    assert {spectrum.status for spectrum in remotely().values()} == {"unreadable"}


def test_an_answer_of_the_hub_that_is_none_is_one_message(server, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    server.faults.append(lambda handler, seen: "/tree/" in seen.path and not handler.say(200, body=b'{"no": "list"}'))
    with pytest.raises(NotFoundError):
        hub.resolve("org/base", fetch=True)
