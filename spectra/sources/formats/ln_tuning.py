"""LN tuning: layer norms saved with new values (Zhao et al. 2024). Norms are vectors, so it rarely holds a matrix."""

from __future__ import annotations

from spectra.errors import UnsupportedFormatError
from spectra.sources.adapter import slot_pattern
from spectra.sources.ledger import Ledger


def read(ledger: Ledger) -> None:
    """List the norms as what they are, vectors; what is saved whole beside them is read as everywhere.

    Raises:
        UnsupportedFormatError: there is no matrix in it.
    """
    tensors = ledger.tuned.tensors
    if all(len(ref.shape) < 2 for ref in tensors.values()):
        raise UnsupportedFormatError(
            f"{ledger.where} tunes layer norms: it holds {len(tensors)} vectors and no matrix, so there is nothing "
            "to decompose"
        )
    for module, slots in ledger.modules(slot_pattern("ln_tuning_layers")).items():
        (values,) = slots.values()
        if len(values.shape) < 2:
            ledger.use([values])
            ledger.skipped[f"{module}.weight"] = "a norm's new values: a vector, not a matrix"
        else:
            why = "LN tuning of something that is not a norm"
            ledger.refuse(f"{module}.weight", values.shape, "unsupported", why)
