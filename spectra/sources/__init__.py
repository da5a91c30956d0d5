"""From files to updates: `open_source` and the table of formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spectra.errors import SelectionError, UnsupportedFormatError
from spectra.sources import checkpoint, hub, lora, multihead, multilora, recognised
from spectra.sources.folder import Folder, open_folder
from spectra.types import Source


@dataclass(frozen=True)
class Format:
    """One row of the table: how a format is known and how it is read.

    Attributes:
        kind: what `Source.kind` says.
        title: the format's name for people.
        matches: whether a folder holds it, from names and config alone.
        open: reads metadata into a `Source`; signature as `checkpoint.open_checkpoint`.
        needs_base: whether ΔW cannot be formed without the base.
    """

    kind: str
    title: str
    matches: Callable[[Folder], bool]
    open: Callable[..., Source]
    needs_base: bool = False


# The first that matches wins: names that only one format uses come before the ones that many use.
FORMATS: tuple[Format, ...] = (
    Format(multilora.KIND, "MultiLoRA", multilora.matches, multilora.open_multilora),
    Format(
        multihead.KIND,
        "R-LoRA, HydraLoRA (multi-head LoRA)",
        multihead.matches,
        multihead.open_multihead,
    ),
    Format(lora.KIND, "LoRA, rsLoRA (PEFT)", lora.matches, lora.open_lora),
    Format(
        checkpoint.KIND,
        "full checkpoint",
        checkpoint.matches,
        checkpoint.open_checkpoint,
        needs_base=True,
    ),
)


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
    if not isinstance(heads, int) and heads not in ("mean", "sum", "each"):
        raise SelectionError(f"heads={heads!r} is not one of mean, sum, each or the index of a head")
    folder = open_folder(hub.resolve(tuned))
    found = format_of(folder)
    base_folder = open_folder(hub.resolve(base)) if base is not None else None
    if base_folder is not None and base_folder.is_adapter:
        raise SelectionError(f"{base_folder.path} is an adapter, not a base model; pass full weights as --base")
    return found.open(folder, base_folder, split=split, heads=heads, scale=scale)


def format_of(folder: Folder) -> Format:
    """The first row of FORMATS that the folder's names and config fit.

    Raises:
        UnsupportedFormatError: none does; the message names the format if it is recognised.
    """
    named = recognised.name_of(folder)
    known = ", ".join(row.title for row in FORMATS)
    if named:
        raise UnsupportedFormatError(f"{folder.path} holds {named}, which is not supported; supported: {known}")
    for row in FORMATS:
        if row.matches(folder):
            return row
    example = next(iter(folder.tensors), "nothing")
    raise UnsupportedFormatError(
        f"{folder.path} looks like an adapter of an unknown format (it holds {example!r}); supported: {known}"
    )
