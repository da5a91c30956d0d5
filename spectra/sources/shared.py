"""Updates that act on one weight: a tied head and the embedding that it is have one ΔW, the sum of both."""

from __future__ import annotations

from dataclasses import replace

from spectra.deltas.delta import WeightDelta
from spectra.deltas.recipe import Recipe
from spectra.deltas.recipes import Summed
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.models import tied
from spectra.naming import split_parts
from spectra.sources.ledger import Ledger
from spectra.sources.targets import saved_name, saves_whole

_COMPARED_ROWS = 16


def add_up(ledger: Ledger) -> None:
    """Leave one update for every weight that several names of the adapter stand for, and say what it is of."""
    if ledger.base is None:
        _name_as_stored(ledger)
    else:
        _join_refused(ledger, ledger.base)
    by_name: dict[str, list[WeightDelta]] = {}
    for delta in ledger.deltas:
        by_name.setdefault(delta.name, []).append(delta)
    whole = {name: split_parts(name)[0] for name in by_name}
    ledger.deltas[:] = [
        delta
        for name, updates in by_name.items()
        for delta in (_noted(ledger, whole[name], updates) if whole[name] in ledger.tied else updates)
    ]
    _warn_of_a_pair(ledger)


def _noted(ledger: Ledger, name: str, updates: list[WeightDelta]) -> list[WeightDelta]:
    """The sum of the updates of one tied weight."""
    heads = " and ".join(ledger.tied[name])
    alone = len(updates) == 1
    note = (
        f"the update of {heads}, tied to this weight"
        if alone
        else f"the sum of its own update and that of {heads}, tied to it"
    )
    summed = updates[0] if alone else _sum(ledger, updates, heads)
    return [replace(summed, note="; ".join(filter(None, (summed.note, note))))] if summed.recipe else [summed]


def _sum(ledger: Ledger, updates: list[WeightDelta], heads: str) -> WeightDelta:
    first = updates[0]
    refused = [delta for delta in updates if delta.recipe is None]
    recipes: tuple[Recipe, ...] = tuple(delta.recipe for delta in updates if delta.recipe is not None)
    if refused:
        why = f"it is tied to {heads}, and one of their updates has no number: {refused[0].reason}"
    elif any(_depends_on_base(delta) for delta in updates):
        why = f"it is tied to {heads}, and one of their updates depends on the weight, so they do not add up"
    else:
        rank = min(sum(delta.max_rank for delta in updates), *first.shape)
        return replace(first, recipe=Summed(recipes), max_rank=rank)
    ledger.unsupported[first.name] = why
    return WeightDelta.refused(first.name, first.shape, "unsupported", why)


def _depends_on_base(delta: WeightDelta) -> bool:
    stored = delta.base.stored if delta.base else None
    refs = delta.recipe.refs if delta.recipe else ()
    return stored is not None and any((ref.path, ref.name) == (stored.path, stored.name) for ref in refs)


def _name_as_stored(ledger: Ledger) -> None:
    """Without a base, give a head's update the embedding's name where the files say that the two are one weight."""
    stored = map(saved_name, (*ledger.tuned.tensors, *ledger.tuned.same))
    embedding = tied.embedding_in(dict.fromkeys((*stored, *(delta.name for delta in ledger.deltas)), ""))
    if embedding is None or saves_whole(ledger, embedding):
        return
    for head in {delta.name for delta in ledger.deltas if tied.is_head(delta.name)}:
        if not saves_whole(ledger, head) and _is_one(ledger, head, embedding):
            ledger.tied.setdefault(embedding, []).append(head)
            own = [replace(delta, name=embedding) if delta.name == head else delta for delta in ledger.deltas]
            ledger.deltas[:] = own


def _join_refused(ledger: Ledger, base: Folder) -> None:
    """Give a head's refused update the name of the adapted embedding that it is: without it, the sum has no number."""
    adapted = {delta.name for delta in ledger.deltas}
    for place, delta in enumerate(ledger.deltas):
        if delta.recipe is None and delta.name not in base.tensors and tied.is_head(delta.name):
            held = tied.stored_as(delta.name, base.tensors, base.same, base.config_of(delta.name))
            if held in adapted and held is not None:
                ledger.tied.setdefault(held, []).append(delta.name)
                ledger.deltas[place] = replace(delta, name=held)


def _is_one(ledger: Ledger, head: str, embedding: str) -> bool | None:
    """Whether the file or the config beside it says that a head is the embedding; None where neither does.

    PEFT saves the weight under an adapted head and under an adapted embedding: two copies of a tied one.
    """
    tuned = ledger.tuned
    if any({saved_name(one), saved_name(other)} == {head, embedding} for one, other in tuned.same.items()):
        return True
    copies = [ref for name, ref in tuned.tensors.items() if saved_name(name) in (head, embedding)]
    equal = _are_equal(*copies) if len(copies) == 2 else None
    return True if equal is None and tuned.config.get("tie_word_embeddings") is True else equal


def _are_equal(one: TensorRef, other: TensorRef) -> bool | None:
    """Whether two matrices are bit-equal in rows spread over them; None where their bytes do not lie in rows."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if len(one.shape) != 2 or not one.numel or {one.container, other.container} - {"safetensors", "archive"}:
        return None
    rows = range(0, one.shape[0], max(one.shape[0] // _COMPARED_ROWS, 1))
    samples = [[_bytes_of(ref.rows(row, row + 1)) for row in rows] for ref in (one, other)]
    varied = any(len(set(row)) > 1 for row in samples[0])  # rows of zeros are equal in any two models
    return samples[0] == samples[1] if varied else None


def _bytes_of(ref: TensorRef) -> bytes:
    return bytes(ref.file.read(ref.offset, ref.nbytes))


def _warn_of_a_pair(ledger: Ledger) -> None:
    """Without a base, whether an adapted head and an adapted embedding are one weight is not known."""
    names = [delta.name for delta in ledger.deltas if delta.recipe is not None]
    heads, embeddings = (list(filter(test, names)) for test in (tied.is_head, tied.is_embedding))
    if ledger.base is None and heads and embeddings and _is_one(ledger, heads[0], embeddings[0]) is None:
        ledger.warnings.append(
            f"if the model ties {heads[0]} to {embeddings[0]}, they are one weight and ΔW is the sum of both: "
            "pass base= (--base) to know"
        )
