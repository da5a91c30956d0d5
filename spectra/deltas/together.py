"""Several small updates read as one: each call of torch or numpy takes as long as a small matrix itself."""

from __future__ import annotations

from collections.abc import Sequence

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import SMALL, Dense
from spectra.deltas.recipes import Difference, differences
from spectra.files.far import Far
from spectra.files.neighbours import read_several
from spectra.files.tensors import TensorRef


def read_small(deltas: Sequence[WeightDelta]) -> dict[int, Dense]:
    """Place among the deltas → what its `read` gives, of small differences of stored weights on this machine.

    Those that cannot be read, and all others, are left out: reading them alone tells why. The numbers are the same as
    those of each alone.
    """
    found: dict[int, Dense] = {}
    alike: dict[tuple, dict[int, Difference]] = {}
    for place, delta in enumerate(deltas):
        if isinstance(delta.recipe, Difference) and all(map(_is_small, delta.refs)):
            pair = delta.recipe.tuned, delta.recipe.base
            kind = (delta.shape, *((ref.dtype, ref.container) for ref in pair))
            alike.setdefault(kind, {})[place] = delta.recipe
    for recipes in alike.values():
        tuned = read_several([recipe.tuned for recipe in recipes.values()])
        base = read_several([recipe.base for recipe in recipes.values()])
        whole = [i for i in range(len(recipes)) if i in tuned and i in base]
        if whole:
            places, those = list(recipes), list(recipes.values())
            forms = differences([those[i] for i in whole], [tuned[i] for i in whole], [base[i] for i in whole])
            found |= zip((places[i] for i in whole), forms, strict=True)
    return found


def _is_small(ref: TensorRef) -> bool:
    """Whether a weight is one to read beside others: a matrix that lies here, as it is."""
    here = ref.codec is None and ref.is_float and not isinstance(ref.storage, Far)
    return here and len(ref.shape) == 2 and 0 < ref.numel <= SMALL
