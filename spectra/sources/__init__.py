"""From files to updates: what a path holds, and the updates in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from spectra.deltas.source import Source
from spectra.errors import SelectionError, SourceError, UnsupportedFormatError
from spectra.files import hub
from spectra.files.folder import Folder
from spectra.models.opening import in_the_same_names, open_model
from spectra.sources import recognised
from spectra.sources.formats import FORMATS, Format

__all__ = ["FORMATS", "Format", "format_of", "open_source", "source_of"]


def open_source(
    tuned: str | Path,
    base: str | Path | None = None,
    *,
    split: bool = True,
    heads: str | int = "mean",
    scale: float | None = None,
) -> Source:
    """List the updates that a tuned model or adapter holds, from headers alone.

    Args:
        tuned: a folder, a weights file, a hub id (`org/name[@revision]`) or an alias.
        base: the model it started from; required for full checkpoints, optional for LoRA and kin,
            where it adds the base's norm and checks names and shapes.
        split: report fused projections (GPT-2's c_attn) as their parts; False keeps them as stored.
        heads: "mean", "sum", "each" or an index, for multi-head adapters.
        scale: the scale s where the file does not carry it.

    Raises:
        NotFoundError: a path, id or alias leads nowhere.
        UnsupportedFormatError: the format is not one of FORMATS.
        BaseRequiredError: the format needs the base.
        SourceError: a file is broken.
    """
    return source_of(open_model(hub.resolve(tuned)), base, split=split, heads=heads, scale=scale)


def source_of(
    folder: Folder,
    base: str | Path | None = None,
    *,
    split: bool = True,
    heads: str | int = "mean",
    scale: float | None = None,
) -> Source:
    """The updates in a folder that is open already; everything else as for `open_source`."""
    if not isinstance(heads, int) and heads not in ("mean", "sum", "each"):
        raise SelectionError(f"heads={heads!r} is not one of mean, sum, each or the index of a head")
    found = format_of(folder)
    base_folder = open_model(hub.resolve(base)) if base is not None else None
    if base_folder is not None and recognised.is_no_model(base_folder):
        raise SelectionError(f"{base_folder.path} is an adapter, not a base model; pass full weights as base= (--base)")
    if base_folder is not None:
        folder, base_folder = in_the_same_names(folder, base_folder)
    source = found.open(folder, base_folder, split=split, heads=heads, scale=scale)
    return replace(source, options={"heads": heads, "scale": scale, "split": split})


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
