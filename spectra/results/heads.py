"""`head_similarity`: how alike the heads of a multi-head adapter are, module by module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from spectra import naming
from spectra.deltas.at_work import Account, accounted
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import LowRank
from spectra.deltas.recipes import Factors
from spectra.errors import SelectionError, SpectraError, refuse_path_for_source
from spectra.lazy import torch
from spectra.metrics.heads import head_cosines, mean_pairwise, update_cosines
from spectra.results.partners import weight_of

if TYPE_CHECKING:
    import pandas as pd

    from spectra.results.tables import Row

_NUMBERS = ("heads", "cosine", "chance", "cosines", "norm", "norms", "update_cosine", "update_norms")
COLUMNS = ("name", "role", "layer", "status", *_NUMBERS, "reason", "note")


def head_similarity(source: Iterable[WeightDelta]) -> pd.DataFrame:
    """The mean pairwise cosine of an adapter's heads, one row per module, with their norms: R-LoRA's own diagnostic.

    `cosine` is the mean of `cosines`, N×N, of the stored matrices B_k, flattened; `norms` are ‖B_k‖_F and `norm` their
    mean. Heads that do not share A (MultiLoRA, LoRAMoE) may be the same update in another basis: `update_cosine` is
    that of s·B_k·A_k, whose norms are `update_norms`; the offset of R-LoRA, which all heads have, is in neither.
    `chance` is the standard deviation of a cosine of two random heads, 1/√(out·r), around 0.

    Args:
        source: an adapter with several heads, opened with heads="each".

    Raises:
        SelectionError: no module has two heads.

    Example:
        >>> import spectra
        >>> source = spectra.open_source("my-rlora/", heads="each")                # doctest: +SKIP
        >>> head_similarity(source).groupby("role")["cosine"].mean()               # doctest: +SKIP

    Reference: Liu et al. 2025 (R-LoRA); the averages published for HydraLoRA are .78 (up), .80 (down) and .76 (gate).
    """
    import pandas as pd

    return pd.DataFrame(list(head_rows(source)))


def head_rows(source: Iterable[WeightDelta]) -> Iterator[Row]:
    """The rows of `head_similarity`, each as soon as its module is read; arguments and errors as there."""
    modules = heads_of(source)
    entries = {name: float(sum(ref.numel for head in heads for ref in head.refs)) for name, heads in modules.items()}
    rows = (_row(name, heads) for name, heads in modules.items())
    return accounted(rows, Account(entries, sum(entries.values())), lambda row: str(row["name"]))


def heads_of(source: Iterable[WeightDelta]) -> dict[str, list[WeightDelta]]:
    """Weight → its heads, of weights that have several.

    Raises:
        SelectionError: none has.
    """
    refuse_path_for_source(source, "head_similarity")
    modules: dict[str, list[WeightDelta]] = {}
    for delta in source:
        if weight_of(delta.name) != delta.name or delta.recipe is None:
            modules.setdefault(weight_of(delta.name), []).append(delta)
    several = {name: heads for name, heads in modules.items() if len(heads) > 1 or heads[0].recipe is None}
    if not any(len(heads) > 1 for heads in several.values()):
        raise SelectionError(
            "no module has two heads to compare: give an adapter of several heads (R-LoRA, HydraLoRA, MultiLoRA), "
            'opened with heads="each" in Python; two adapters are compared by similarity'
        )
    return several


def _row(name: str, heads: Sequence[WeightDelta]) -> Row:
    try:
        numbers = _numbers(heads)
        return _line(name, "ok") | numbers
    except SpectraError as problem:
        broken = next((head for head in heads if head.recipe is None), None)
        return _line(name, broken.status, broken.reason) if broken else _line(name, "unreadable", str(problem))


def _line(name: str, status: str, reason: str = "") -> Row:
    return {
        "name": name,
        "role": naming.role_of(name),
        "layer": naming.layer_of(name),
        "status": status,
        **dict.fromkeys(_NUMBERS),
        "reason": reason,
        "note": "",
    }


def _numbers(heads: Sequence[WeightDelta]) -> Row:
    """What is said of the heads of one module."""
    matrices, updates = [], []
    for head in heads:
        if not isinstance(head.recipe, Factors) or len(head.recipe.terms[0].lefts) != 1:
            raise SelectionError(f"{head.name} is no head of the form B·A")
        term = head.recipe.terms[0]  # the offset, which all heads share, comes after it
        matrices.append(term.lefts[0].read_float64("cpu"))
        updates.append(LowRank(*term.read("cpu")))
    if any(not bool(torch.isfinite(tensor).all()) for update in updates for tensor in update.tensors):
        raise SelectionError("entries are NaN or infinite")
    cosines, norms = head_cosines(matrices), [float(head.norm()) for head in matrices]
    return {
        "heads": len(heads),
        "cosine": mean_pairwise(cosines),
        "chance": 1 / math.sqrt(matrices[0].numel()),
        "cosines": cosines,
        "norm": math.fsum(norms) / len(norms),
        "norms": norms,
        "update_cosine": mean_pairwise(update_cosines(updates)),
        "update_norms": [update.norm for update in updates],
    }
