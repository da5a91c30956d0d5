"""Many updates of one shape at once on a device, the next batch read while this one computes.

The same code runs on any device; the tests run it on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
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

    What memory is too small for beside others of its batch, or beside the next one, is done alone in the end.

    Args:
        deltas: all deltas.
        batches: what to solve together, in order.
        wanted: what to compute, and on which device.
    """
    device = wanted.device
    device.settle()  # what the caller has put there is there for the reader's stream, too
    remark, crowded, stop = device.remark, list[int](), Event()
    with ThreadPoolExecutor(1, thread_name_prefix="spectra-read") as reader:

        def start(indices: Sequence[int]) -> Future[Read]:
            return reader.submit(read_batch, [deltas[index] for index in indices], device, stop)

        try:
            coming: Future[Read] | None = None
            for batch, following in zip_longest(batches, batches[1:]):
                indices = [task.index for task in batch.tasks]
                beside_others = len(indices) > 1 or coming is not None
                forms = (coming or start(indices)).result()
                ahead = following is not None and following.ahead
                coming = start([task.index for task in following.tasks]) if ahead else None
                spectra = _solved([deltas[index] for index in indices], forms, wanted)
                del forms  # not kept while the results are stored and the batch after the next is read
                for index, spectrum in zip(indices, spectra, strict=True):
                    if spectrum.status == "too_large" and (beside_others or ahead):
                        crowded.append(index)
                    else:
                        yield index, _noted(spectrum, remark)
            for index in crowded:
                device.release()
                (spectrum,) = _solved([deltas[index]], start([index]).result(), wanted)
                yield index, _noted(_once_more(spectrum), remark)
        finally:
            stop.set()  # a run that is given up waits for the matrix that is being read, not for its batch


def _solved(members: Sequence[WeightDelta], forms: Read, wanted: Wanted) -> list[Spectrum]:
    """The results of what another thread has read."""
    wanted.device.hand_over(tensor for form in forms if isinstance(form, Form) for tensor in form.tensors)
    return solve_forms(members, forms, wanted)


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


def _once_more(spectrum: Spectrum) -> Spectrum:
    """The result of what had no room beside others, which is said."""
    if not spectrum.method:
        return spectrum
    return replace(spectrum, method=f"memory ran out beside others; then {spectrum.method}")


def _noted(spectrum: Spectrum, remark: str) -> Spectrum:
    """The result with what its device has to say of it, if it was solved there."""
    return replace(spectrum, method=f"{spectrum.method}; {remark}") if remark and spectrum.method else spectrum
