"""From files to updates: what a path holds, and the updates in it."""

from __future__ import annotations

from dataclasses import replace

from spectra.deltas.source import Source
from spectra.errors import SelectionError, SourceError, UnsupportedFormatError
from spectra.files.folder import Folder
from spectra.files.memory import Memory
from spectra.garbage import not_looked_for
from spectra.models.opening import Openable, in_the_same_names, open_any
from spectra.sources import recognised
from spectra.sources.formats import FORMATS, Format

__all__ = ["FORMATS", "Format", "format_of", "open_source", "source_of"]


def open_source(
    tuned: Openable,
    base: Openable | None = None,
    *,
    split: bool = True,
    heads: str | int = "mean",
    scale: float | None = None,
) -> Source:
    """List the updates that a tuned model or adapter holds, from headers alone.

    Either side may be in memory: a module, a PEFT model (its active adapter), or a state dict. Nothing is copied, so
    a base that is trained on has to be copied before.

    Args:
        tuned: a folder, a weights file, a hub id (`org/name[@revision]`), a URL or an alias; or a model in memory.
        base: the model it started from, likewise; required for full checkpoints, optional for LoRA and kin,
            where it adds the base's norm and checks names and shapes.
        split: report fused projections (GPT-2's c_attn) as their parts; False keeps them as stored.
        heads: "mean", "sum", "each" or an index, for multi-head adapters.
        scale: the scale s where the file does not carry it.

    Raises:
        NotFoundError: a path, id or alias leads nowhere.
        UnsupportedFormatError: the format is not one of FORMATS.
        BaseRequiredError: the format needs the base.
        SourceError: a file is broken, or both sides are the same tensors in memory.

    Example:
        >>> import torch
        >>> base = {"layers.0.q_proj.weight": torch.zeros(2, 2), "layers.0.v_proj.weight": torch.eye(2)}
        >>> tuned = {name: weight + torch.diag(torch.tensor([3.0, 4.0])) for name, weight in base.items()}
        >>> [delta.read().to_dense().diag().tolist() for delta in open_source(tuned, base)]
        [[3.0, 4.0], [3.0, 4.0]]
    """
    with not_looked_for():
        return source_of(open_any(tuned), base, split=split, heads=heads, scale=scale)


def source_of(
    folder: Folder,
    base: Openable | None = None,
    *,
    split: bool = True,
    heads: str | int = "mean",
    scale: float | None = None,
) -> Source:
    """The updates in a folder that is open already; everything else as for `open_source`."""
    if not isinstance(heads, int) and heads not in ("mean", "sum", "each"):
        raise SelectionError(f"heads={heads!r} is not one of mean, sum, each or the index of a head")
    row = format_of(folder)
    base_folder = open_any(base, as_base=True) if base is not None else None
    if base_folder is not None and recognised.is_no_model(base_folder):
        raise SelectionError(f"{base_folder.path} is an adapter, not a base model; pass full weights as base= (--base)")
    if base_folder is not None:
        _check_two(folder, base_folder)
        folder, base_folder = in_the_same_names(folder, base_folder)
    source = row.open(folder, base_folder, split=split, heads=heads, scale=scale)
    return replace(source, options={"heads": heads, "scale": scale, "split": split})


def _check_two(tuned: Folder, base: Folder) -> None:
    """Raise if every weight of the tuned model is the base's own tensor: training would have changed both."""
    ours, theirs = (
        {ref.storage.address(ref.name) for ref in folder.tensors.values() if isinstance(ref.storage, Memory)}
        for folder in (tuned, base)
    )
    if ours and ours <= theirs:
        raise SourceError(
            f"{tuned.path} and {base.path} are the same tensors, so ΔW would be 0 whatever was trained: copy the base "
            "before training, {name: tensor.clone() for name, tensor in model.state_dict().items()}"
        )


def format_of(folder: Folder) -> Format:
    """The first row of FORMATS that the folder's names and config fit.

    Raises:
        UnsupportedFormatError: none does; the message names the format if it is recognised.
        SourceError: the config declares another format than the tensors' names.
    """
    named = recognised.name_of(folder)
    known = ", ".join(row.title for row in FORMATS)
    if named:
        raise UnsupportedFormatError(f"{folder.path} holds {named}, which is not supported; supported: {known}")
    no_update = recognised.without_update(folder)
    if no_update:
        raise UnsupportedFormatError(f"{folder.path} holds {no_update}")
    declared = recognised.declared_type(folder)
    example = next(iter(folder.tensors), "nothing")
    for row in FORMATS:
        if row.matches(folder):
            if declared and row.peft_types and declared not in row.peft_types:
                raise SourceError(
                    f"{folder.path}: the config says peft_type {declared!r}, the tensors (such as {example!r}) are "
                    f"those of {row.title}; put the config back that belongs to them"
                )
            return row
    if declared and any(declared in row.peft_types for row in FORMATS):
        raise SourceError(
            f"{folder.path}: the config says peft_type {declared!r}, and no tensor (such as {example!r}) is one of "
            "such an adapter; put the config back that belongs to them"
        )
    if declared:
        raise UnsupportedFormatError(
            f"{folder.path} holds an adapter of peft_type {declared!r}, which is not supported; supported: {known}"
        )
    raise UnsupportedFormatError(
        f"{folder.path} looks like an adapter of an unknown format (it holds {example!r}); supported: {known}"
    )
