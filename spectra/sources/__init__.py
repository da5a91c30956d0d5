"""From files to updates: `open_source` and the table of formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spectra.errors import SelectionError, SourceError, UnsupportedFormatError
from spectra.sources import (
    adalora,
    boft,
    c3a,
    checkpoint,
    deft,
    delora,
    fourierft,
    frod,
    glora,
    gralora,
    hira,
    hra,
    hub,
    ia3,
    kohya,
    ln_tuning,
    loha,
    lokr,
    lora,
    lora_mixtures,
    miss,
    multihead,
    multilora,
    oft,
    osf,
    peanut,
    randlora,
    recognised,
    road,
    shira,
    supertuning,
    tinylora,
    trainable_tokens,
    unilora,
    vblora,
    vera,
    waveft,
)
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
        peft_types: what the config's peft_type may say; empty for formats that carry none.
    """

    kind: str
    title: str
    matches: Callable[[Folder], bool]
    open: Callable[..., Source]
    needs_base: bool = False
    peft_types: tuple[str, ...] = ()


# The first that matches wins: names that only one format uses come before the ones that many use.
FORMATS: tuple[Format, ...] = (
    Format(multilora.KIND, "MultiLoRA", multilora.matches, multilora.open_multilora),
    Format(
        multihead.KIND,
        "R-LoRA, HydraLoRA (multi-head LoRA)",
        multihead.matches,
        multihead.open_multihead,
    ),
    Format(adalora.KIND, "AdaLoRA", adalora.matches, adalora.open_adalora, peft_types=("ADALORA",)),
    Format(loha.KIND, "LoHa (PEFT)", loha.matches, loha.open_loha, peft_types=("LOHA",)),
    Format(lokr.KIND, "LoKr (PEFT)", lokr.matches, lokr.open_lokr, peft_types=("LOKR",)),
    Format(oft.KIND, "OFT", oft.matches, oft.open_oft, needs_base=True, peft_types=("OFT",)),
    Format(boft.KIND, "BOFT", boft.matches, boft.open_boft, needs_base=True, peft_types=("BOFT",)),
    Format(hra.KIND, "HRA", hra.matches, hra.open_hra, needs_base=True, peft_types=("HRA",)),
    Format(miss.KIND, "MiSS, Bone", miss.matches, miss.open_miss, needs_base=True, peft_types=("MISS", "BONE")),
    Format(delora.KIND, "DeLoRA", delora.matches, delora.open_delora, peft_types=("DELORA",)),
    Format(hira.KIND, "HiRA", hira.matches, hira.open_hira, needs_base=True, peft_types=("HIRA",)),
    Format(road.KIND, "RoAd", road.matches, road.open_road, needs_base=True, peft_types=("ROAD",)),
    Format(gralora.KIND, "GraLoRA", gralora.matches, gralora.open_gralora, peft_types=("GRALORA",)),
    Format(deft.KIND, "DEFT, PaRa", deft.matches, deft.open_deft, needs_base=True, peft_types=("DEFT",)),
    Format(glora.KIND, "GLoRA", glora.matches, glora.open_glora, needs_base=True, peft_types=("GLORA",)),
    Format(osf.KIND, "OSF", osf.matches, osf.open_osf, needs_base=True, peft_types=("OSF",)),
    Format(
        supertuning.KIND,
        "Super-Tuning, Supra",
        supertuning.matches,
        supertuning.open_supertuning,
        needs_base=True,
        peft_types=("SUPERTUNING",),
    ),
    Format(vera.KIND, "VeRA", vera.matches, vera.open_vera, needs_base=True, peft_types=("VERA",)),
    Format(vera.KIND_PVERA, "PVeRA", vera.matches_pvera, vera.open_pvera, needs_base=True, peft_types=("PVERA",)),
    Format(ia3.KIND, "(IA)³", ia3.matches, ia3.open_ia3, needs_base=True, peft_types=("IA3",)),
    Format(
        trainable_tokens.KIND,
        "trainable tokens",
        trainable_tokens.matches,
        trainable_tokens.open_trainable_tokens,
        needs_base=True,
        peft_types=("TRAINABLE_TOKENS", "LORA"),
    ),
    Format(ln_tuning.KIND, "LN tuning", ln_tuning.matches, ln_tuning.open_ln_tuning, peft_types=("LN_TUNING",)),
    Format(
        fourierft.KIND,
        "FourierFT",
        fourierft.matches,
        fourierft.open_fourierft,
        needs_base=True,
        peft_types=("FOURIERFT",),
    ),
    Format(shira.KIND, "SHiRA", shira.matches, shira.open_shira, needs_base=True, peft_types=("SHIRA",)),
    Format(c3a.KIND, "C3A", c3a.matches, c3a.open_c3a, peft_types=("C3A",)),
    Format(vblora.KIND, "VB-LoRA", vblora.matches, vblora.open_vblora, peft_types=("VBLORA",)),
    Format(
        randlora.KIND, "RandLoRA", randlora.matches, randlora.open_randlora, needs_base=True, peft_types=("RANDLORA",)
    ),
    Format(peanut.KIND, "PEANuT", peanut.matches, peanut.open_peanut, needs_base=True, peft_types=("PEANUT",)),
    Format(waveft.KIND, "WaveFT", waveft.matches, waveft.open_waveft, needs_base=True, peft_types=("WAVEFT",)),
    Format(tinylora.KIND, "TinyLoRA", tinylora.matches, tinylora.open_tinylora, peft_types=("TINYLORA",)),
    Format(frod.KIND, "FRoD", frod.matches, frod.open_frod, needs_base=True, peft_types=("FROD",)),
    Format(unilora.KIND, "Uni-LoRA", unilora.matches, unilora.open_unilora, peft_types=("UNILORA",)),
    Format(kohya.KIND, "kohya, LyCORIS", kohya.matches, kohya.open_kohya),
    Format(kohya.KIND_DIFFUSERS, "diffusers LoRA", kohya.matches_diffusers, kohya.open_diffusers),
    Format(
        lora_mixtures.KIND,
        "LoRAMoE, MixLoRA, MOELoRA, MTL-LoRA (several pairs per module)",
        lora_mixtures.matches,
        lora_mixtures.open_mixture,
    ),
    Format(lora.KIND_DORA, "DoRA", lora.matches_dora, lora.open_lora, needs_base=True, peft_types=("LORA",)),
    Format(lora.KIND, "LoRA, rsLoRA (PEFT)", lora.matches, lora.open_lora, peft_types=("LORA",)),
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
        if row.matches(folder) and not (row.kind == checkpoint.KIND and recognised.has_factors(folder)):
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
