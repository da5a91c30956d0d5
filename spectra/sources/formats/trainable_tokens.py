"""Trainable tokens, on their own or beside LoRA: some rows of an embedding replaced by trained ones.

PEFT calls what it stores a delta; it holds the new rows themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import Dense, LowRank
from spectra.deltas.recipes import OnBase
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.naming import role_of
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base, slot_pattern
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

_SLOTS = "(?:token_adapter\\.)?" + slot_pattern("trainable_tokens_delta")


@dataclass(frozen=True)
class ReplacedRows(OnBase):
    """ΔW = (values − W₀) in the rows that were replaced, 0 elsewhere.

    Attributes:
        values: the new rows (n, dim).
        indices: which rows of W₀ they replace, each once.
    """

    copies = 2
    values: TensorRef
    indices: tuple[int, ...]

    @property
    def factored(self) -> bool:
        """Whether the rows are fewer than either side of the matrix."""
        return len(self.indices) < min(self.shape)

    @property
    def rank(self) -> int:
        """The number of replaced rows, at most min(vocabulary, dim)."""
        return min(len(self.indices), *self.shape)

    def from_base(self, base: Tensor) -> LowRank | Dense:
        """A selection of rows times their change, or the matrix."""
        device = str(base.device)
        rows = torch.tensor(self.indices, dtype=torch.long, device=device)
        change = self.values.read_float64(device) - base[rows]
        if not self.factored:
            return Dense(torch.zeros_like(base).index_copy_(0, rows, change))
        selection = torch.zeros(self.shape[0], len(rows), dtype=torch.float64, device=device)
        selection[rows, torch.arange(len(rows), device=device)] = 1.0
        return LowRank(selection, change)


def matches(folder: Folder) -> bool:
    """Rows named trainable_tokens_delta, and no factors beside them."""
    names = folder.tensors
    alone = not any("lora_" in name for name in names)
    return alone and any(".trainable_tokens_delta" in name for name in names)


def read(ledger: Ledger) -> None:
    """Enter every embedding's new rows.

    Raises:
        SourceError: the config does not say which rows they replace.
    """
    add_tokens(ledger)


def add_tokens(ledger: Ledger) -> None:
    """Enter the trained tokens of a file that may hold other updates, too.

    Without a base they are listed as skipped: the rows are new values.

    Raises:
        SourceError: the config does not say which rows they replace.
    """
    modules = ledger.modules(_SLOTS)
    indices = {module: _indices(ledger, module) for module in modules}

    def build(module: str, slots: Slots, base: TensorRef) -> ReplacedRows:
        return _replaced(indices[module], slots["trainable_tokens_delta"], base)

    if ledger.base is None:
        _leave_out(ledger, modules, "trained tokens, saved as new rows: ΔW needs the base weight: pass base= (--base)")
        return
    repeated = {module: modules.pop(module) for module in _tied(modules, ledger.base)}
    _leave_out(ledger, repeated, "tied to the embedding, whose trained tokens it repeats")
    add_modules_on_base(ledger, modules, build, note="trained tokens alone")


def _leave_out(ledger: Ledger, modules: Mapping[str, Slots], why: str) -> None:
    for module, slots in modules.items():
        ledger.use(slots.values())
        ledger.skipped[f"{module}.weight"] = why


def _tied(modules: Iterable[str], base: Folder) -> list[str]:
    """The output layers among the modules that share the embedding's weight: the base does not hold theirs."""
    roles = {module: role_of(module) for module in modules}
    if "embed_tokens" not in roles.values() or "lm_head" in map(role_of, base.tensors):
        return []
    return [module for module, role in roles.items() if role == "lm_head"]


def _replaced(indices: tuple[int, ...], values: TensorRef, base: TensorRef) -> ReplacedRows:
    if not values.is_float:
        raise Refusal(f"the trained rows are stored as {values.dtype}, not as real numbers")
    if values.shape != (len(indices), base.shape[1]):
        expected = [len(indices), base.shape[1]]
        raise Refusal(f"the trained rows {list(values.shape)} are not {expected}, as the config and the base have it")
    if max(indices) >= base.shape[0]:
        last, rows = max(indices), base.shape[0]
        raise Refusal(f"token {last} was trained, the base has {rows}: resize its vocabulary as for training")
    return ReplacedRows(base, values, indices)


def _indices(ledger: Ledger, module: str) -> tuple[int, ...]:
    """Which rows of a module's weight were trained: one list for all, or one per module's ending."""
    indices = ledger.config.get("token_indices") or ledger.config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((rows for ending, rows in indices.items() if module.endswith(ending)), None)
    whole = isinstance(indices, list) and all(type(index) is int and index >= 0 for index in indices)
    if not whole or not indices or len(set(indices)) < len(indices):
        raise SourceError(
            f"{ledger.where}: the config does not say which rows of {module} were trained, each once; "
            "mend token_indices in adapter_config.json"
        )
    return tuple(indices)
