"""LN tuning: layer norms saved with new values (Zhao et al. 2024). Norms are vectors, so it rarely holds a matrix."""

from __future__ import annotations

from spectra.deltas.source import Source
from spectra.errors import UnsupportedFormatError
from spectra.files.folder import Folder
from spectra.sources.adapter import add_rest, modules_of, refuse_options, slot_pattern
from spectra.sources.ledger import Ledger

KIND = "ln_tuning"
_LAYER = ".ln_tuning_layers."


def open_ln_tuning(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """List the norms as what they are, vectors, and read what was saved whole beside them.

    Raises:
        UnsupportedFormatError: there is no matrix in it.
    """
    if all(len(ref.shape) < 2 for ref in tuned.tensors.values()):
        raise UnsupportedFormatError(
            f"{tuned.path} tunes layer norms: it holds {len(tuned.tensors)} vectors and no matrix, so there is nothing "
            "to decompose"
        )
    ledger = Ledger(tuned, base)
    refuse_options(ledger, heads, scale)
    modules, rest = modules_of(ledger, slot_pattern("ln_tuning_layers"))
    for module, slots in modules.items():
        shape = slots["ln_tuning_layers"].shape
        if len(shape) < 2:
            ledger.skipped[f"{module}.weight"] = "a norm's new values: a vector, not a matrix"
        else:
            ledger.refuse(f"{module}.weight", shape, "unsupported", "LN tuning of something that is not a norm")
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)
