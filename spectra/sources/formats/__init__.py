"""The table of formats; each is one file beside this one, imported when a folder may hold it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Literal

from spectra.deltas.source import NO_HEADS, Source
from spectra.files.folder import Folder
from spectra.models.pairing import unwrap
from spectra.sources.dump import compare_base_layers, inner_base
from spectra.sources.ledger import Ledger
from spectra.sources.rest import account_for_rest
from spectra.sources.shared import add_up

Scale = Literal["none", "config", "own"]


@dataclass(frozen=True)
class Format:
    """One row of the table: how a format is known and what it needs; its file says how ΔW follows from its tensors.

    The file is imported when a tensor's name has one of the marks, and not before. It has a function
    `read(ledger)`, and `matches(folder)` where the marks do not decide.

    Attributes:
        kind: what `Source.kind` says, and the file's name where `file` does not say another.
        title: the format's name for people.
        marks: pieces of tensors' names, a line break for a name's start or end: one of them is there, or the folder
            does not hold the format. Empty where no name tells.
        file: the file beside this one; "" for that of the kind's name.
        decides: whether the file's `matches` has the last word on a folder with a mark.
        needs_base: whether ΔW cannot be formed without the base.
        because: why it cannot, where that is not that ΔW depends on the weights.
        config: whether there is nothing to read without an `adapter_config.json`.
        scale: where s comes from: "none" has none to give, "config" is α/r of the config or what the user gives,
            "own" is the file's own affair.
        heads: whether there are heads to choose from.
        peft_types: what the config's peft_type may say; empty for formats that carry none.
    """

    kind: str
    title: str
    marks: tuple[str, ...]
    file: str = ""
    decides: bool = False
    needs_base: bool = False
    because: str = ""
    config: bool = False
    scale: Scale = "none"
    heads: bool = False
    peft_types: tuple[str, ...] = ()

    @property
    def module(self) -> ModuleType:
        """The format's file."""
        return import_module(f"{__name__}.{self.file or self.kind}")

    def matches(self, folder: Folder) -> bool:
        """Whether a folder holds it, from names and config alone."""
        marked = not self.marks or any(mark in folder.listing for mark in self.marks)
        return marked and (not self.decides or bool(self.module.matches(folder)))

    def modules(self, folder: Folder) -> list[str]:
        """The modules that a folder adapts, by the tensors' names alone: what stands before a mark."""
        names: dict[str, None] = {}
        for name in folder.tensors:
            line = f"\n{name}\n"
            places = [place for mark in self.marks if (place := line.find(mark)) > 0]
            if places:
                names[unwrap(line[1 : min(places)].rstrip("."))] = None
        return list(names)

    def open(
        self,
        tuned: Folder,
        base: Folder | None,
        *,
        split: bool = True,
        heads: str | int = "mean",
        scale: float | None = None,
    ) -> Source:
        """Read a folder's metadata into a `Source`; options as for `spectra.open_source`.

        Raises:
            BaseRequiredError: the format needs the base.
            SourceError: the config is missing or unusable, no scale is known, or no matrix is in it.
        """
        ledger = Ledger(tuned, base, self.kind, self.title, split, heads, scale)
        ledger.inner = inner_base(tuned) if base is None else None
        self._check_options(ledger)
        self.module.read(ledger)
        add_up(ledger)
        compare_base_layers(ledger)
        account_for_rest(ledger)
        ledger.need_something()
        return ledger.source()

    def _check_options(self, ledger: Ledger) -> None:
        if not self.heads and ledger.heads != "mean":
            ledger.warnings.append(f"heads={ledger.heads!r} {NO_HEADS} {self.title}")
        if self.scale == "none" and ledger.scale is not None:
            ledger.warnings.append(f"scale was ignored: nothing is left to scale in {self.title}")
        if self.scale == "config":
            ledger.need_scale()
            if ledger.scale is not None and ledger.tuned.adapter_config is not None:
                ledger.warnings.append("scale was ignored: adapter_config.json carries α and r")
        if self.config:
            ledger.need_config()
        if self.needs_base:
            ledger.need_base(self.because)


_SHAPES = "its file does not hold the shapes of the weights, which ΔW needs"

# The first that matches wins: names that only one format uses come before the ones that many use.
FORMATS: tuple[Format, ...] = (
    Format("litgpt", "LoRA (LitGPT)", (".lora_A\n", ".lora_B\n"), decides=True, scale="own"),
    Format("multilora", "MultiLoRA", (".multilora_A\n", ".lora_scaling\n"), scale="config", heads=True),
    Format("nvlabs_dora", "DoRA (NVlabs)", (".weight_m_wdecomp",), needs_base=True, config=True, peft_types=("DORA",)),
    Format("multihead", "R-LoRA, HydraLoRA (multi-head LoRA)", ("lora_",), decides=True, scale="own", heads=True),
    Format("adalora", "AdaLoRA", (".lora_E",), config=True, peft_types=("ADALORA",)),
    Format("loha", "LoHa (PEFT)", (".hada_w",), decides=True, scale="config", peft_types=("LOHA",)),
    Format("lokr", "LoKr (PEFT)", (".lokr_w",), decides=True, scale="config", peft_types=("LOKR",)),
    Format("oft", "OFT", (".oft_R", ".oft_embedding_R"), needs_base=True, config=True, peft_types=("OFT",)),
    Format("boft", "BOFT", (".boft_R",), needs_base=True, peft_types=("BOFT",)),
    Format("hra", "HRA", (".hra_u",), needs_base=True, config=True, peft_types=("HRA",)),
    Format("miss", "MiSS, Bone", (".miss_block", ".bone_block"), needs_base=True, config=True,
           because="ΔW of MiSS is repeated along the base weight's inputs", peft_types=("MISS", "BONE")),
    Format("delora", "DeLoRA", (".delora_A",), config=True, peft_types=("DELORA",)),
    Format("hira", "HiRA", (".hira_A", ".hira_embedding_A"), needs_base=True, config=True, peft_types=("HIRA",)),
    Format("road", "RoAd", (".road_theta",), needs_base=True, config=True, peft_types=("ROAD",)),
    Format("gralora", "GraLoRA", (".gralora_A",), config=True, peft_types=("GRALORA",)),
    Format("deft", "DEFT, PaRa", (".deft_P",), needs_base=True, config=True, peft_types=("DEFT",)),
    Format("glora", "GLoRA", (".glora_A.",), needs_base=True, config=True, peft_types=("GLORA",)),
    Format("osf", "OSF", (".osf_svd_params.",), needs_base=True, config=True, peft_types=("OSF",)),
    Format("supertuning", "Super-Tuning, Supra", (".supertuning_values",), needs_base=True, because=_SHAPES,
           config=True, peft_types=("SUPERTUNING",)),
    Format("vera", "VeRA", (".vera_lambda_",), needs_base=True, because=_SHAPES, peft_types=("VERA",)),
    Format("pvera", "PVeRA", (".pvera_lambda_",), "vera", needs_base=True, because=_SHAPES, peft_types=("PVERA",)),
    Format("ia3", "(IA)³", (".ia3_l",), needs_base=True, peft_types=("IA3",)),
    Format("trainable_tokens", "trainable tokens", (".trainable_tokens_delta",), decides=True, needs_base=True,
           config=True, peft_types=("TRAINABLE_TOKENS", "LORA")),
    Format("ln_tuning", "LN tuning", (".ln_tuning_layers.",), peft_types=("LN_TUNING",)),
    Format("fourierft", "FourierFT", (".fourierft_spectrum",), needs_base=True, because=_SHAPES, config=True,
           peft_types=("FOURIERFT",)),
    Format("shira", "SHiRA", (".shira_weight", ".shira_indices"), needs_base=True, because=_SHAPES,
           peft_types=("SHIRA",)),
    Format("c3a", "C3A", (".c3a_kernel",), peft_types=("C3A",)),
    Format("vblora", "VB-LoRA", (".vblora_logits_",), config=True, peft_types=("VBLORA",)),
    Format("randlora", "RandLoRA", (".randlora_lambda", ".randlora_gamma"), needs_base=True, because=_SHAPES,
           config=True, peft_types=("RANDLORA",)),
    Format("peanut", "PEANuT", (".peanut_A",), needs_base=True, config=True, peft_types=("PEANUT",)),
    Format("waveft", "WaveFT", (".waveft_spectrum",), needs_base=True, because=_SHAPES, config=True,
           peft_types=("WAVEFT",)),
    Format("tinylora", "TinyLoRA", (".tinylora_A",), config=True, peft_types=("TINYLORA",)),
    Format("frod", "FRoD", (".frod_lambda_l",), needs_base=True, peft_types=("FROD",)),
    Format("unilora", "Uni-LoRA", (".unilora_theta_d",), config=True, peft_types=("UNILORA",)),
    Format("adapterhub", "LoRA (AdapterHub)", (".loras.",), config=True),
    Format("xlabs", "LoRA for Flux (XLabs)", (".processor.qkv_lora", ".processor.proj_lora")),
    Format("gguf", "LoRA (GGUF, llama.cpp)", (".weight.lora_a\n", ".weight.lora_b\n"), decides=True, scale="own"),
    Format("mlx_dora", "DoRA (MLX)", (".m\n",), "mlx", decides=True, needs_base=True, scale="own"),
    Format("mlx", "LoRA (MLX)", (".lora_a\n", ".A\n"), decides=True, scale="own"),
    Format("torchtune_dora", "DoRA (torchtune)", (".magnitude",), "torchtune", decides=True, needs_base=True,
           scale="config"),
    Format("torchtune", "LoRA (torchtune)", (".lora_a.weight",), scale="config"),
    Format("kohya", "kohya, LyCORIS", ("\nlora_", "\nlycoris_"), decides=True, scale="own"),
    Format("diffusers", "diffusers, ComfyUI LoRA",
           ("lora", ".down.weight", ".up.weight", ".hada_", ".lokr_", ".w_norm", ".b_norm", ".oft_", ".on_input"),
           decides=True, scale="own"),
    Format("mixture", "LoRAMoE, MixLoRA, MOELoRA, MTL-LoRA (several pairs per module)", ("lora_",), decides=True,
           scale="config", heads=True),
    Format("dora", "DoRA", ("lora_magnitude_vector",), "lora", decides=True, needs_base=True, scale="config",
           peft_types=("LORA",)),
    Format("lora", "LoRA, rsLoRA (PEFT)", (".lora_A", ".lora_embedding_A"), decides=True, scale="config",
           peft_types=("LORA",)),
    Format("checkpoint", "full checkpoint", (), decides=True, needs_base=True,
           because="these are full weights, so ΔW needs the model it started from"),
)  # fmt: skip
