"""Ranges on the disk: whole or not there, whoever wrote them and however that ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from spectra.errors import SourceError
from spectra.files import lanes, ranges
from spectra.files.ranges import Range

CONTENT = bytes(i * 7 % 251 for i in range(4000))
STAMP = (4000, "v1")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(lanes, "PIECE", 100)
    ranges._tidy.cache_clear()


class Server:
    """Gives the content in chunks of 30 bytes, and notes which pieces it was asked for."""

    def __init__(self, fails_at=None):
        self.asked, self.fails_at = [], fails_at

    def __call__(self, offset, buffer):
        self.asked.append(offset)
        if offset == self.fails_at:
            raise SourceError("the server is gone")
        wanted = min(len(buffer), len(CONTENT) - offset)
        for start in range(0, wanted, 30):
            chunk = CONTENT[offset + start : offset + min(start + 30, wanted)]
            buffer[start : start + len(chunk)] = chunk
        return wanted


def a_range(server, start=50, size=1030, stamp=STAMP):
    return Range("https://example.org/m", stamp, start, size, server)


def content_of(one, offset=0, size=1030):
    buffer = bytearray(size)
    assert one.read_into(offset, memoryview(buffer)) == size
    return bytes(buffer)


def the_file():
    (file,) = ranges.folder().iterdir()
    return file


def test_a_range_comes_in_pieces_and_is_the_bytes_of_the_file():
    server = Server()
    one = a_range(server)
    assert one.bring()
    assert one.bring(), "and once"
    assert sorted(server.asked) == list(range(50, 1080, 100))
    assert content_of(one) == CONTENT[50:1080]
    assert content_of(one, 7, 90) == CONTENT[57:147]
    assert the_file().stat().st_mode & 0o777 == 0o600
    assert ranges.folder().stat().st_mode & 0o777 == 0o700
    one.close()
    assert list(ranges.folder().iterdir()) == []


def test_what_is_left_of_a_file_whose_version_is_date_and_size_is_looked_at_before_it_is_taken(monkeypatch):
    weak = (4000, f"65e1a5a0-{4000:x}")
    one = a_range(Server(), stamp=weak)
    assert one.bring()
    one.close(keep=True)
    same = Server()
    again = a_range(same, stamp=weak)
    assert again.bring()
    assert len(same.asked) == 11, "a look at each piece"
    monkeypatch.setattr(ranges, "_SAMPLE", 20)
    again.close(keep=True)
    monkeypatch.setitem(globals(), "CONTENT", bytes(255 - byte for byte in CONTENT))
    changed = a_range(Server(), stamp=weak)
    assert changed.bring()
    assert content_of(changed) == CONTENT[50:1080]
    changed.close()


def test_pieces_that_came_before_the_server_was_gone_are_not_asked_for_again():
    broken = Server(fails_at=550)
    one = a_range(broken)
    with pytest.raises(SourceError):
        one.bring()
    one.close(keep=True)
    server = Server()
    again = a_range(server)
    assert again.bring()
    assert content_of(again) == CONTENT[50:1080]
    assert 550 in server.asked
    assert len({*broken.asked, *server.asked}) == 11
    came = len(broken.asked) - 1
    assert len(server.asked) == 11 - came
    again.close()


@pytest.mark.parametrize("place", [0, 333, 1029, 1030, 1031 + 8 * 10])
def test_a_damaged_piece_is_fetched_again(place):
    one = a_range(Server())
    one.bring()
    one.close(keep=True)
    with open(the_file(), "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    server = Server()
    again = a_range(server)
    assert again.bring()
    assert len(server.asked) == 1
    assert content_of(again) == CONTENT[50:1080]
    again.close()


def test_a_file_that_was_cut_or_lies_there_by_chance_counts_for_nothing():
    one = a_range(Server())
    one.bring()
    one.close(keep=True)
    for content in (b"", the_file().read_bytes()[:500], b"\0" * 5000):
        the_file().write_bytes(content)
        again = a_range(Server())
        assert again.bring()
        assert content_of(again) == CONTENT[50:1080]
        again.close(keep=True)


def test_another_version_is_another_file():
    a_range(Server()).bring()
    server = Server()
    other = a_range(server, stamp=(4000, "v2"))
    assert other.bring()
    assert len(server.asked) == 11


def test_two_runs_at_once_write_the_same_and_one_may_end_first():
    first, second = a_range(Server()), a_range(Server())
    assert first.bring()
    assert second.bring()
    first.close()
    assert content_of(second) == CONTENT[50:1080]
    assert second.bring()
    second.close()
    assert list(ranges.folder().iterdir()) == []


def test_where_the_cache_cannot_be_written_nothing_is_left_and_all_is_right(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SPECTRA_CACHE", str(tmp_path / "file"))
    one = a_range(Server())
    assert one.bring()
    assert content_of(one) == CONTENT[50:1080]
    one.close(keep=True)


def test_a_full_disk_is_no_error(monkeypatch):
    monkeypatch.setattr(ranges, "_SPARE", 2**60)
    one = a_range(Server())
    assert not one.bring()
    assert list(ranges.folder().iterdir()) == []
    monkeypatch.setattr(ranges, "_SPARE", 0)
    real, written = os.pwrite, []

    def full(file, content, place):
        written.append(place)
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        return real(file, content, place)

    monkeypatch.setattr(os, "pwrite", full)
    assert not one.bring()
    assert list(ranges.folder().iterdir()) == []


def test_a_file_that_ends_within_the_range_is_not_whole():
    one = a_range(Server(), start=3900, size=200)
    assert not one.bring()
    one.close()


def test_what_is_read_again_stays_until_nobody_reads_it_any_more():
    server = Server()
    with ranges.read_again("https://example.org"):
        for _ in range(3):
            one = a_range(server)
            assert one.bring()
            assert content_of(one) == CONTENT[50:1080]
            one.close()
    assert len(server.asked) == 11
    assert list(ranges.folder().iterdir()) == []


def test_what_nobody_came_back_for_goes_after_a_week():
    one = a_range(Server())
    one.bring()
    one.close(keep=True)
    os.utime(the_file(), (time.time() - 6 * 86400,) * 2)
    ranges._tidy.cache_clear()
    a_range(Server(), start=0).bring()
    assert len(list(ranges.folder().iterdir())) == 2
    for file in ranges.folder().iterdir():
        os.utime(file, (time.time() - 8 * 86400,) * 2)
    ranges._tidy.cache_clear()
    a_range(Server(), start=1).bring()
    assert len(list(ranges.folder().iterdir())) == 1


CODE = """
import os, signal, sys
from spectra.files import lanes, ranges
lanes.PIECE = 100
def fetch(offset, buffer):
    if offset == 550:
        buffer[0:30] = bytes(30)
        os.kill(os.getpid(), signal.SIGKILL)
    buffer[0:len(buffer)] = bytes(i * 7 % 251 for i in range(4000))[offset:offset + len(buffer)]
    return len(buffer)
lanes.all_of = lambda piece, starts: [piece(start) for start in starts]
ranges.Range("https://example.org/m", (4000, "v1"), 50, 1030, fetch).bring()
"""


def test_what_a_killed_process_left_is_gone_on_with():
    done = subprocess.run([sys.executable, "-c", CODE], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == -9
    server = Server()
    one = a_range(server)
    assert one.bring()
    assert sorted(server.asked) == list(range(550, 1080, 100)), "five pieces had come; the sixth was half written"
    assert content_of(one) == CONTENT[50:1080]


def planted_link(file):
    precious = file.parent.parent / "precious"
    precious.write_bytes(b"precious")
    file.unlink()
    os.link(precious, file)


def planted_pipe(file):
    file.unlink()
    os.mkfifo(file)


def anybodys(file):
    file.chmod(0o666)


def another_users(file):
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(file, 12345, 12345)


@pytest.mark.parametrize("plant", [planted_link, planted_pipe, anybodys, another_users])
def test_what_is_not_this_users_own_file_is_not_believed_nor_written_to(plant):
    one = a_range(Server())
    assert one.bring()
    one.close(keep=True)
    plant(the_file())
    before = (the_file().stat(), ranges.folder().parent / "precious")
    server = Server()
    two = a_range(server)
    assert two.bring()
    assert len(server.asked) == 11, "all pieces are asked for"
    assert content_of(two) == CONTENT[50:1080]
    two.close()
    assert the_file().stat().st_mtime_ns == before[0].st_mtime_ns
    assert not before[1].exists() or before[1].read_bytes() == b"precious"


def test_a_version_that_is_a_date_alone_is_kept_for_no_other_run():
    """A file may become another one of the same size and date."""
    stamp = (4000, "Fri, 01 Mar 2024 10:00:00 GMT")
    server = Server()
    one = a_range(server, stamp=stamp)
    assert one.bring()
    assert content_of(one) == CONTENT[50:1080]
    one.close(keep=True)
    assert list(ranges.folder().iterdir()) == []


def test_a_disk_that_is_full_is_tried_once(monkeypatch):
    monkeypatch.setattr(ranges, "_SPARE", 2**70)
    server = Server()
    one = a_range(server)
    assert not one.bring()
    monkeypatch.setattr(ranges, "_SPARE", 0)
    assert not one.bring()
    assert server.asked == []


def test_tidying_leaves_files_of_other_names():
    ranges.folder().mkdir(parents=True, exist_ok=True)
    mine = ranges.folder() / "thesis.csv"
    mine.write_text("mine")
    os.utime(mine, (1, 1))
    one = a_range(Server())
    assert one.bring()
    one.close()
    assert the_file() == mine


def test_reading_again_below_an_address_keeps_nothing_of_its_namesakes():
    with ranges.read_again("https://example.org/mo"):
        one = a_range(Server())
        assert one.bring()
        one.close()
        assert list(ranges.folder().iterdir()) == []
    with ranges.read_again("https://example.org"):
        one = a_range(Server())
        assert one.bring()
        one.close()
        assert the_file()
    assert list(ranges.folder().iterdir()) == []
