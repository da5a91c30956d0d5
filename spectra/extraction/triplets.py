"""Where the singular triplets of an extraction come from: computed now, or stored by an earlier run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Protocol

from spectra.deltas.at_work import Account, announce
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import LowRank
from spectra.engine.accounts import account_of
from spectra.engine.costs import flops
from spectra.engine.decompose import decompose_indexed
from spectra.engine.solvers.factored import factored_svd
from spectra.extraction.gather import Block
from spectra.extraction.weights import join_factors, row_numbers
from spectra.lazy import torch
from spectra.results.collection import Spectra
from spectra.spectrum import DONE, Spectrum

_SMALLEST = 8  # triplets that are computed together with fewer


class Triplets(Protocol):
    """The spectra of the blocks of some weights."""

    def planned(self, rank: int | None, *, values: bool, vectors: bool) -> Triplets:
        """The same, where those who watch are told what will be asked for: all values, triplets of a rank, or both."""
        ...

    def values(self) -> Iterator[Spectrum]:
        """The singular values of every block."""
        ...

    def vectors(self, ranks: Mapping[str, int]) -> Iterator[Spectrum]:
        """The top triplets of the blocks that are named, at least so many of each where it has them."""
        ...


@dataclass(frozen=True)
class Computed:
    """Triplets that the engine computes when they are asked for.

    Attributes:
        blocks: what to decompose.
        device: as for `decompose`.
        executor: as for `decompose`.
        memory_budget: as for `decompose`.
        account: of all that will be asked for, which is announced already; None for an account of each time.
    """

    blocks: Sequence[Block]
    device: str = "auto"
    executor: Executor | None = None
    memory_budget: int | str | None = None
    account: Account | None = None

    def planned(self, rank: int | None, *, values: bool, vectors: bool) -> Computed:
        """The same with one account of both rounds, in which every block is thought to need triplets."""
        tops = [None] * values + [rank or _SMALLEST] * vectors
        deltas = [block.delta for block in self.blocks]
        rounds = [
            account_of(deltas, top, only_top=top is not None, device=self.device, executor=self.executor)
            for top in tops
        ]
        rounds[0].total = sum(account.total for account in rounds)
        return replace(self, account=announce(rounds[0]))

    def values(self) -> Iterator[Spectrum]:
        """All singular values of every block."""
        yield from self._decomposed([block.delta for block in self.blocks], None, only_top=False)

    def vectors(self, ranks: Mapping[str, int]) -> Iterator[Spectrum]:
        """The top triplets, and of factored updates all values, which cost nothing there.

        Blocks that need about as many are decomposed side by side, with as many as the neediest of them may need:
        the next power of two.
        """
        groups: dict[tuple[int, bool], list[WeightDelta]] = {}
        for block in self.blocks:
            rank = min(ranks.get(block.delta.name, 0), block.delta.max_rank)
            if rank:
                top = min(max(_SMALLEST, 2 ** math.ceil(math.log2(rank))), min(block.delta.shape))
                top = rank if len(set(ranks.values())) == 1 else top
                groups.setdefault((top, block.delta.factored), []).append(block.delta)
            elif self.account is not None:
                self.account.total -= flops(block.delta, _SMALLEST)
        for (top, is_factored), deltas in groups.items():
            yield from self._decomposed(deltas, top, only_top=not is_factored)

    def _decomposed(self, deltas: Sequence[WeightDelta], top: int | None, *, only_top: bool) -> Iterator[Spectrum]:
        spectra = decompose_indexed(
            deltas, top=top, only_top=only_top, device=self.device, executor=self.executor,
            budget=self.memory_budget, account=self.account,
        )  # fmt: skip
        return (spectrum for _, spectrum in spectra)


@dataclass(frozen=True)
class Stored:
    """Triplets that a run has stored, by the names of the matrices that it decomposed.

    Attributes:
        blocks: what they are for.
        spectra: the run.
    """

    blocks: Sequence[Block]
    spectra: Spectra

    def planned(self, rank: int | None, *, values: bool, vectors: bool) -> Stored:
        """Reading has no costs to tell."""
        return self

    def values(self) -> Iterator[Spectrum]:
        """The stored singular values of every block."""
        spectra = self.spectra.without_vectors()
        for block in self.blocks:
            # Parts say little of the whole without their vectors.
            yield self._of(block, spectra) if len(block.pieces) == 1 else self._of(block, self.spectra)

    def vectors(self, ranks: Mapping[str, int]) -> Iterator[Spectrum]:
        """The stored triplets."""
        for block in self.blocks:
            if ranks.get(block.delta.name, 0):
                yield self._of(block, self.spectra)

    def _of(self, block: Block, spectra: Spectra) -> Spectrum:
        pieces = [spectra[delta.name] for delta, _ in block.pieces]
        undone = next((spectrum for spectrum in pieces if spectrum.status not in DONE), None)
        if undone is not None or (len(pieces) == 1 and pieces[0].shape == block.delta.shape):
            return replace(undone or pieces[0], name=block.delta.name)
        return _joined(block, pieces)


def _joined(block: Block, parts: Sequence[Spectrum]) -> Spectrum:
    r"""The triplets of a whole weight from those that are stored of its parts.

    Each part P keeps its top triplets, P = P_k + rest. The rest is orthogonal to every matrix whose rows in that part
    come from P_k, so ‖ΔW − X‖² = ‖ΔW‖² − ‖X‖² for the truncated SVD X of the parts put together, as it is for one
    of ΔW: the error is exact, and X the best that the stored vectors give.
    """
    norm = math.hypot(*(spectrum.norm or 0.0 for spectrum in parts))
    changed = [(part, place) for part, (_, place) in zip(parts, block.pieces, strict=True) if part.k]
    if not changed or any(place is None for _, place in changed):
        why = "its parts were stored without vectors: run spectra svd --top, or with --no-split"
        unknown = norm > 0
        return Spectrum(
            block.delta.name, block.delta.shape, "failed" if unknown else "unchanged", reason=why, norm=norm
        )
    forms = [
        LowRank(torch.from_numpy(part.U * part.S[: part.k]), torch.from_numpy(part.Vh))
        for part, _ in changed
        if part.U is not None and part.Vh is not None
    ]
    shape = (block.delta.shape[0], block.delta.shape[1])
    whole = join_factors(shape, forms, [row_numbers(place) for _, place in changed if place is not None], shared=False)
    width = min(whole.left.shape[1], *shape)
    S, U, Vh = factored_svd(whole.left, whole.right, width)
    assert U is not None
    assert Vh is not None
    resolution = max(part.resolution for part, _ in changed)
    edges = [part.noise_edge for part, _ in changed if part.noise_edge is not None]
    return Spectrum(
        block.delta.name,
        shape,
        S=S.numpy(),
        U=U.numpy(),
        Vh=Vh.numpy(),
        norm=norm,
        noise_edge=math.hypot(*edges) if edges else None,
        resolution=resolution,
        method="joined from the stored parts",
    )
