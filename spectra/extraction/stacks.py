"""The spectrum of a weight that gets one rank for several blocks: a stack of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from spectra.spectrum import DONE, Spectrum


def together(name: str, blocks: Sequence[Spectrum]) -> Spectrum:
    r"""The blocks as one weight of which each rank takes a triplet from every block.

    The i-th value is √Σ_b σ_{bi}², and the shape that of the blocks along a diagonal: r·(out + in) is then what the
    factors of all blocks hold, and Σ_{i>r} σ² the square of what they leave out. A single block is itself.

    Args:
        name: the weight's name.
        blocks: the spectrum of each; one that could not be done takes the weight with it.

    Example:
        >>> blocks = [Spectrum("e[0]", (2, 3), S=[3.0, 1.0]), Spectrum("e[1]", (2, 3), S=[4.0, 0.0])]
        >>> whole = together("e", blocks)
        >>> whole.shape, whole.S.tolist(), whole.rank
        ((4, 6), [5.0, 1.0], 2)
    """
    undone = next((block for block in blocks if block.status not in DONE), None)
    if undone is not None or len(blocks) == 1:
        return replace(undone or blocks[0], name=name)
    rank = max(block.rank for block in blocks)
    S = np.zeros(max(len(block.S) for block in blocks))
    for block in blocks:
        S[: block.rank] += np.square(block.resolved)
    S = np.sqrt(S)
    signal = max(block.signal_rank for block in blocks)
    edges_known = any(block.noise_edge is not None for block in blocks)
    rows, columns = blocks[0].shape
    return Spectrum(
        name,
        (len(blocks) * rows, len(blocks) * columns),
        "ok" if rank else "unchanged",
        S=S,
        norm=math.hypot(*(block.norm or 0.0 for block in blocks)),
        max_rank=len(S) if all(block.complete for block in blocks) else min(rows, columns),
        noise_edge=(float(S[signal]) if signal < len(S) else 0.0) if edges_known else None,
        k=max(block.k for block in blocks),
    )
