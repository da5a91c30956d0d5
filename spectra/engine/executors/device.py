"""Many updates of one shape at once on a device, the next batch read while this one computes.

The same code runs on any device; the tests run it on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Event

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Form
from spectra.engine.devices import Device
from spectra.engine.schedule import Batch
from spectra.engine.solve import Wanted, read, solve_forms
from spectra.spectrum import Spectrum

Read = list[Form | Spectrum]  # a form, or the result if there is none to solve


def decompose_batches(
    deltas: Sequence[WeightDelta], batches: Sequence[Batch], wanted: Wanted
) -> Iterator[tuple[int, Spectrum]]:
    """The spectra of all batches, each with its delta's position.

    Args:
        deltas: all deltas.
        batches: what to solve together, in order.
        wanted: what to compute, and on which device.
    """
    device = wanted.device
    device.settle()  # what the caller has put there is there for the reader's stream, too
    remark = device.remark
    stop = Event()
    with ThreadPoolExecutor(1, thread_name_prefix="spectra-read") as reader:
        try:
            coming: Future[Read] | None = None
            for place, batch in enumerate(batches):
                members = [deltas[task.index] for task in batch.tasks]
                forms = (coming or reader.submit(read_batch, members, device, stop)).result()
                following = batches[place + 1] if place + 1 < len(batches) else None
                coming = None
                if following and following.ahead:
                    coming = reader.submit(read_batch, [deltas[task.index] for task in following.tasks], device, stop)
                device.hand_over(tensor for form in forms if isinstance(form, Form) for tensor in form.tensors)
                spectra = solve_forms(members, forms, wanted)
                del forms  # not kept while the results are stored and the batch after the next is read
                yield from zip([task.index for task in batch.tasks], (_noted(s, remark) for s in spectra), strict=True)
        finally:
            stop.set()  # a run that is given up waits for the matrix that is being read, not for its batch


def read_batch(members: Sequence[WeightDelta], device: Device, stop: Event) -> Read:
    """The forms of deltas on the device; a result with a status for those that cannot be read.

    The reading goes on beside what another thread computes there; when this returns, it is done.

    Args:
        members: the deltas.
        device: where their forms go.
        stop: once set, no further delta is read.
    """
    found: Read = []
    with device.reading() as finish:
        for delta in members:
            if stop.is_set():
                break
            found.append(read(delta, device.name, finish))
    return found


def _noted(spectrum: Spectrum, remark: str) -> Spectrum:
    """The result with what its device has to say of it, if it was solved there."""
    return replace(spectrum, method=f"{spectrum.method}; {remark}") if remark and spectrum.method else spectrum
