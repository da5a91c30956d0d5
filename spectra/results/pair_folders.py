"""Where a directory keeps every pair of several updates, and `load_pairs`, which pools what lies there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from spectra import naming
from spectra.errors import StoreError
from spectra.metrics.similarity import SIDES, Side, SubspaceSimilarity
from spectra.results.pairs import Pair, Pairs
from spectra.results.store import Store

PAIRS = "pairs"  # the folder in a results directory that has a results directory for each pair
_LONGEST = 60  # characters of an update's name in a folder's


def load_pairs(directory: str | Path, *, layers: str | Sequence[str] = (), sides: Sequence[Side] = SIDES) -> Pairs:
    """What `compare_all(…, out=directory)` stored, pooled anew without computing.

    Args:
        directory: where it is.
        layers: only the matrices that these patterns mean; () for all.
        sides: which of the stored sides.

    Raises:
        StoreError: it holds no comparison of several updates, or one of its files is damaged.
        SelectionError: layers select nothing.
    """
    folders: dict[str, list[str]] = Store(directory).run().get("pairs", {})
    kept = [
        Pair(a, b, item)
        for folder, (a, b) in folders.items()
        for item in Store(Path(directory) / PAIRS / folder).similarities()
    ]
    if not kept:
        raise StoreError(
            f"{directory} holds no comparison of several updates; make one with compare_all(…, out={str(directory)!r}) "
            f"or spectra similarity A B C --out {directory}"
        )
    names = dict.fromkeys(pair.outcome.name for pair in kept)
    chosen = set(naming.select(layers, names)) if layers else set(names)
    labels = dict.fromkeys(label for pair in folders.values() for label in pair)
    wanted = (pair for pair in kept if pair.outcome.name in chosen)
    return Pairs(
        (pair for pair in wanted if isinstance(pair.outcome, SubspaceSimilarity) and pair.outcome.side in sides),
        labels=list(labels),
    )


def pair_folder(a: str, b: str) -> str:
    """What the directory of a pair is called: the last folders' names, and a few digits that tell equal ones apart.

    >>> pair_folder("runs/a", "runs/b")
    'runs-a~runs-b~96f49a'
    """
    ends = ("-".join(Path(label).parts[-2:]).replace("/", "")[-_LONGEST:] or "update" for label in (a, b))
    digest = hashlib.sha256(f"{a}|{b}".encode()).hexdigest()[:6]
    return "~".join((*ends, digest))
