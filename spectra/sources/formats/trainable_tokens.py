"""Trainable tokens, on their own or beside LoRA: some rows of an embedding replaced by trained ones.

PEFT calls what it stores a delta; it holds the new rows themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spectra.deltas.forms import Dense, LowRank
from spectra.deltas.source import Source
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.naming import role_of
from spectra.sources.adapter import (
    add_modules_on_base,
    add_rest,
    by_module,
    config_of,
    need_base,
    refuse_options,
    slot_pattern,
)
from spectra.sources.ledger import Ledger

KIND = "trainable_tokens"
_SLOTS = "(?:token_adapter\\.)?" + slot_pattern("trainable_tokens_delta")


@dataclass(frozen=True)
class ReplacedRows:
    """ΔW = (values − W₀) in the rows that were replaced, 0 elsewhere.

    Attributes:
        base: W₀ (vocabulary, dim).
        values: the new rows (n, dim).
        indices: which rows of W₀ they replace, each once.
    """

    base: TensorRef
    values: TensorRef
    indices: tuple[int, ...]

    @property
    def factored(self) -> bool:
        """Whether the rows are fewer than either side of the matrix."""
        return len(self.indices) < min(self.shape)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The base's weight and the new rows."""
        return (self.base, self.values)

    @property
    def shape(self) -> tuple[int, int]:
        """(vocabulary, dim)."""
        return (self.base.shape[0], self.base.shape[1])

    @property
    def rank(self) -> int:
        """The number of replaced rows, at most min(vocabulary, dim)."""
        return min(len(self.indices), *self.shape)

    def read(self, device: str = "cpu") -> LowRank | Dense:
        """A selection of rows times their change, in float64, or the matrix."""
        import torch

        base = self.base.read_float64(device)
        rows = torch.tensor(self.indices, dtype=torch.long, device=device)
        change = self.values.read_float64(device) - base[rows]
        norm = float(base.norm())
        if not self.factored:
            return Dense(torch.zeros_like(base).index_copy(0, rows, change), norm)
        selection = torch.zeros(self.shape[0], len(rows), dtype=torch.float64, device=device)
        selection[rows, torch.arange(len(rows), device=device)] = 1.0
        return LowRank(selection, change, norm)


def matches(folder: Folder) -> bool:
    """Rows named trainable_tokens_delta, and no factors beside them."""
    names = folder.tensors
    alone = not any("lora_" in name for name in names)
    return alone and any(".trainable_tokens_delta" in name for name in names)


def open_trainable_tokens(
    tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None
) -> Source:
    """Read every embedding's new rows.

    Raises:
        BaseRequiredError: there is no base.
        SourceError: the config does not say which rows they replace.
    """
    ledger = Ledger(tuned, base)
    refuse_options(ledger, heads, scale)
    config_of(tuned, "which tokens were trained")
    need_base(ledger, "trained tokens")
    for name, why in tuned.broken.items():
        ledger.refuse(name, (), "unreadable", why)
    add_rest(ledger, add_tokens(ledger, tuned.tensors), split=split)
    return ledger.source(KIND)


def add_tokens(ledger: Ledger, names: Iterable[str]) -> list[str]:
    """Enter the trained tokens among the names, and give back the other names.

    Without a base they are listed as skipped: the rows are new values.

    Raises:
        SourceError: the config does not say which rows they replace.
    """
    tuned = ledger.tuned
    groups, rest = by_module(names, _SLOTS)
    modules = {m: {slot: tuned.tensors[name] for slot, name in slots.items()} for m, slots in groups.items()}
    indices = {module: _indices(tuned, module) for module in modules}
    if ledger.base is None:
        for module in modules:
            ledger.skipped[f"{module}.weight"] = (
                "trained tokens, saved as new rows: ΔW needs the base weight: pass --base"
            )
        return rest

    for module in _tied(modules, ledger.base):
        del modules[module]
        ledger.skipped[f"{module}.weight"] = "tied to the embedding, whose trained tokens it repeats"

    def build(module: str, slots: Mapping[str, TensorRef], base: TensorRef) -> ReplacedRows | str:
        return _update(indices[module], slots["trainable_tokens_delta"], base)

    add_modules_on_base(ledger, modules, build, split=False, note="trained tokens alone")
    return rest


def _tied(modules: Iterable[str], base: Folder) -> list[str]:
    """The output layers among the modules that share the embedding's weight: the base does not hold theirs."""
    roles = {module: role_of(module) for module in modules}
    if "embed_tokens" not in roles.values() or "lm_head" in map(role_of, base.tensors):
        return []
    return [module for module, role in roles.items() if role == "lm_head"]


def _update(indices: tuple[int, ...], values: TensorRef, base: TensorRef) -> ReplacedRows | str:
    if not values.is_float:
        return f"the trained rows are stored as {values.dtype}, not as real numbers"
    if values.shape != (len(indices), base.shape[1]):
        expected = [len(indices), base.shape[1]]
        return f"the trained rows {list(values.shape)} are not {expected}, as the config and the base have it"
    if max(indices) >= base.shape[0]:
        return f"token {max(indices)} was trained, the base has {base.shape[0]}: resize its vocabulary as for training"
    return ReplacedRows(base, values, indices)


def _indices(tuned: Folder, module: str) -> tuple[int, ...]:
    """Which rows of a module's weight were trained: one list for all, or one per module's ending."""
    config = tuned.adapter_config or {}
    found = config.get("token_indices") or config.get("trainable_token_indices")
    if isinstance(found, dict):
        found = next((rows for ending, rows in found.items() if module.endswith(ending)), None)
    whole = isinstance(found, list) and all(type(index) is int and index >= 0 for index in found)
    if not whole or not found or len(set(found)) < len(found):
        raise SourceError(
            f"{tuned.path}: the config does not say which rows of {module} were trained, each once; "
            "mend token_indices in adapter_config.json"
        )
    return tuple(found)
