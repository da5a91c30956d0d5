"""What other machines send back is looked at before it is believed: who sent it, whether it fits, and is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectra._version import __version__
from spectra.deltas.delta import WeightDelta
from spectra.engine import check
from spectra.engine.extremes import within_range
from spectra.errors import SpectraError
from spectra.spectrum import DONE, Spectrum

_LARGEST = 2**24  # entries of a matrix that the driver reads to check a worker: a second for 4096²
_NORM_BOUND = 1e-9  # on ‖ΔW‖_F, which both compute in float64


@dataclass(frozen=True)
class Answer:
    """A result, and who gave it.

    Attributes:
        spectrum: the result.
        version: of the package on that worker.
        worker: its address.
    """

    spectrum: Spectrum
    version: str
    worker: str


@dataclass(frozen=True)
class Signed:
    """Work whose result says who did it; travels to workers.

    Attributes:
        work: what to do with a delta.
    """

    work: Callable[[WeightDelta], Spectrum]

    @property
    def device(self) -> str:
        """Where the work is to be done."""
        return str(getattr(self.work, "device", ""))

    def __call__(self, delta: WeightDelta) -> Answer:
        """Do it where this runs."""
        from distributed import get_worker

        return Answer(self.work(delta), __version__, str(get_worker().address))


@dataclass
class Trust:
    """What is known of the workers.

    Attributes:
        checked: the workers of which a result was held against what this machine makes of the same matrix.
    """

    checked: set[str] = field(default_factory=set)

    def accept(self, delta: WeightDelta, answer: Any) -> Spectrum:
        """The result, once it is known to fit, and of each worker's first one that is small enough, to be right.

        Raises:
            SpectraError: it is not; whatever else that worker sends is worth as little.
        """
        if not isinstance(answer, Answer) or answer.version != __version__:
            theirs = f"{answer.worker} has {answer.version}" if isinstance(answer, Answer) else "one has another"
            raise SpectraError(f"every worker needs spectra {__version__}, as here: {theirs}")
        spectrum = answer.spectrum
        why = misfit(delta, spectrum)
        if not why and answer.worker not in self.checked and spectrum.status in DONE and _is_small(delta):
            why = error_in(delta, spectrum)
            self.checked.add(answer.worker)
        if why:
            raise SpectraError(
                f"the worker {answer.worker} sent wrong numbers for {delta.name} ({why}): stop it, and run the same "
                f"again with another directory (out=, --out), since what it sent before may be wrong, too"
            )
        return spectrum


def misfit(delta: WeightDelta, spectrum: Spectrum) -> str:
    """Why a result cannot be that of a delta, as far as it shows without reading ΔW; "" where it can.

    Example:
        >>> delta = WeightDelta.from_tensor("a.weight", torch.diag(torch.tensor([3.0, 4.0])))
        >>> misfit(delta, Spectrum("a.weight", (2, 2), S=[4.0, 3.0]))
        ''
        >>> misfit(delta, Spectrum("a.weight", (2, 2), S=[8.0, 6.0], norm=5.0))
        'Σσ² = 1.000000000000e+02 is not ‖ΔW‖² = 2.500000000000e+01'
    """
    if (spectrum.name, spectrum.shape) != (delta.name, tuple(delta.shape)):
        return f"they are called {spectrum.name}, {list(spectrum.shape)}"
    if spectrum.status not in DONE:
        return ""
    k, (rows, columns) = spectrum.k, spectrum.shape
    shapes = [None if side is None else side.shape for side in (spectrum.U, spectrum.Vh)]
    if shapes not in ([None, None], [(rows, k), (k, columns)]) or k > len(spectrum.S):
        return f"vectors of shapes {shapes}"
    norm = math.nan if spectrum.norm is None else spectrum.norm
    if not 0 <= norm < math.inf or len(spectrum.S) > min(rows, columns):
        return f"{len(spectrum.S)} values and a norm of {norm}"
    S = _tensor(spectrum.S)
    largest = float(S.max()) if len(S) else 0.0
    if not 1e-70 < largest < 1e70:
        return ""  # their squares tell nothing
    return check.value_fault(S, norm, spectrum.resolution, spectrum.complete)


def error_in(delta: WeightDelta, spectrum: Spectrum) -> str:
    """What this machine finds wrong with a result by reading ΔW: its norm, and its vectors where there are some.

    Example:
        >>> delta = WeightDelta.from_tensor("a.weight", torch.diag(torch.tensor([3.0, 4.0])))
        >>> error_in(delta, Spectrum("a.weight", (2, 2), S=[8.0, 6.0]))
        '‖ΔW‖_F is 10 there and 5 here'
    """
    form, exponent = within_range(delta.read("cpu"))
    if exponent:
        return ""
    norm = spectrum.norm or 0.0
    if not abs(form.norm - norm) <= _NORM_BOUND * form.norm + form.magnitude * 1e-12:
        return f"‖ΔW‖_F is {norm:.12g} there and {form.norm:.12g} here"
    if spectrum.status != "ok":
        return ""
    S, fourth = _tensor(spectrum.S), form.fourth_moment
    why = check.value_fault(S, form.norm, spectrum.resolution, spectrum.complete, fourth=fourth)
    if why or spectrum.U is None or spectrum.Vh is None:
        return why
    U, Vh = _tensor(spectrum.U), _tensor(spectrum.Vh)
    return check.vector_fault(form, S, U, Vh, spectrum.resolution)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float64))  # a copy: what arrived may be read-only or reversed


def _is_small(delta: WeightDelta) -> bool:
    return math.prod(delta.shape) <= _LARGEST or (delta.factored and sum(delta.shape) * delta.max_rank <= _LARGEST)
