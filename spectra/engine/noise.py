"""Which story of how the weights were rounded can be true, now that the singular values are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spectra.deltas.rounding import Noise

_LEAST = 0.75  # of its energy that a story has to find: half of it, or all, where a rounding more was assumed


def plausible_noise(stories: Sequence[Noise], S: np.ndarray, norm: float, shape: tuple[int, ...]) -> Noise | None:
    r"""The story with the most noise of those that the spectrum does not refute; the last one where it refutes all.

    Errors that are independent of the update leave their energy behind: what is below the edge, ‖ΔW‖² − Σσ² over the
    k values above, is at least that of the errors outside k directions of either side, E·(1 − k/m)(1 − k/n). Where
    less is there, the rounding that the story assumes did not take place. Energy of the update itself below the
    edge counts in favour of more noise, so that in doubt a value is not called signal.

    Args:
        stories: the one with the most noise first.
        S: singular values, descending, all or the top ones.
        norm: ‖ΔW‖_F.
        shape: (m, n).

    Example:
        >>> stories = (Noise(4.0, 32.0, "two roundings"), Noise(2.8, 16.0, "one rounding"))
        >>> found = plausible_noise(stories, np.array([9.0, 2.0, 2.0, 2.0, 2.0]), 97**0.5, (5, 5))
        >>> found.said
        'one rounding'
    """
    for story in stories:
        above = S[story.edge < S]
        k = len(above)
        expected = story.energy * (1 - k / shape[0]) * (1 - k / shape[1])
        if norm**2 - float(np.square(above).sum()) >= _LEAST * expected:
            return story
    return stories[-1] if stories else None
