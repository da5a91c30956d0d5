"""VeRA and PVeRA: ΔW = diag(b)·B·diag(d)·A, with one random A and B for all modules.

Reference: Kopiczko et al. 2024 (VeRA), §3.1. PVeRA's d and A hold a mean and a log-variance, one half each;
merging takes the mean.
"""

from __future__ import annotations

from functools import partial
from typing import NoReturn

from spectra.deltas.recipes import Factors, Term
from spectra.deltas.source import Source
from spectra.errors import UnsupportedFormatError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import (
    Slots,
    add_modules_on_base,
    add_rest,
    modules_of,
    need_base,
    refuse_options,
    shared_tensor,
    slot_pattern,
    unusable,
)
from spectra.sources.ledger import Ledger

KIND = "vera"
KIND_PVERA = "pvera"


def open_vera(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the shared projections and every module's two vectors.

    Raises:
        BaseRequiredError: there is no base; the file does not hold how wide the weights are.
        UnsupportedFormatError: the projections were not saved.
    """
    return _open(Ledger(tuned, base), KIND, "VeRA", 1, split, heads, scale)


def open_pvera(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """The same for PVeRA, whose mean is what merging takes."""
    return _open(Ledger(tuned, base), KIND_PVERA, "PVeRA", 2, split, heads, scale)


def _open(
    ledger: Ledger, kind: str, title: str, parts: int, split: bool, heads: str | int, scale: float | None
) -> Source:
    refuse_options(ledger, heads, scale)
    modules, rest = modules_of(ledger, slot_pattern(rf"{kind}_lambda_[bd]"))
    A, rest = shared_tensor(ledger, rest, f"{kind}_A")
    B, rest = shared_tensor(ledger, rest, f"{kind}_B")
    if A is None or B is None:
        refuse_unsaved(ledger.tuned, title)
    need_base(ledger, title, "needs the shapes of the weights, which its file does not hold")
    config = ledger.tuned.adapter_config or {}
    if config.get("save_projection") is False:
        ledger.warnings.append(
            "the config says that the projections were not saved, yet they are there: they were used"
        )
    build = partial(_update, kind, parts, config.get("r"), A, B)
    note = "the mean of PVeRA's random update" if parts == 2 else ""
    add_modules_on_base(ledger, modules, build, split=split, note=note)
    add_rest(ledger, rest, split=split)
    return ledger.source(kind)


def refuse_unsaved(tuned: Folder, title: str) -> NoReturn:
    """Projections that are not in the file would have to be drawn again.

    Raises:
        UnsupportedFormatError: always.
    """
    raise UnsupportedFormatError(
        f"{tuned.path}: the random projections of {title} are not in the file (save_projection=false). What the seed "
        "gives depends on the torch build, the device and the dtype; save it again with save_projection=true"
    )


def _update(
    kind: str, parts: int, rank: object, A: TensorRef, B: TensorRef, module: str, slots: Slots, base: TensorRef
) -> Factors | str:
    b_name, d_name = f"{kind}_lambda_b", f"{kind}_lambda_d"
    why = unusable({**slots, "A": A, "B": B}, (b_name, d_name, "A", "B"))
    if why:
        return why
    b, d = slots[b_name], slots[d_name]
    out, inside = base.shape
    if len(d.shape) != 1 or len(A.shape) != 2 or d.shape[0] != A.shape[0] or A.shape[0] % parts:
        return f"{d_name} {list(d.shape)} does not fit the projection {kind}_A {list(A.shape)}"
    r = A.shape[0] // parts
    if rank is not None and rank != r:
        return f"the config says r = {rank}, the projection {kind}_A has {r}"
    if b.shape != (out,):
        return f"{b_name} has {list(b.shape)} entries, the base weight {out} rows"
    if len(B.shape) != 2 or B.shape[1] != r or B.shape[0] < out or A.shape[1] < inside:
        return f"the projections {list(B.shape)} and {list(A.shape)} are too small for {list(base.shape)} at r = {r}"
    left, right = B.rows(0, out), A.rows(0, r).T.rows(0, inside).T
    return Factors((Term((left,), right, row_scale=b, inner_scale=d.rows(0, r)),))
