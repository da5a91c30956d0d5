"""Whether a results directory still holds what was stored: every file against its checksums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from spectra.errors import StoreError
from spectra.results import run_file
from spectra.results.homes import nothing_stored
from spectra.results.shelf import Shelf, read_pack, read_piece
from spectra.results.store import RUN, Store, sum_of_table
from spectra.results.writing import damaged

State = Literal["sound", "damaged", "no checksum"]
_PAIRS = "pairs"


@dataclass(frozen=True)
class Finding:
    """One file of a results directory.

    Attributes:
        file: its path within the directory.
        state: "sound", "damaged", or "no checksum" where an older version wrote it.
        reason: what is wrong with a damaged one.
    """

    file: str
    state: State
    reason: str = ""


def check_results(directory: str | Path) -> list[Finding]:
    """Hold every stored file against its checksums: run.json, the tables, each matrix and comparison.

    Figures and their csv files are not looked at: `spectra plot` draws them again from what is.

    Args:
        directory: what `save`, `decompose(…, out=…)`, `compare(…, out=…)` or the commands' --out made.

    Raises:
        StoreError: there are no results.

    Example:
        >>> import tempfile
        >>> from spectra.results.collection import save
        >>> from spectra.spectrum import Spectrum
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save([Spectrum("a.weight", (1, 1), S=[2.0])], place)
        ...     [(found.file, found.state) for found in check_results(place)]
        [('run.json', 'sound'), ('summary.csv', 'sound'), ('spectra/a.weight.safetensors', 'sound')]
    """
    store = Store(directory)
    findings = [*_run(store), *_pieces(store)]
    pairs = store.directory / _PAIRS
    for folder in sorted(pairs.iterdir()) if pairs.is_dir() else ():
        inner = Store(folder)
        prefix = f"{_PAIRS}/{folder.name}/"
        findings += [Finding(prefix + item.file, item.state, item.reason) for item in (*_run(inner), *_pieces(inner))]
    if not findings:
        raise nothing_stored(directory)
    return findings


def _run(store: Store) -> Iterator[Finding]:
    """run.json, and the tables whose checksums it has."""
    if not (store.directory / RUN).exists():
        return
    try:
        said = store.run()
    except StoreError as problem:
        yield Finding(RUN, "damaged", str(problem))
        return
    yield Finding(RUN, "sound" if run_file.is_signed(store.directory / RUN) else "no checksum")
    listed = said.get("tables", {})
    for name, expected in sorted(listed.items() if isinstance(listed, dict) else ()):
        same = sum_of_table(store.directory / name) == expected
        yield Finding(name, "sound") if same else Finding(name, "damaged", "it is not the table that was written")


def _pieces(store: Store) -> Iterator[Finding]:
    for shelf in (store.spectra, store.similarity):
        for file in sorted(shelf.files()):
            yield _piece(store, shelf, file)
        for file in shelf.packs():
            yield _pack(store, shelf, file)


def _piece(store: Store, shelf: Shelf, file: Path) -> Finding:
    where = f"{shelf.directory.name}/{file.name}"
    try:
        piece = read_piece(file)
        name = piece.name if piece.signed else shelf.name_of(file) or ""
        if shelf.path(name) != file:
            return Finding(where, "damaged", "it is another record, renamed")
        fault = store.fault_of(shelf, replace(piece, name=name))
    except StoreError as problem:
        return Finding(where, "damaged", str(problem))
    if fault:
        return Finding(where, "damaged", str(damaged(file, fault)))
    return Finding(where, "sound" if piece.signed else "no checksum")


def _pack(store: Store, shelf: Shelf, file: Path) -> Finding:
    """A pack, all of whose records have to be sound; the first that is not is named."""
    where = f"{shelf.directory.name}/{file.name}"
    pieces, fault = read_pack(file)
    if fault:
        return Finding(where, "damaged", fault)
    for name, piece in pieces:
        said = "the checksum of its arrays does not fit" if piece is None else store.fault_of(shelf, piece)
        if said:
            return Finding(where, "damaged", str(damaged(file, f"{name}: {said}")))
    return Finding(where, "sound")
