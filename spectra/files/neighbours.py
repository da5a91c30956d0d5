"""Several stored tensors read at once: those that lie side by side in a file of this machine come by one read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from spectra.errors import SourceError
from spectra.files.dtypes import DTYPES, plain_bytes
from spectra.files.storage import DISK
from spectra.files.tensors import TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST = 2**22  # bytes of a run


def read_several(refs: Sequence[TensorRef]) -> dict[int, Tensor]:
    """Place among the references → the tensor in its storage type, as `TensorRef.read_real` gives it.

    Those that cannot be read are left out: reading one of them alone tells why.
    """
    found: dict[int, Tensor] = {}
    for run in _runs(refs):
        with suppress(SourceError):
            found |= _read_run(refs, run) if len(run) > 1 else {run[0]: refs[run[0]].read_real()}
    return found


def _runs(refs: Sequence[TensorRef]) -> Iterator[list[int]]:
    """The places of the references, neighbours in one list and every other in its own."""
    run: list[int] = []
    for place in sorted(range(len(refs)), key=lambda place: (refs[place].path, refs[place].offset)):
        if run and not _follows(refs[run[0]], refs[run[-1]], refs[place]):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _follows(first: TensorRef, last: TensorRef, ref: TensorRef) -> bool:
    """Whether a tensor lies right behind another one, plainly, and the run would not become too long with it."""
    alike = (ref.path, ref.stamp, ref.dtype) == (last.path, last.stamp, last.dtype)
    plain = all(_is_plain(one) for one in (last, ref))
    return (
        alike
        and plain
        and ref.offset == last.offset + last.bytes_read
        and ref.offset + ref.bytes_read - first.offset <= _LONGEST
    )


def _is_plain(ref: TensorRef) -> bool:
    return ref.container == "safetensors" and ref.codec is None and ref.storage == DISK and ref.is_float


def _read_run(refs: Sequence[TensorRef], run: Sequence[int]) -> dict[int, Tensor]:
    """Neighbours of one type.

    Raises:
        SourceError: the file is gone, changed or ends too early.
    """
    first, last = refs[run[0]], refs[run[-1]]
    first.check_unchanged()
    content = torch.empty(last.offset + last.bytes_read - first.offset, dtype=torch.uint8)
    if first.file.read_into(first.offset, content.numpy().data) < len(content):
        raise SourceError(f"{first.file} ends inside {last.name}")
    first.check_unchanged()  # it may have while it was read
    entries = content.view(getattr(torch, DTYPES[first.dtype][0]))
    width = plain_bytes(first.dtype, 1) or 1
    found = {}
    for place in run:
        start, ref = (refs[place].offset - first.offset) // width, refs[place]
        found[place] = ref.view(entries[start : start + ref.bytes_read // width].reshape(ref.stored))
    return found
