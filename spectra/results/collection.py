"""`Spectra`: the spectra of a run as one collection, in memory or on disk; and how it gets onto the disk and back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

from spectra import naming, text
from spectra.errors import SelectionError, StoreError, refuse_path_for_spectra
from spectra.results import tables
from spectra.results.findings import findings
from spectra.results.homes import nothing_stored
from spectra.results.records import Header, Precision, check_precision, loaded_vectors
from spectra.results.store import RUN, Store
from spectra.spectrum import Spectrum
from spectra.text import Row

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 12  # rows in a notebook; on disk each costs opening a file
_READ = 300  # matrices of which a notebook shows what they say, too


class Spectra(Sequence[Spectrum]):
    """Spectra in order: by index, slice, name or pattern, whether they are in memory or in a results directory.

    On disk, each is read when it is asked for, and nothing is kept.

    Args:
        spectra: any spectra; their order is kept. `decompose(…).collect()` gives them in the source's order.

    Raises:
        SelectionError: two of them have the same name.

    Example:
        >>> found = Spectra([Spectrum("layers.0.v_proj.weight", (2, 2), S=[4.0, 3.0])])
        >>> found["layers.0.v_proj.weight"].norm, found[0].norm, len(found.select("v_proj"))
        (5.0, 5.0, 1)
    """

    def __init__(self, spectra: Iterable[Spectrum] = ()) -> None:
        held: dict[str, Spectrum] = {}
        for spectrum in spectra:
            if spectrum.name in held:
                raise SelectionError(f"{spectrum.name} is there twice: make one collection for each run")
            held[spectrum.name] = spectrum
        self._holder: _Holder = _InMemory(held)
        self._names = tuple(held)

    @classmethod
    def stored(
        cls, directory: str | Path, names: Sequence[str] | None = None, *, vectors: bool = True, verify: bool = True
    ) -> Spectra:
        """What a results directory holds, or these of it; `load` with a check that there is something.

        Args:
            directory: where it is.
            names: which spectra, in this order; None for all, numbers in names in numerical order.
            vectors: False leaves singular vectors on the disk.
            verify: False takes arrays without their checksums.
        """
        holder = _OnDisk(Store(directory, verify=verify), vectors)
        return cls._of(holder, holder.store.names() if names is None else names)

    @classmethod
    def _of(cls, holder: _Holder, names: Iterable[str]) -> Spectra:
        view = cls()
        view._holder, view._names = holder, tuple(names)
        return view

    @property
    def names(self) -> tuple[str, ...]:
        """The weights' names, in order."""
        return self._names

    @property
    def directory(self) -> Path | None:
        """Where they are stored; None in memory."""
        return self._holder.store.directory if isinstance(self._holder, _OnDisk) else None

    @property
    def run(self) -> dict[str, Any]:
        """What `run.json` says of how they were made; {} in memory."""
        return self._holder.store.run() if isinstance(self._holder, _OnDisk) else {}

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, item: object) -> bool:
        return (item.name if isinstance(item, Spectrum) else item) in self.names

    @overload
    def __getitem__(self, index: int | str) -> Spectrum: ...
    @overload
    def __getitem__(self, index: slice) -> Spectra: ...
    def __getitem__(self, index: int | str | slice) -> Spectrum | Spectra:
        if isinstance(index, slice):
            return self._of(self._holder, self.names[index])
        if isinstance(index, str) and index not in self.names:
            raise KeyError(f"{index!r} is not among the {len(self)} matrices in {self._place}")
        return self._holder.get(index if isinstance(index, str) else self.names[index])

    def __iter__(self) -> Iterator[Spectrum]:
        return map(self._holder.get, self.names)

    def select(self, patterns: str | Sequence[str]) -> Spectra:
        """Only the matrices that the patterns mean: roles, parts of names, globs, as `--layer` takes them.

        Raises:
            SelectionError: a pattern matches nothing; the message lists what there is.
        """
        return self._of(self._holder, naming.select(patterns, self.names))

    def without_vectors(self) -> Spectra:
        """The same spectra with singular values only: on disk, most of the bytes stay there. `k` still counts them."""
        return self._of(self._holder.without_vectors(), self.names)

    @property
    def lacks_vectors(self) -> bool:
        """Whether there are updates with singular values, and singular vectors of none of them."""
        headers = [self._holder.header(name) for name in self.names]
        solved = [header for header in headers if header is not None and header.blank.status == "ok"]
        return bool(solved) and not any(header.k for header in solved)

    def to_frame(self, *, by: tables.Whole = "matrix") -> pd.DataFrame:
        """The DataFrame of `summarize`, which needs no vectors."""
        return tables.summarize(self.without_vectors(), by=by)

    def report(self, path: str | Path | None = None) -> Path:
        """Write the HTML page of `write_report` about this run, and say where it is.

        Args:
            path: the file; None for report.html in the directory of the results.

        Raises:
            SelectionError: there is no path, and the results are in no directory.
            StoreError: it cannot be written.
            MissingExtraError: Jinja2 is not installed.
        """
        if path is None and self.directory is None:
            raise SelectionError('these results are in no directory: say where the page goes, as .report("page.html")')
        target = Path(path) if path is not None else Path(str(self.directory), "report.html")
        from spectra.report import write_report  # the one arrow that points up; pyproject.toml names it

        write_report(self, target)
        return target

    @property
    def _place(self) -> str:
        return str(self.directory or "this collection")

    def __repr__(self) -> str:
        where = f"{self.directory}, " if self.directory else ""
        return f"Spectra({where}{text.contents(self.names)})"

    def _repr_html_(self) -> str:
        shown = self.names[:_SHOWN]
        rows = [_header_row(name, self._holder.header(name)) for name in shown]
        if len(self) > _SHOWN:
            rows.append((f"… and {len(self) - _SHOWN:,} more; to_frame() shows all", *[""] * 6))
        columns = ("name", "status", "shape", "‖ΔW‖_F", "rank ≤", "values", "vectors")
        where = f" in {self.directory}" if self.directory else ""
        return text.page(f"Spectra: {text.matrices(len(self))}{where}", {}, columns, rows, self._findings())

    def _findings(self) -> list[str]:
        """What the numbers say, and how to see all of it; nothing where reading them takes too long, or fails."""
        if not 0 < len(self) <= _READ:
            return []
        try:
            held = list(self.without_vectors())
        except StoreError:
            return []  # the table says which
        norms = {spectrum.name: spectrum.base_norm for spectrum in held if spectrum.base_norm}
        return [
            *findings([tables.row(spectrum) for spectrum in held], norms),
            'Pictures and all numbers: .report("page.html")',
        ]


class _Holder(Protocol):
    """Where a collection's spectra are."""

    def get(self, name: str) -> Spectrum:
        """The spectrum of this name."""
        ...

    def header(self, name: str) -> Header | None:
        """What is known of it without its arrays; None if it cannot be read."""
        ...

    def without_vectors(self) -> _Holder:
        """The same, giving singular values only."""
        ...


class _InMemory:
    """Spectra by name."""

    def __init__(self, spectra: Mapping[str, Spectrum]) -> None:
        self._spectra = spectra

    def get(self, name: str) -> Spectrum:
        return self._spectra[name]

    def header(self, name: str) -> Header:
        spectrum = self._spectra[name]
        return Header(spectrum, len(spectrum.S), spectrum.k, key="")

    def without_vectors(self) -> _InMemory:
        return self  # they are here already; a copy without them would save nothing


class _OnDisk:
    """The records of a results directory."""

    def __init__(self, store: Store, vectors: bool) -> None:
        self.store = store
        self._vectors = vectors

    def get(self, name: str) -> Spectrum:
        return self.store.get(name, self._vectors)

    def header(self, name: str) -> Header | None:
        try:
            return self.store.header(name)
        except StoreError:
            return None  # shown as damaged; asking for it raises

    def without_vectors(self) -> _OnDisk:
        return _OnDisk(self.store, vectors=False)


def _header_row(name: str, header: Header | None) -> Row:
    if header is None:
        return (name, "missing or damaged", *["–"] * 5)
    known = header.blank
    norm = "–" if known.norm is None else f"{known.norm:.4g}"
    return name, known.status, text.size(known.shape), norm, known.max_rank, header.values, header.k


def save(spectra: Iterable[Spectrum], directory: str | Path, *, vectors: Precision = "float32") -> None:
    """Store spectra as one run, each as soon as it comes, and write the table.

    A stored result is replaced only by one that holds at least as much; a damaged one is replaced.

    Args:
        spectra: what to store.
        directory: where.
        vectors: what singular vectors are stored in, as for `decompose`. Those that are there in float64 stay so.

    Raises:
        StoreError: the directory cannot be written to, or holds more for one of the matrices.
        SelectionError: vectors is neither of the two.
    """
    check_precision(vectors)
    refuse_path_for_spectra(spectra, "save")
    store = Store(directory)
    for spectrum in spectra:
        values, k, precision = store.kept(spectrum.name)
        if k > loaded_vectors(spectrum) or values > len(spectrum.S):
            raise StoreError(
                f"{store.directory} holds {values} values and {k} vectors of {spectrum.name}, more "
                f"than the new {len(spectrum.S)} and {loaded_vectors(spectrum)}; save to another directory"
            )
        store.put(spectrum, precision=max(vectors, precision))
    store.finish()


def holds_results(path: str | Path) -> bool:
    """Whether a path is a results directory, which `load` opens, and no model or adapter."""
    return os.path.isfile(os.path.join(os.path.expanduser(path), RUN))


def load(directory: str | Path, *, vectors: bool = True, verify: bool = True) -> Spectra:
    """The spectra of a results directory, each read when it is asked for.

    Args:
        directory: what `save`, `decompose(…, out=…)` or `spectra svd --out` made.
        vectors: False leaves singular vectors on the disk, where most of the bytes are.
        verify: each array is held against its checksum when it is read, and a damaged one is an error; False takes it
            as it is, for the hurried.

    Raises:
        StoreError: there are no results.
    """
    spectra = Spectra.stored(directory, vectors=vectors, verify=verify)
    if not spectra.names:
        raise nothing_stored(directory)
    return spectra
