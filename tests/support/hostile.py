"""Models whose tensors have names that no one should print, sort, number or store as they are."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

TOO_LONG = "layers." + "9" * 5000 + ".q_proj.weight"
PLAIN = "layers.6.ok_proj.weight"
NAMES = (
    "layers.0.\x1b]0;owned\x07q_proj.weight",  # retitles the terminal, and rings
    "layers.1.\u202eq_proj.weight",  # reads backwards from here
    "layers.2." + "x" * 400 + ".weight",  # more than a file system takes
    "layers.3.\ud800.weight",  # half a surrogate pair
    TOO_LONG,  # more digits than int() takes, a longer name than is read
    "a1²3.weight",  # isdigit() says yes, int() no
    "layers.4.v$x$_proj.weight",  # mathematics to matplotlib
    "layers.4.v$\\bad{$_proj.weight",
    "layers.5.a\nb.weight",
    "layers.7.é" + "ü" * 120 + ".weight",  # short until it is percent-encoded
    "../../../x.weight",
    ".weight",
    "a\0b.weight",
    "layers.8.\x9bq.weight",  # a control sequence in one character
    PLAIN,
)


def write(folder: Path, seed: int, step: float = 0.0) -> Path:
    """A file by hand, since libraries refuse to write some of the names."""
    rng, moved = np.random.default_rng(0), np.random.default_rng(seed)
    header, data = {}, b""
    for name in NAMES:
        content = (rng.standard_normal((8, 6)) + step * moved.standard_normal((8, 6))).astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": [8, 6], "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder
