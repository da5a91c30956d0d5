"""VeRA and PVeRA: ΔW = diag(b)·B·diag(d)·A, with one random A and B for all modules.

Reference: Kopiczko et al. 2024 (VeRA). PVeRA's d and A hold a mean and a log-variance, one half each;
merging takes the mean.
"""

from __future__ import annotations

from functools import partial
from typing import NoReturn

from spectra.deltas.recipes import Factors, Term
from spectra.errors import UnsupportedFormatError
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.ledger import Ledger


def read(ledger: Ledger) -> None:
    """Enter every module's two vectors between the shared projections.

    Raises:
        UnsupportedFormatError: the projections were not saved.
    """
    modules = ledger.modules(slot_pattern(rf"{ledger.kind}_lambda_[bd]"))
    A, B = shared_projections(ledger)
    if ledger.config.get("save_projection") is False:
        ledger.warnings.append(
            "the config says that the projections were not saved, yet they are there: they were used"
        )
    note = "the mean of PVeRA's random update" if ledger.kind == "pvera" else ""
    add_modules_on_base(ledger, modules, partial(_update, ledger, A, B), note=note)


def shared_projections(ledger: Ledger) -> tuple[TensorRef, TensorRef]:
    """The random A and B that all modules share, in a file of VeRA's kin.

    Raises:
        UnsupportedFormatError: they are not in the file.
        SourceError: one of them cannot be read.
    """
    A, B = ledger.shared(f"{ledger.kind}_A"), ledger.shared(f"{ledger.kind}_B")
    if A is None or B is None:
        refuse_unsaved(ledger)
    return A, B


def refuse_unsaved(ledger: Ledger) -> NoReturn:
    """Projections that are not in the file would have to be drawn again.

    Raises:
        UnsupportedFormatError: always.
    """
    raise UnsupportedFormatError(
        f"{ledger.where}: the random projections of {ledger.title} are not in the file (save_projection=false). What "
        "the seed gives depends on the torch build, the device and the dtype; save it again with save_projection=true"
    )


def _update(ledger: Ledger, A: TensorRef, B: TensorRef, module: str, slots: Slots, base: TensorRef) -> Factors:
    """The update of one module: the first columns of A and rows of B, as many as the base's weight has."""
    kind, rank = ledger.kind, ledger.config.get("r")
    b_name, d_name = f"{kind}_lambda_b", f"{kind}_lambda_d"
    b, d = Slots({**slots, "A": A, "B": B}).real(b_name, d_name, "A", "B")[:2]
    (out, inside), parts = base.shape, 2 if kind == "pvera" else 1
    if len(d.shape) != 1 or len(A.shape) != 2 or d.shape[0] != A.shape[0] or A.shape[0] % parts:
        raise Refusal(f"{d_name} {list(d.shape)} does not fit the projection {kind}_A {list(A.shape)}")
    r = A.shape[0] // parts
    if rank is not None and rank != r:
        raise Refusal(f"the config says r = {rank}, the projection {kind}_A has {r}")
    if b.shape != (out,):
        raise Refusal(f"{b_name} has {list(b.shape)} entries, the base weight {out} rows")
    if len(B.shape) != 2 or B.shape[1] != r or B.shape[0] < out or A.shape[1] < inside:
        raise Refusal(
            f"the projections {list(B.shape)} and {list(A.shape)} are too small for {list(base.shape)} at r = {r}"
        )
    left, right = B.rows(0, out), A.rows(0, r).T.rows(0, inside).T
    return Factors((Term((left,), right, row_scale=b, inner_scale=d.rows(0, r)),))
