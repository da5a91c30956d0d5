"""The table of formats; each is one file beside this one, imported when a folder may hold it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from spectra.deltas.source import Source
from spectra.files.folder import Folder


@dataclass(frozen=True)
class Format:
    """One row of the table: how a format is known and how it is read.

    A format's file is imported when a tensor's name has one of its marks, and not before.

    Attributes:
        kind: what `Source.kind` says.
        title: the format's name for people.
        marks: pieces of tensors' names, a line break for a name's start or end: one of them is there, or the folder
            does not hold the format. Empty where no name tells.
        opener: "file.function", which reads metadata into a `Source`; signature as `checkpoint.open_checkpoint`.
        decider: "file.function", which says of a folder with a mark whether it holds the format; "" where it must.
        needs_base: whether ΔW cannot be formed without the base.
        peft_types: what the config's peft_type may say; empty for formats that carry none.
    """

    kind: str
    title: str
    marks: tuple[str, ...]
    opener: str
    decider: str = ""
    needs_base: bool = False
    peft_types: tuple[str, ...] = ()

    def matches(self, folder: Folder) -> bool:
        """Whether a folder holds it, from names and config alone."""
        marked = not self.marks or any(mark in folder.listing for mark in self.marks)
        return marked and (not self.decider or bool(_function(self.decider)(folder)))

    def open(self, tuned: Folder, base: Folder | None, **options: Any) -> Source:
        """Read a folder's metadata into a `Source`."""
        source: Source = _function(self.opener)(tuned, base, **options)
        return source


def _function(place: str) -> Callable[..., Any]:
    """A function of a format's file by "file.function"."""
    file, name = place.split(".")
    found: Callable[..., Any] = getattr(import_module(f"{__name__}.{file}"), name)
    return found


# The first that matches wins: names that only one format uses come before the ones that many use.
FORMATS: tuple[Format, ...] = (
    Format("multilora", "MultiLoRA", (".multilora_A\n", ".lora_scaling\n"), "multilora.open_multilora"),
    Format(
        "multihead",
        "R-LoRA, HydraLoRA (multi-head LoRA)",
        ("lora_",),
        "multihead.open_multihead",
        decider="multihead.matches",
    ),
    Format("adalora", "AdaLoRA", (".lora_E",), "adalora.open_adalora", peft_types=("ADALORA",)),
    Format("loha", "LoHa (PEFT)", (".hada_w",), "loha.open_loha", decider="loha.matches", peft_types=("LOHA",)),
    Format("lokr", "LoKr (PEFT)", (".lokr_w",), "lokr.open_lokr", decider="lokr.matches", peft_types=("LOKR",)),
    Format("oft", "OFT", (".oft_R", ".oft_embedding_R"), "oft.open_oft", needs_base=True, peft_types=("OFT",)),
    Format("boft", "BOFT", (".boft_R",), "boft.open_boft", needs_base=True, peft_types=("BOFT",)),
    Format("hra", "HRA", (".hra_u",), "hra.open_hra", needs_base=True, peft_types=("HRA",)),
    Format(
        "miss",
        "MiSS, Bone",
        (".miss_block", ".bone_block"),
        "miss.open_miss",
        needs_base=True,
        peft_types=("MISS", "BONE"),
    ),
    Format("delora", "DeLoRA", (".delora_A",), "delora.open_delora", peft_types=("DELORA",)),
    Format("hira", "HiRA", (".hira_A", ".hira_embedding_A"), "hira.open_hira", needs_base=True, peft_types=("HIRA",)),
    Format("road", "RoAd", (".road_theta",), "road.open_road", needs_base=True, peft_types=("ROAD",)),
    Format("gralora", "GraLoRA", (".gralora_A",), "gralora.open_gralora", peft_types=("GRALORA",)),
    Format("deft", "DEFT, PaRa", (".deft_P",), "deft.open_deft", needs_base=True, peft_types=("DEFT",)),
    Format("glora", "GLoRA", (".glora_A.",), "glora.open_glora", needs_base=True, peft_types=("GLORA",)),
    Format("osf", "OSF", (".osf_svd_params.",), "osf.open_osf", needs_base=True, peft_types=("OSF",)),
    Format(
        "supertuning",
        "Super-Tuning, Supra",
        (".supertuning_values",),
        "supertuning.open_supertuning",
        needs_base=True,
        peft_types=("SUPERTUNING",),
    ),
    Format("vera", "VeRA", (".vera_lambda_",), "vera.open_vera", needs_base=True, peft_types=("VERA",)),
    Format("pvera", "PVeRA", (".pvera_lambda_",), "vera.open_pvera", needs_base=True, peft_types=("PVERA",)),
    Format("ia3", "(IA)³", (".ia3_l",), "ia3.open_ia3", needs_base=True, peft_types=("IA3",)),
    Format(
        "trainable_tokens",
        "trainable tokens",
        (".trainable_tokens_delta",),
        "trainable_tokens.open_trainable_tokens",
        decider="trainable_tokens.matches",
        needs_base=True,
        peft_types=("TRAINABLE_TOKENS", "LORA"),
    ),
    Format("ln_tuning", "LN tuning", (".ln_tuning_layers.",), "ln_tuning.open_ln_tuning", peft_types=("LN_TUNING",)),
    Format(
        "fourierft",
        "FourierFT",
        (".fourierft_spectrum",),
        "fourierft.open_fourierft",
        needs_base=True,
        peft_types=("FOURIERFT",),
    ),
    Format(
        "shira",
        "SHiRA",
        (".shira_weight", ".shira_indices"),
        "shira.open_shira",
        needs_base=True,
        peft_types=("SHIRA",),
    ),
    Format("c3a", "C3A", (".c3a_kernel",), "c3a.open_c3a", peft_types=("C3A",)),
    Format("vblora", "VB-LoRA", (".vblora_logits_",), "vblora.open_vblora", peft_types=("VBLORA",)),
    Format(
        "randlora",
        "RandLoRA",
        (".randlora_lambda", ".randlora_gamma"),
        "randlora.open_randlora",
        needs_base=True,
        peft_types=("RANDLORA",),
    ),
    Format("peanut", "PEANuT", (".peanut_A",), "peanut.open_peanut", needs_base=True, peft_types=("PEANUT",)),
    Format("waveft", "WaveFT", (".waveft_spectrum",), "waveft.open_waveft", needs_base=True, peft_types=("WAVEFT",)),
    Format("tinylora", "TinyLoRA", (".tinylora_A",), "tinylora.open_tinylora", peft_types=("TINYLORA",)),
    Format("frod", "FRoD", (".frod_lambda_l",), "frod.open_frod", needs_base=True, peft_types=("FROD",)),
    Format("unilora", "Uni-LoRA", (".unilora_theta_d",), "unilora.open_unilora", peft_types=("UNILORA",)),
    Format("kohya", "kohya, LyCORIS", ("\nlora_", "\nlycoris_"), "kohya.open_kohya", decider="kohya.matches"),
    Format(
        "diffusers",
        "diffusers LoRA",
        ("lora", ".down.weight", ".up.weight", ".hada_", ".lokr_", ".w_norm", ".b_norm", ".oft_", ".on_input"),
        "kohya.open_diffusers",
        decider="kohya.matches_diffusers",
    ),
    Format(
        "mixture",
        "LoRAMoE, MixLoRA, MOELoRA, MTL-LoRA (several pairs per module)",
        ("lora_",),
        "mixture.open_mixture",
        decider="mixture.matches",
    ),
    Format(
        "dora",
        "DoRA",
        ("lora_magnitude_vector",),
        "lora.open_lora",
        decider="lora.matches",
        needs_base=True,
        peft_types=("LORA",),
    ),
    Format(
        "lora",
        "LoRA, rsLoRA (PEFT)",
        (".lora_A", ".lora_embedding_A"),
        "lora.open_lora",
        decider="lora.matches",
        peft_types=("LORA",),
    ),
    Format(
        "checkpoint", "full checkpoint", (), "checkpoint.open_checkpoint", decider="checkpoint.matches", needs_base=True
    ),
)
