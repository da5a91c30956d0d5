"""What a page that is sent says of places on the sender's machine: enough to know a file by, and not where it lies."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath

_KEPT = 2  # the last parts of a path
_CACHED = "models--"  # a folder of the hub's cache, which says more than what lies in it
_INSIDE = re.compile(r"""(?<![\w:/\\.~<…])(?:[A-Za-z]:[\\/]|/(?!/))[^\s,;:'"()<>]*[\\/][^\s,;:'"()<>]+""")


def shorter(path: str) -> str:
    """A path from the root as its last two parts, a model of the hub's cache by its id; anything else as it is.

    >>> shorter("/home/me/runs/a/tuned"), shorter("runs/a/tuned"), shorter("https://host/a/b/c")
    ('…/a/tuned', 'runs/a/tuned', 'https://host/a/b/c')
    >>> shorter("/home/me/.cache/huggingface/hub/models--org--name/snapshots/1f2e/model.safetensors")
    'org/name/model.safetensors'
    """
    pure = PureWindowsPath(path) if re.match(r"[A-Za-z]:[\\/]|\\\\", path) else PurePosixPath(path)
    if not pure.is_absolute():
        return path
    parts = pure.parts[1:]
    cached = next((i for i, part in enumerate(parts) if part.startswith(_CACHED)), None)
    if cached is not None:
        model = parts[cached].removeprefix(_CACHED).replace("--", "/")
        return "/".join([model, *parts[cached + 3 :]])  # behind "snapshots" and the revision
    return "/".join(["…", *parts[-_KEPT:]]) if len(parts) > _KEPT else "/".join(["…", *parts[-1:]])


def without_places(words: str) -> str:
    """A sentence with every path from the root in it made shorter.

    >>> without_places("/home/me/a/b.safetensors is damaged; see https://host/x/y")
    '…/a/b.safetensors is damaged; see https://host/x/y'
    """
    return _INSIDE.sub(lambda found: shorter(found[0]), words)
