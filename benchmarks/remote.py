"""Models on a server of this machine: reading by ranges against curl, and a command against the same on the disk.

python -m benchmarks.remote serve FOLDER       prints the address, and serves ranges until it is stopped
python -m benchmarks.remote read TUNED BASE    reads the bytes of every update, and does nothing with them
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the processes that are timed load none of it, for it loads torch
    from benchmarks.cases import Case
    from benchmarks.measure import Way

_MATRICES = 8  # of 4096², bf16: 32 MiB each, in both models


def cases() -> Iterator[Case]:
    """Both; the first needs curl."""
    from benchmarks.cases import Case

    if which("curl"):
        yield Case("process: 512 MiB of updates from a server, read", "curl of the same files", 1 / 1.3, _read)
    yield Case("process: svd of a full fine-tune from a server", "the same from the disk", 1 / 1.3, _svd)


def _read(folder: Path) -> tuple[Way, Way]:
    from benchmarks import inputs
    from benchmarks.measure import Sample, emptied, process

    base, tuned = inputs.write_pair(folder / "pair", _MATRICES)
    fetched = folder / "fetched"

    def ours() -> Sample:
        with served(folder / "pair") as address:
            words = [f"{address}/{part.name}" for part in (tuned, base)]
            return _anew(folder, process("-m", "benchmarks.remote", "read", *words))()

    def peer() -> Sample:
        with served(folder / "pair") as address:
            fetched.mkdir()
            files = sorted(file for part in (tuned, base) for file in part.glob("*.safetensors"))
            words = [word for place, file in enumerate(files) for word in
                     ("-o", str(fetched / str(place)), f"{address}/{file.relative_to(folder / 'pair')}")]  # fmt: skip
            return process("-s", *words, program="curl")()

    return ours, emptied(fetched, peer)


def _svd(folder: Path) -> tuple[Way, Way]:
    from benchmarks import inputs
    from benchmarks.cases import SPECTRA
    from benchmarks.measure import Sample, process

    base, tuned = inputs.write_pair(folder / "pair", _MATRICES)
    options = ("--layer", "v_proj", "--top", "30")

    def ours() -> Sample:
        with served(folder / "pair") as address:
            words = (f"{address}/{tuned.name}", "--base", f"{address}/{base.name}")
            return _anew(folder, process(*SPECTRA, "svd", *words, *options))()

    return ours, process(*SPECTRA, "svd", str(tuned), "--base", str(base), *options)


def _anew(folder: Path, way: Way) -> Way:
    """A way that finds nothing of what earlier runs read."""
    from benchmarks.measure import emptied

    os.environ["SPECTRA_CACHE"] = str(folder / "cache")
    return emptied(folder / "cache", way)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of its own process, which gives what lies in a folder."""
    command = [sys.executable, "-m", "benchmarks.remote", "serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.kill()


class _Ranges(SimpleHTTPRequestHandler):
    """Files, or a range of one, straight from the disk's cache to the socket."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Give it."""
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            self.send_error(404)
            return
        said, size = file.stat(), file.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, stop = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
        self.send_response(206 if found else 200)
        self.send_header("ETag", f'"{said.st_mtime_ns:x}.{said.st_ino:x}"')
        self.send_header("Content-Length", str(stop - first))
        if found:
            self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{size}")
        self.end_headers()
        self.wfile.flush()
        with open(file, "rb") as content:
            while first < stop:
                first += os.sendfile(self.connection.fileno(), content.fileno(), first, stop - first)

    def log_message(self, *_: object) -> None:
        """Quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Who has read enough hangs up."""


def _serve(folder: str) -> None:
    server = _Server(("127.0.0.1", 0), partial(_Ranges, directory=folder))
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


def _read_all(tuned: str, base: str) -> None:
    import spectra
    from spectra.files.far import done, expected

    source = spectra.open_source(tuned, base)
    with expected([delta.refs for delta in source], fetches=True):
        for delta in source:
            for ref in delta.refs:
                ref.file.read(ref.offset, ref.bytes_read)
            done(delta.refs)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(sys.argv[2])
    else:
        _read_all(*sys.argv[2:])
