"""`inspect`: what lies at a path, from headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from spectra import naming, text
from spectra.deltas.source import Source
from spectra.errors import BaseRequiredError
from spectra.files.far import is_remote
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.garbage import not_looked_for
from spectra.models.opening import Openable, open_any
from spectra.sources import format_of, source_of

if TYPE_CHECKING:
    from spectra.results.tables import Row  # its file imports every metric: a header-only look must not wait for them


NEEDS_BASE = "needs the base"
COLUMNS = ("name", "role", "layer", "shape", "max_rank", "factored", "status", "reason")


@dataclass(frozen=True, eq=False)
class Inspection:
    """What a model or adapter holds.

    Attributes:
        folder: its tensors, by their headers.
        kind: the format, as in `Source.kind`.
        source: the updates in it; None where ΔW needs a base and none was given.
        needs: why it does, and what to pass; "" where there is a source.
        modules: the modules that an adapter without a source adapts; () for full weights.
    """

    folder: Folder
    kind: str
    source: Source | None
    needs: str = ""
    modules: tuple[str, ...] = ()

    @property
    def matrices(self) -> list[Row]:
        """A row per update; without a base, one per stored matrix of full weights or adapted module of an adapter."""
        return [dict(row) for row in self._rows]

    @cached_property
    def _rows(self) -> list[Row]:
        if self.modules:
            names = [f"{module}.weight" for module in self.modules]
            return [
                {"name": name, "role": naming.role_of(name), "layer": naming.layer_of(name), "shape": (),
                 "status": NEEDS_BASE, "reason": self.needs}
                for name in names
            ]  # fmt: skip
        if self.source is None:
            return [
                {"name": name, "role": naming.role_of(name), "layer": naming.layer_of(name), "shape": ref.shape}
                for name, ref in self.folder.tensors.items()
                if len(ref.shape) >= 2
            ]
        return [{column: getattr(delta, column) for column in COLUMNS} for delta in self.source]

    @property
    def by_role(self) -> list[Row]:
        """How many matrices there are of each role, shape, largest possible rank and status."""
        keys = ("role", "shape", "max_rank", "status")
        counts = Counter(tuple(row.get(key) for key in keys) for row in self._rows)
        roles = naming.in_model_order(str(role) for role, *_ in counts)
        ordered = sorted(counts.items(), key=lambda item: roles.index(str(item[0][0])))
        return [{**dict(zip(keys, group, strict=True)), "matrices": count} for group, count in ordered]

    @property
    def to_read(self) -> dict[str, int]:
        """Role → how many bytes of files a command reads for its matrices; without a source, for its tensors."""
        return self._sizes(lambda part: True)

    @property
    def from_server(self) -> dict[str, int]:
        """Of these bytes those that a server is asked for, which a cache on this machine does not have."""
        return self._sizes(lambda part: is_remote(part.file))

    @property
    def all_from_server(self) -> int:
        """The same for a command for all of it: what two roles share comes once."""
        parts = (part for _, refs in self._refs() for ref in refs for part in ref.parts)
        return sum({(p.path, p.offset): p.bytes_read for p in parts if is_remote(p.file)}.values())

    def _sizes(self, counts: Callable[[TensorRef], bool]) -> dict[str, int]:
        sizes: dict[str, dict[tuple[str, int], int]] = {}
        for name, refs in self._refs():
            parts = (part for ref in refs for part in ref.parts if counts(part))
            sizes.setdefault(naming.role_of(name), {}).update({(p.path, p.offset): p.bytes_read for p in parts})
        return {role: sum(sizes[role].values()) for role in naming.in_model_order(sizes)}

    def _refs(self) -> Iterable[tuple[str, tuple[TensorRef, ...]]]:
        if self.source is not None:
            return ((delta.name, delta.refs) for delta in self.source)
        return ((name, (ref,)) for name, ref in self.folder.tensors.items() if len(ref.shape) >= 2 or self.modules)

    def told(self) -> dict[str, Any]:
        """As `to_dict`, of the whole alone: nothing that has an entry for each matrix or role."""
        refs = self.folder.tensors.values()
        document: dict[str, Any] = {
            "path": str(self.folder.path),
            "kind": self.kind,
            "tensors": len(refs),
            "parameters": sum(ref.numel for ref in refs),
            "bytes": sum(ref.nbytes for ref in refs),
            "dtypes": dict(Counter(ref.dtype for ref in refs)),
            "model_type": self.folder.config.get("model_type"),
            "unreadable": self.folder.unusable,
        }
        if self.source is None:
            return document | {"warnings": self.folder.warnings, "needs": self.needs}
        return document | {"notes": sorted({delta.note for delta in self.source if delta.note})}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values: what `spectra inspect --json` prints."""
        document = self.told() | {"bytes_to_read": self.to_read, "matrices": self.matrices}
        return document | ({"coverage": asdict(self.source.coverage)} if self.source else {})

    def __repr__(self) -> str:
        return f"Inspection({self.folder.path}, {self.kind}, {len(self.folder.tensors)} tensors)"

    def _repr_html_(self) -> str:
        rows = [(row["role"], row["matrices"], text.size(row["shape"]), row["status"] or "–") for row in self.by_role]
        heading = f"Inspection: {self.kind}, {len(self.folder.tensors):,} tensors in {self.folder.path}"
        return text.page(heading, {}, ("role", "matrices", "shape", "status"), rows)


@not_looked_for()
def inspect(
    path: Openable, base: Openable | None = None, *, heads: str | int = "mean", scale: float | None = None
) -> Inspection:
    """What a model or adapter holds: kind, matrices, ranks, dtypes and sizes, and what will not be used.

    Args:
        path: a folder, a weights file, a hub id, a URL or an alias; or a model or state dict in memory.
        base: pair it with this model and show what fits.
        heads: as for `open_source`.
        scale: as for `open_source`.

    Raises:
        NotFoundError: a path, id or alias leads nowhere.
        UnsupportedFormatError: the format is not one of FORMATS.
        SourceError: a file is broken.
    """
    folder = open_any(path)
    row = format_of(folder)
    try:
        return Inspection(folder, row.kind, source_of(folder, base, heads=heads, scale=scale))
    except BaseRequiredError as problem:
        return Inspection(folder, row.kind, None, str(problem), tuple(row.modules(folder)))
