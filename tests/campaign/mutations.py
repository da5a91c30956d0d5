"""Damage that knows the format: headers, archives, tables and indexes are changed where readers trust them."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from support.fuzz import ODD

Bytes = Callable[[bytes, random.Random], bytes]
_WHOLE = [
    *range(9),
    31,
    32,
    64,
    127,
    128,
    255,
    *(2**k - 1 for k in (16, 31, 32, 53, 63, 64)),
    2**15,
    2**31,
    2**62,
    2**63,
]
_DTYPES = [
    "F32",
    "F64",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "F6_E2M3",
    "I8",
    "U8",
    "I64",
    "U64",
    "BOOL",
    "C64",
    "f32",
    "X",
]
_PICKLED = [
    (b"FloatStorage", b"LongStorage"), (b"torch", b"posix"), (b"_rebuild_tensor_v2", b"_rebuild_parameter"),
    (b"cpu", b"cuda:9"), (b"collections", b"os"),
]  # fmt: skip


def flip(content: bytes, rng: random.Random) -> bytes:
    """Some bits, most of them near the start, where headers are."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        bit = rng.randrange(8 * min(len(content), rng.choice([16, 64, 1024, len(content)])) or 1)
        if content:
            changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    """The end is missing."""
    return content[: rng.randrange(len(content) + 1)]


def splice(content: bytes, rng: random.Random) -> bytes:
    """A block is gone, there twice, zero, noise, or in another place."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    b = min(b, a + rng.choice([1, 4, 8, 100, 4096]))
    block = content[a:b]
    put = rng.choice([b"", block * 2, bytes(len(block)), rng.randbytes(len(block)), block[::-1]])
    at = rng.choice([a, a, a, rng.randrange(len(content) + 1)])
    without = content[:a] + content[b:]
    return without[:at] + put + without[at:]


def number(content: bytes, rng: random.Random) -> bytes:
    """An integer somewhere near the start is another one."""
    width = rng.choice("BHIQ")
    size = struct.calcsize(width)
    if len(content) < size:
        return content
    place = rng.randrange(min(len(content) - size + 1, rng.choice([32, 512, len(content)])))
    (there,) = struct.unpack_from("<" + width, content, place)
    value = rng.choice([*_WHOLE, there + 1, there - 1, there * 2, len(content), len(content) - 1]) % 2 ** (8 * size)
    return content[:place] + struct.pack("<" + width, value) + content[place + size :]


GENERAL: tuple[Bytes, ...] = (flip, cut, splice, number, number)


def safetensors_header(content: bytes, rng: random.Random) -> bytes:
    """The JSON header says something else."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    one, other = header[rng.choice(names)], header[rng.choice(names)]
    what = rng.choice(["field", "swap", "shift", "twice", "text", "metadata", "name", "axes", "length", "split"])
    text = None
    if what == "field":
        field = rng.choice(["dtype", "shape", "data_offsets", "more"])
        one[field] = rng.choice([*ODD, *_DTYPES, [0], [-1], [2**62, 4], [0, 2**63], [1.0, 4.0], [True, 2]])
    elif what == "swap":
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    elif what == "shift":
        begin, end = one["data_offsets"]
        by = rng.choice([-8, -1, 1, 4, 8, 2**40])
        one["data_offsets"] = rng.choice([[begin + by, end + by], [begin, end + by], [end, begin]])
    elif what == "twice":
        name = json.dumps(rng.choice(names))
        text = json.dumps(header).rstrip("}") + "}" + f", {name}: " + json.dumps(one) + "}"
    elif what == "text":
        whole = json.dumps(header)
        text = rng.choice([whole[:-1], whole + "}", whole.replace(":", ":NaN,", 1), "[" * 5000, "", "\ufeff{}"])
    elif what == "metadata":
        header["__metadata__"] = rng.choice([*ODD, {"format": 3}, {"a": {"b": "c"}}, {"x": "\ud800"}])
    elif what == "name":
        header[rng.choice(["", "a" * 5000, "\ud800", "../x", "__metadata__", "a\0b"])] = header.pop(names[0])
    elif what == "axes":
        one["shape"] = [1] * rng.choice([0, 1, 9, 64, 65, 1000]) + one["shape"]
    elif what == "split":
        one["shape"] = [*one["shape"], 1] if rng.random() < 0.5 else one["shape"][::-1]
    raw = (json.dumps(header) if text is None else text).encode("utf-8", "surrogatepass")
    raw += b" " * rng.choice([0, 0, -len(raw) % 8, 100])
    size = rng.choice([*_WHOLE, len(raw) - 1, len(raw) + 1]) if what == "length" else len(raw)
    return struct.pack("<Q", size % 2**64) + raw + data


def torch_zip(content: bytes, rng: random.Random) -> bytes:
    """The archive's records, or what its pickle says, are others."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    place = rng.randrange(len(records))
    name, data = records[place]
    what = rng.choice(["pickle", "pickle", "pickle", "drop", "twice", "rename", "bytes", "order", "compress", "text"])
    kind = zipfile.ZIP_STORED
    if what == "pickle":
        place = next(i for i, (name, _) in enumerate(records) if name.endswith("data.pkl"))
        name, data = records[place]
        records[place] = (name, rng.choice(GENERAL)(data, rng))
    elif what == "drop":
        records.pop(place)
    elif what == "twice":
        records.append((name, rng.choice(GENERAL)(data, rng)))
    elif what == "rename":
        records[place] = (rng.choice(["x", "../x", "/etc/x", "a" * 300, "archive/data/99", name.upper()]), data)
    elif what == "bytes":
        records[place] = (name, rng.choice(GENERAL)(data, rng))
    elif what == "order":
        records = [(n, b"big" if n.endswith("byteorder") else d) for n, d in records][:: rng.choice([1, -1])]
    elif what == "compress":
        kind = zipfile.ZIP_DEFLATED
    elif what == "text":
        place = next(i for i, (name, _) in enumerate(records) if name.endswith("data.pkl"))
        old, new = rng.choice(_PICKLED)
        records[place] = (records[place][0], records[place][1].replace(old, new))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as archive:
        for name, data in records:
            archive.writestr(name, data)
    return out.getvalue()


def index(folder: Path, rng: random.Random) -> None:
    """`model.safetensors.index.json` says something else."""
    path = folder / "model.safetensors.index.json"
    said = json.loads(path.read_text())
    files = sorted({*said["weight_map"].values()})
    name = rng.choice(sorted(said["weight_map"]))
    odd = ["../base/x.safetensors", "/etc/passwd", "", ".", "config.json", "x" * 300, path.name, *ODD, *files]
    what = rng.choice(["file", "file", "drop", "more", "map", "text", "link", "gone"])
    if what == "file":
        said["weight_map"][name] = rng.choice(odd)
    elif what == "drop":
        del said["weight_map"][name]
    elif what == "more":
        said["weight_map"][rng.choice(["more.weight", "", "a" * 5000])] = rng.choice(files)
    elif what == "map":
        said["weight_map"] = rng.choice([*ODD, [name], {name: [files[0]]}])
    path.write_text(json.dumps(said))
    if what == "text":
        path.write_bytes(rng.choice(GENERAL)(path.read_bytes(), rng))
    elif what == "link":
        (folder / files[0]).rename(folder.parent / "elsewhere.safetensors")
        (folder / files[0]).symlink_to(rng.choice(["../elsewhere.safetensors", files[0], ".", "/dev/zero"]))
    elif what == "gone":
        (folder / files[0]).unlink()
