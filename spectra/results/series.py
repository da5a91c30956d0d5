"""`series`: an update along training, checkpoint by checkpoint and matrix by matrix."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from spectra.deltas.source import Source
from spectra.errors import DeviceError, SelectionError, SourceError, SpectraError, StoreError
from spectra.files.folder import Folder
from spectra.files.ranges import read_again
from spectra.files.remote import is_url
from spectra.metrics import METRICS
from spectra.metrics.similarity import SIDES, Side, SubspaceSimilarity, subspace_similarity
from spectra.metrics.start import start_share
from spectra.models.opening import open_any
from spectra.results import run_file, tables
from spectra.results.collection import Spectra
from spectra.results.homes import home_of
from spectra.results.series_table import LEVELS, MEASURED, TABLE, step_folder, stored_steps
from spectra.results.start import Start
from spectra.results.steps import Moment, in_order
from spectra.results.store import Store
from spectra.results.streams import decompose
from spectra.results.tables import Row
from spectra.results.writing import ANOTHER_PLACE, write
from spectra.sources import open_source
from spectra.spectrum import Spectrum
from spectra.text import matrices

if TYPE_CHECKING:
    import pandas as pd

KIND = "series"
_PROBLEMS_OF_ALL = (StoreError, DeviceError)  # not one checkpoint's


def series(
    checkpoints: Sequence[str | Path] | str | Path = (),
    base: str | Path | None = None,
    *,
    layers: str | Sequence[str] = (),
    top: int = 10,
    side: Side = "left",
    steps: Sequence[int] | None = None,
    start: str | Path | None = None,
    out: str | Path | None = None,
    **others: Any,
) -> pd.DataFrame:
    """The update along training: one row per checkpoint and matrix, in the order of training.

    Beside the step stand the metrics of the update; `phi_to_last` and `phi_to_previous`, the subspace similarity
    φ(k, k) to the last checkpoint and to the one before; and `start_left`, `start_right`, the share of the energy of
    the top k directions that lies in the start's (`spectra.metrics.start`); each with its chance level beside it. The
    start is what the factors of `start=`, or of the first checkpoint, span; of a full fine-tune, the top k directions
    of the first checkpoint.

    A checkpoint that cannot be read is one row without a name whose `reason` says why, and the others go on.

    The last checkpoint is decomposed first, and then at most three are in memory. With `out`, every result is kept
    there, only what is new is decomposed when the call comes again with more checkpoints, and what is stored of
    checkpoints that are not given, or no longer there, stays part of the series. The table is `series.csv` there.

    Args:
        checkpoints: full models or adapters of one run, in any order; none for what `out` holds.
        base: the model it started from; adapters need it for relative norms only, most of them.
        layers: only the matrices that these patterns mean; () for all.
        top: k.
        side: "left" or "right", for φ.
        steps: the step of each checkpoint, instead of looking for it in `trainer_state.json` and the names.
        start: the adapter as it was before training, saved at step 0.
        out: a directory for the spectra, with the top vectors, and the table.
        others: as for `open_source` (split, heads, scale) and `decompose` (device, executor, memory_budget).

    Raises:
        SelectionError: no step is known for a checkpoint, two are of one step, or there are no checkpoints.
        StoreError: `out` holds results of other inputs, or cannot be written to.
        SpectraError: no checkpoint can be read; the message is the first one's.
    """
    import pandas as pd

    rows = series_rows(
        checkpoints, base, layers=layers, top=top, side=side, steps=steps, start=start, out=out, **others
    )
    return pd.DataFrame(list(rows))


def series_rows(
    checkpoints: Sequence[str | Path] | str | Path = (),
    base: str | Path | None = None,
    *,
    layers: str | Sequence[str] = (),
    top: int = 10,
    side: Side = "left",
    steps: Sequence[int] | None = None,
    start: str | Path | None = None,
    out: str | Path | None = None,
    reach: Callable[[str], str | Folder] = lambda path: path,
    opened: Callable[[Source], Source] = lambda source: source,
    notes: list[str] | None = None,
    reused: list[str] | None = None,
    **others: Any,
) -> Iterator[Row]:
    """The rows of `series` in their order, a checkpoint at a time.

    Args:
        reach: gives what to open of a path.
        opened: is told of every source, the last first, and gives what to read.
        notes: gets what was found damaged in `out`, as far as the rows have come.
        reused: gets the name of each matrix of a checkpoint that was stored there before, likewise.
    """
    notes, reused = [] if notes is None else notes, [] if reused is None else reused
    checkpoints = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
    if top < 1:
        raise SelectionError(f"top = {top} is not a positive number of directions")
    if side not in SIDES:
        raise SelectionError(f"side={side!r} is not left or right")
    options = {"split": True, "heads": "mean", "scale": None} | {
        key: others.pop(key) for key in ("split", "heads", "scale") if key in others
    }
    home = home_of(out) if out is not None else None
    given = in_order(checkpoints, steps)
    stored = stored_steps(home) if home else {}
    if home is not None and given:
        inputs = {"kind": KIND, "base": _whole_path(base), "options": options}
        _claim(home, inputs, stored, {moment.step for moment in given}, notes)
    if not given and not stored:
        raise SelectionError("a series needs checkpoints, and none was given" + (f" or is in {home}" if home else ""))
    at = open_any(reach(str(base)), as_base=True) if given and base is not None else None
    chosen = tuple([layers] if isinstance(layers, str) else layers)
    run = _Run(at, chosen, top, options, others, home, reach, opened, notes, reused)
    moments = {moment.step: moment for moment in given}
    return _Series(run, [(step, moments.get(step)) for step in sorted({*stored, *moments})], side, start).rows()


def count_new(
    checkpoints: Sequence[str | Path], steps: Sequence[int] | None = None, out: str | Path | None = None
) -> int:
    """How many of the checkpoints nothing is stored of in `out`; arguments as for `series`."""
    stored = stored_steps(home_of(out)) if out is not None else {}
    return sum(moment.step not in stored for moment in in_order(checkpoints, steps))


@dataclass(frozen=True)
class _Run:
    """How to get the spectra of a checkpoint."""

    base: Folder | None
    layers: tuple[str, ...]
    top: int
    options: dict[str, Any]
    compute: dict[str, Any]
    home: Path | None
    reach: Callable[[str], str | Folder]
    opened: Callable[[Source], Source]
    notes: list[str]
    reused: list[str]

    def source(self, path: str | Path) -> Source:
        """What a checkpoint updates, of the layers that are wanted."""
        source = open_source(self.reach(str(path)), self.base, **self.options)
        return source.select(self.layers) if self.layers else source

    def look(self, step: int, moment: Moment | None) -> _Look:
        """The spectra of one checkpoint: stored, or computed now."""
        if moment is None:
            assert self.home is not None
            folder = step_folder(self.home, step)
            spectra = Spectra.stored(folder)
            path = str(spectra.run.get("inputs", {}).get("tuned") or folder)
            spectra = spectra.select(self.layers) if self.layers else spectra
            self.reused.extend(spectra.names)
            return _Look(step, path, spectra)
        source = self.source(moment.path)
        _refuse_unreadable(source)
        source = self.opened(source)
        out = step_folder(self.home, step) if self.home else None
        stream = decompose(source, top=self.top, out=out, **self.compute)
        spectra = stream.collect()
        self.notes.extend(stream.notes)
        self.reused.extend(stream.reused)
        return _Look(step, moment.path, spectra, source, moment.note)


def _refuse_unreadable(source: Source) -> None:
    """One message where a checkpoint has nothing that can be read, instead of one for each of its matrices."""
    reasons = list(dict.fromkeys(delta.reason for delta in source))
    if source.deltas and all(delta.recipe is None for delta in source):
        more = f" (and {len(reasons) - 1} more reasons)" if len(reasons) > 1 else ""
        raise SourceError(f"none of its {matrices(len(source))} can be read: {reasons[0]}{more}")


@dataclass(frozen=True)
class _Look:
    """One checkpoint that could be read."""

    step: int
    path: str
    spectra: Spectra
    source: Source | None = None
    note: str = ""


class _Series:
    """The walk from the first checkpoint to the last, with the last at hand."""

    def __init__(
        self, run: _Run, moments: Sequence[tuple[int, Moment | None]], side: Side, start: str | Path | None
    ) -> None:
        self.run = run
        self.moments = moments
        self.side = side
        self.failed: dict[int, SpectraError] = {}
        self.start = self._start(start)

    def rows(self) -> Iterator[Row]:
        """All rows; the table is written when they have gone. What is read of a base on a server is read once."""
        base = self.run.base
        with read_again(base.path) if base is not None and is_url(base.path) else nullcontext():
            yield from self._rows()

    def _rows(self) -> Iterator[Row]:
        last, previous = self._last(), None
        kept: list[Row] = []
        for step, moment in self.moments:
            look = last if step == last.step else self._look(step, moment)
            new = [_failed(step, moment, self.failed[step])] if look is None else self._of(look, last, previous)
            for line in new:
                kept.append(line)
                yield line
            previous = look or previous
        if self.run.home is not None:
            write(self.run.home / TABLE, tables.to_csv(kept).encode())

    def _last(self) -> _Look:
        """The last checkpoint that can be read, and so the first that is decomposed."""
        for step, moment in reversed(self.moments):
            look = self._look(step, moment)
            if look is not None:
                return look
        raise self.failed[self.moments[0][0]]

    def _look(self, step: int, moment: Moment | None) -> _Look | None:
        if step in self.failed:
            return None
        try:
            return self.run.look(step, moment)
        except _PROBLEMS_OF_ALL:
            raise
        except SpectraError as problem:
            self.failed[step] = problem
            return None

    def _of(self, look: _Look, last: _Look, previous: _Look | None) -> Iterator[Row]:
        """The rows of one checkpoint."""
        deltas = {delta.name: delta for delta in look.source} if look.source else {}
        others = {name: other for name, other in (("last", last), ("previous", previous)) if other is not None}
        there = {name: set(other.spectra.names) for name, other in others.items()}
        for spectrum in look.spectra:
            name = spectrum.name
            self.start.see(spectrum, deltas.get(name))
            compared = {which: other.spectra[name] for which, other in others.items() if name in there[which]}
            cells = row(look.step, look.path, spectrum, self.start, compared, top=self.run.top, side=self.side)
            yield cells | {"note": "; ".join(filter(None, (look.note, cells["note"])))}

    def _start(self, given: str | Path | None) -> Start:
        run = self.run
        if given is None:
            return Start(run.top, run.home, f"step {self.moments[0][0]}")
        source = run.source(given)
        if not any(delta.factored for delta in source):
            raise SelectionError(f"{given} holds no factors: start= (--start) is an adapter as it was before training")
        start = Start(run.top, run.home, _whole_path(given) or "", before_training=True)
        start.take({delta.name: delta for delta in source})
        return start


def row(
    step: int,
    path: str,
    spectrum: Spectrum,
    start: Start | None = None,
    others: Mapping[str, Spectrum] = MappingProxyType({}),
    *,
    top: int,
    side: Side = "left",
) -> Row:
    """One matrix of one checkpoint as column → value; None where there is none.

    Args:
        step: of training.
        path: the checkpoint's.
        spectrum: the update, with vectors.
        start: where training started.
        others: "last" or "previous" → the same matrix of those checkpoints.
        top: how many directions are compared.
        side: of φ.
    """
    numbers = tables.row(spectrum, {name: METRICS[name] for name in MEASURED})
    cells = {
        "step": step,
        "checkpoint": path,
        "name": spectrum.name,
        "role": spectrum.role,
        "layer": spectrum.layer,
        "status": spectrum.status,
        **{name: numbers[name] for name in MEASURED},
        "k": min(top, spectrum.k, spectrum.rank),
        **dict.fromkeys(LEVELS),
        "reason": spectrum.reason,
        "note": spectrum.note,
    }
    for name, other in others.items():
        similarity = _similarity(spectrum, other, top, side)
        if similarity is not None:
            cells |= {f"phi_to_{name}": similarity.phi, f"phi_to_{name}_chance": float(similarity.chance[-1, -1])}
            cells["note"] = "; ".join(
                filter(None, (cells["note"], similarity.note and f"φ to {name}: {similarity.note}"))
            )
    for where in SIDES:
        basis = start.basis(spectrum.name, where) if start is not None else None
        if basis is not None and spectrum.U is not None:
            cells[f"start_{where}"] = start_share(spectrum, basis, top=top, side=where)
            cells[f"start_{where}_chance"] = basis.shape[1] / basis.shape[0]
    return cells


def _failed(step: int, moment: Moment | None, problem: SpectraError) -> Row:
    """The row of a checkpoint that cannot be read."""
    nothing = Spectrum("", (), "unreadable", reason=str(problem))
    cells = row(step, moment.path if moment else "", nothing, top=1)
    return cells | {"role": "", "layer": None, "k": None}


def _similarity(a: Spectrum, b: Spectrum, top: int, side: Side) -> SubspaceSimilarity | None:
    """How similar the top directions are; None where one of the two has none, as its status and norm say."""
    try:
        return subspace_similarity(a, b, top=top, side=side)
    except SelectionError:
        return None


def _whole_path(path: str | Path | None) -> str | None:
    if path is None:
        return None
    place = os.path.expanduser(path)
    return os.path.realpath(place) if os.path.exists(place) else str(path)


def _claim(home: Path, inputs: dict[str, Any], stored: dict[int, Path], given: set[int], notes: list[str]) -> None:
    """Make the directory this series', or raise if it is another run's or its base has changed since."""
    store = Store(home, notes=notes)
    if store.kind() not in (None, KIND):
        raise StoreError(f"{home} holds results of another command; choose {ANOTHER_PLACE}")
    for step in sorted(set(stored) - given):
        changed = run_file.changed_file(Store(stored[step]).run().get("inputs", {}))
        if changed:
            raise StoreError(
                f"{changed} is not as it was when step {step} was stored in {home}; "
                f"nothing was changed there: choose {ANOTHER_PLACE}"
            )
    store.begin(inputs, {"command": sys.argv})
