"""VB-LoRA: ΔW = B·A, the factors put together from a few vectors of one bank (Li et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.deltas.forms import LowRank
from spectra.deltas.recipes import FromTensors
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules, slot_pattern
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

_SLOTS = slot_pattern("vblora_logits_[AB](?:_topk_indices|_topk_weights)?")
_INDEX_TYPES = ("U8", "I16", "I32", "I64")


@dataclass(frozen=True)
class Mixture(FromTensors):
    """Every piece of a factor as a mixture of K vectors of the bank.

    Attributes:
        logits: (a, b, vectors), whose K largest give the mixture by their softmax; or None where
        indices: (a, b, K) says which vectors, and
        weights: (a, b, K − 1) how much of each, the last one having the rest.
        k: how many vectors are mixed.
    """

    logits: TensorRef | None
    indices: TensorRef | None
    weights: TensorRef | None
    k: int

    @property
    def pieces(self) -> tuple[int, int]:
        """(a, b)."""
        return (self.refs[0].shape[0], self.refs[0].shape[1])

    def read(self, bank: Tensor) -> Tensor:
        """The pieces (a, b, length).

        Raises:
            SourceError: an index lies outside the bank.
        """
        device = str(bank.device)
        if self.logits is not None:
            top = self.logits.read_float64(device).topk(self.k, dim=-1)
            weights, indices = top.values.softmax(-1), top.indices
        else:
            assert self.indices is not None
            assert self.weights is not None
            indices = self.indices.read(device).to(torch.long)
            if bool(((indices < 0) | (indices >= bank.shape[0])).any()):
                raise SourceError(f"{self.indices.name} in {self.indices.path} points outside the bank of vectors")
            weights = self.weights.read_float64(device)
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
        return torch.einsum("abk,abkv->abv", weights, bank[indices])


@dataclass(frozen=True)
class FromBank(FromTensors):
    """ΔW = B·A with the pieces of A's rows and of B's columns mixed from the bank.

    Attributes:
        rows: A's pieces (r, in/v).
        columns: B's pieces (out/v, r).
        bank: (vectors, v).
    """

    factored = True
    rows: Mixture
    columns: Mixture
    bank: TensorRef

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        length = self.bank.shape[1]
        return (self.columns.pieces[0] * length, self.rows.pieces[1] * length)

    @property
    def rank(self) -> int:
        """At most r."""
        return min(self.rows.pieces[0], *self.shape)

    def read(self, device: str = "cpu") -> LowRank:
        """The factors in float64."""
        bank = self.bank.read_float64(device)
        A, B = self.rows.read(bank), self.columns.read(bank)
        return LowRank(B.transpose(1, 2).flatten(0, 1), A.flatten(1))


def read(ledger: Ledger) -> None:
    """Enter every module's mixtures from the bank, saved as logits or as the K that matter.

    Raises:
        SourceError: topk in the config is no number, or the bank is not there.
    """
    topk = ledger.config.count("topk")
    modules, bank = ledger.modules(_SLOTS), ledger.shared("vblora_vector_bank")
    if bank is None or len(bank.shape) != 2 or not bank.is_float:
        raise SourceError(
            f"{ledger.where}: the bank of vectors, base_model.vblora_vector_bank, is missing or no matrix"
        )

    def build(module: str, slots: Slots) -> FromBank:
        A, B = (_mixture(side, slots, topk, bank.shape[0]) for side in "AB")
        if A.pieces[0] != B.pieces[1]:
            raise Refusal(
                f"the pieces {list(A.pieces)} of A and {list(B.pieces)} of B are not (r, in/v) and (out/v, r)"
            )
        rank = ledger.config.get("r")
        if rank not in (None, A.pieces[0]):
            raise Refusal(f"the config says r = {rank!r} for {module}, the mixtures have {A.pieces[0]}")
        return FromBank(A, B, bank)

    add_modules(ledger, modules, build)


def _mixture(side: str, slots: Slots, topk: int, vectors: int) -> Mixture:
    """One factor's mixtures in either layout."""
    name = f"vblora_logits_{side}"
    indices, weights = slots.get(f"{name}_topk_indices"), slots.get(f"{name}_topk_weights")
    if indices is None and weights is None:
        (logits,) = slots.real(name)
        if len(logits.shape) != 3 or logits.shape[2] != vectors or topk > vectors:
            expected = f"(…, …, {vectors}), from which {topk} vectors can be taken"
            raise Refusal(f"{name} {list(logits.shape)} is not {expected}")
        return Mixture(logits, None, None, topk)
    (weights,) = slots.real(f"{name}_topk_weights")
    if indices is None:
        raise Refusal(f"{name}_topk_indices is missing")
    if name in slots:
        raise Refusal(f"{name} is stored both as logits and as the mixture they give")
    if indices.dtype not in _INDEX_TYPES or len(indices.shape) != 3 or indices.shape[2] != topk:
        given = f"{name}_topk_indices {list(indices.shape)} of {indices.dtype}"
        raise Refusal(f"{given} are not {topk} whole numbers for each piece")
    if weights.shape != (*indices.shape[:2], topk - 1):
        raise Refusal(f"{name}_topk_weights {list(weights.shape)} do not fit the indices {list(indices.shape)}")
    return Mixture(None, indices, weights, topk)
