"""The account that a reader keeps: every tensor becomes a delta, a refusal or a line of the coverage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from spectra.deltas.base import BaseWeight
from spectra.deltas.delta import WeightDelta
from spectra.deltas.recipe import Recipe
from spectra.deltas.source import Coverage, Source
from spectra.errors import BaseRequiredError, SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models.contradictions import contradictions
from spectra.models.pairing import unwrap
from spectra.sources.config import Config
from spectra.spectrum import Status


class Refusal(Exception):  # noqa: N818 (no error of the program: one matrix has no number)
    """One matrix cannot be done, and why; `Ledger.attempt` gives it its row, and the others go on."""

    def __init__(self, reason: str, status: Status = "unsupported") -> None:
        super().__init__(reason)
        self.status = status


class Slots(dict[str, TensorRef]):
    """The tensors of one module: what each is in the format's words → reference."""

    def real(self, *names: str) -> tuple[TensorRef, ...]:
        """The tensors of these names.

        Raises:
            Refusal: one is missing, or is not made of real numbers.
        """
        for name in names:
            if name not in self:
                raise Refusal(f"{name} is missing in {next(iter(self.values())).path}")
            if not self[name].is_float:
                raise Refusal(f"{name} is stored as {self[name].dtype}, not as real numbers")
        return tuple(self[name] for name in names)


@dataclass
class Ledger:
    """Deltas and coverage while a source is being read, and what it was asked for; `source` closes it.

    Attributes:
        tuned: the adapter or the tuned model.
        base: the model it started from, or None.
        kind: what `Source.kind` will say.
        title: the format's name for people.
        split: whether fused projections are reported as their parts.
        heads: which heads of a multi-head adapter.
        scale: s as the user gives it, or None.
    """

    tuned: Folder
    base: Folder | None
    kind: str
    title: str
    split: bool = True
    heads: str | int = "mean"
    scale: float | None = None
    deltas: list[WeightDelta] = field(default_factory=list)
    base_only: dict[str, str] = field(default_factory=dict)
    tuned_only: dict[str, str] = field(default_factory=dict)
    shape_mismatch: dict[str, str] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    base_names: dict[str, str] = field(default_factory=dict)  # tuned weight → base weight, one rule for the whole file
    tied: dict[str, list[str]] = field(default_factory=dict)  # weight of the base → the heads it is, that were adapted
    inner: Folder | None = None  # the adapted weights as the tuned file itself holds them, where no base is given
    base_evidence: dict[str, tuple[int, ...] | None] = field(default_factory=dict)  # the shapes that led to it
    owners: dict[str, str] = field(default_factory=dict)  # stored name → the module it belongs to
    named: set[str] = field(default_factory=set)  # stored names that are accounted for beside the recipes

    @property
    def where(self) -> str:
        """The adapter's path, for messages."""
        return str(self.tuned.path)

    @property
    def config(self) -> Config:
        """The adapter's config; empty where there is none."""
        return Config(self.tuned.adapter_config or {}, self.where)

    def need_config(self) -> None:
        """Make sure that there is a config.

        Raises:
            SourceError: there is none.
        """
        if self.tuned.adapter_config is None:
            raise SourceError(
                f"{self.where} holds {self.title} and has no adapter_config.json beside it, without which it cannot "
                "be read: put it back"
            )

    def need_base(self, because: str = "") -> Folder:
        """The base, or what the file itself holds of it.

        Raises:
            BaseRequiredError: there is none; the message says why one is needed.
        """
        base = self.base or self.inner
        if base is None:
            because = because or f"ΔW of {self.title} depends on the base weights"
            raise BaseRequiredError(f"{self.where}: {because}: pass base= (--base)")
        return base

    def need_scale(self) -> None:
        """Make sure that s is known: α/r of the config, or what the user gives for files without one.

        Raises:
            SourceError: neither is there.
        """
        if self.tuned.adapter_config is None and self.scale is None:
            raise SourceError(
                f"{self.where} holds {self.title} and has no adapter_config.json beside it, so α/r is unknown: put the "
                "config back or pass scale= (--scale), which is 1 if it was trained with α = r"
            )

    def scale_of(self, module: str, width: int | None, *, alpha_key: str = "lora_alpha") -> float:
        """s of a module from the config, or as given where there is none.

        Args:
            module: its path.
            width: the factors' rank, which must be the config's r; None where they have none.
            alpha_key: what the config calls α.

        Raises:
            Refusal: the factors have another rank.
            SourceError: r or α in the config is unusable.
        """
        if self.tuned.adapter_config is None:
            return float(self.scale or 0.0)
        s, rank = self.config.scaling(module, alpha_key=alpha_key)
        if width is not None and width != rank:
            raise Refusal(f"the config says r = {rank} for {module}, the factors in {self.where} have {width}")
        return s

    def modules(self, pattern: str, *, among: Iterable[str] | None = None) -> dict[str, Slots]:
        """module → its tensors, for all of the file, or those `among`, whose names fit the pattern.

        A module with a tensor that cannot be read is refused.

        Args:
            pattern: what comes after `<module>.`, a regular expression for the whole rest; the group
                `slot` names the tensor's part, an optional group `adapter` the adapter's name.
            among: stored names; None for all.

        Raises:
            SourceError: the file holds several adapters under different names.
        """
        names = self.tuned.tensors if among is None else among
        groups, adapters = _grouped(names, pattern)
        broken, _ = _grouped(self.tuned.broken if among is None else (), pattern)
        if len(adapters) > 1:
            named = ", ".join(sorted(str(adapter) for adapter in adapters))
            raise SourceError(f"the file holds several adapters ({named}); save the one you mean on its own")
        for members in (groups, broken):
            self.owners.update({name: module for module, slots in members.items() for name in slots.values()})
        for module, slots in broken.items():
            groups.pop(module, None)
            self.refuse(f"{module}.weight", (), "unreadable", self.tuned.broken[next(iter(slots.values()))])
        refs = self.tuned.tensors
        return {m: Slots({slot: refs[name] for slot, name in slots.items()}) for m, slots in groups.items()}

    def shared(self, name: str) -> TensorRef | None:
        """The tensor that all modules of an adapter share, `base_model.<name>`, or None.

        Copies that a trainer stored under modules as well are listed as such.

        Raises:
            SourceError: it is there and cannot be read.
        """
        pattern = re.compile(rf"(?:(?P<module>.+)\.)?{name}(?:\.[^.]+)?")
        ref = None
        for key in (*self.tuned.tensors, *self.tuned.broken):
            match = pattern.fullmatch(key)
            if match is None:
                continue
            if match["module"] not in (None, "base_model"):
                self.skip(key, f"a copy of the {name} that all modules share")
            elif key in self.tuned.broken:
                raise SourceError(f"{key} is shared by all modules and cannot be read: {self.tuned.broken[key]}")
            else:
                self.named.add(key)
                ref = self.tuned.tensors[key]
        return ref

    def use(self, refs: Iterable[TensorRef]) -> None:
        """Account for stored tensors that went into a recipe's numbers while listing, or into none on purpose."""
        self.named.update(self.stored_names(refs))

    def skip(self, stored: str, why: str) -> None:
        """Account for a stored tensor that is no part of any ΔW."""
        self.named.add(stored)
        self.skipped[unwrap(stored)] = why

    def stored_names(self, refs: Iterable[TensorRef]) -> set[str]:
        """Which of the tuned file's tensors the references, or their parts, are."""
        places = {(ref.path, ref.name): name for name, ref in self.tuned.tensors.items()}
        return {places[ref.path, ref.name] for ref in refs if (ref.path, ref.name) in places}

    def add(
        self,
        name: str,
        shape: Sequence[int],
        recipe: Recipe,
        rank: int | None = None,
        note: str = "",
        base: BaseWeight | None = None,
    ) -> None:
        """A matrix that can be done."""
        rank = min(*shape) if rank is None else min(rank, *shape)
        self.deltas.append(WeightDelta(name, tuple(shape), recipe, rank, note=note, base=base))

    def refuse(self, name: str, shape: Sequence[int], status: Status, reason: str) -> None:
        """A matrix that cannot be done: it keeps its row in the result and its line in the coverage."""
        listed = self.shape_mismatch if status == "shape_mismatch" else self.unsupported
        listed[name] = reason
        self.deltas.append(WeightDelta.refused(name, shape, status, reason))

    def lack(self, name: str, why: str, shape: Sequence[int] = ()) -> None:
        """A matrix of the adapter that the base does not have: it has no number, and is listed as the tuned side's."""
        self.tuned_only[name] = why
        self.deltas.append(WeightDelta.refused(name, shape, "unsupported", why))

    @contextmanager
    def attempt(self, name: str, shape: Sequence[int] = ()) -> Iterator[None]:
        """Work on one matrix: a `Refusal` inside becomes its row. The one place where refusals end."""
        try:
            yield
        except Refusal as why:
            self.refuse(name, shape, why.status, str(why))

    def need_something(self) -> None:
        """Make sure that there is a row.

        Raises:
            SourceError: there is none; the message has the first reasons.
            BaseRequiredError: that is because there is no base.
        """
        if self.deltas:
            return
        left_out = {**self.tuned_only, **self.skipped, **self.base_only}
        listed = "; ".join(f"{name}: {why}" for name, why in list(left_out.items())[:3])
        more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        kind = BaseRequiredError if self.base is None and "pass base=" in listed else SourceError
        raise kind(f"{self.where} holds {self.title}, and no matrix of it can be done: {listed}{more}")

    def source(self) -> Source:
        """The finished source."""
        given = [*self.tuned.warnings]
        if self.base:
            given += [*self.base.warnings, *contradictions(self.tuned.config, self.base.config)]
        coverage = Coverage(
            base_only=self.base_only,
            tuned_only=self.tuned_only,
            shape_mismatch=self.shape_mismatch,
            unsupported=self.unsupported,
            skipped=self.skipped,
            warnings=(*given, *self.warnings),
        )
        base = str(self.base.path) if self.base else None
        return Source(self.kind, tuple(self.deltas), coverage, self.where, base)


def _grouped(names: Iterable[str], pattern: str) -> tuple[dict[str, dict[str, str]], set[str | None]]:
    """module → slot → stored name, for the names that fit, and the adapters' names among them."""
    compiled = re.compile(rf"(?P<module>.+?)\.(?:{pattern})")
    groups: dict[str, dict[str, str]] = {}
    adapters: set[str | None] = set()
    for name in names:
        match = compiled.fullmatch(unwrap(name))
        if match:
            adapters.add(match.groupdict().get("adapter"))
            groups.setdefault(match["module"], {})[match["slot"]] = name
    return groups, adapters


def slot_pattern(names: str) -> str:
    """`Ledger.modules`' pattern for parameters of these names (regular expressions joined by |).

    What a trainer may add to a parameter's name is allowed for: the adapter's name and `.weight`.
    """
    return rf"(?P<slot>{names})(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.weight)?"
