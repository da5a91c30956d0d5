"""Formats that are known by their names and not read: refused by name, so that none is misread."""

from __future__ import annotations

import re

from spectra.files.folder import Folder
from spectra.naming import is_factor

_BY_KEY: tuple[tuple[str, str], ...] = (
    (r"\.oft_r(\.|$)", "an OFT of PEFT before 0.16, another parametrisation under the same peft_type"),
)


# What trainers call the file of an adapter, with a config beside it or not.
_ADAPTER_FILE = re.compile(r"(?:adapter_model|adapters?|pytorch_adapter|pytorch_lora_weights)[._-]")


def name_of(folder: Folder) -> str | None:
    """What the tensors' names say that the folder holds, if it is a format that is recognised and not supported."""
    for pattern, title in _BY_KEY:
        if any(re.search(pattern, name) for name in folder.tensors):
            return title
    return None


def has_factors(folder: Folder) -> bool:
    """Whether tensors are called as factors of an adapter are: then they are no full weights, config or not."""
    return any(map(is_factor, (*folder.tensors, *folder.broken)))


def is_no_model(folder: Folder) -> bool:
    """Whether a folder holds an adapter and not the weights of a model, by its config, its files or its tensors."""
    if folder.is_adapter or _files_of_an_adapter(folder):
        return True
    matrices = [name for name, ref in folder.tensors.items() if len(ref.shape) > 1]
    return bool(matrices) and all(map(is_factor, matrices))


def _files_of_an_adapter(folder: Folder) -> bool:
    files = {ref.path.rpartition("/")[2] for ref in folder.tensors.values()}
    return bool(files) and all(map(_ADAPTER_FILE.match, files))


def trained_whole(folder: Folder) -> bool:
    """Whether the config says that the tensors are whole weights (mlx-lm's `fine_tune_type: full`)."""
    return (folder.adapter_config or {}).get("fine_tune_type") == "full"


def declared_type(folder: Folder) -> str | None:
    """The peft_type that the adapter's config claims."""
    declared = (folder.adapter_config or {}).get("peft_type")
    return None if declared is None else str(declared)


# What has no ΔW that the files determine: peft_type, the tensors' names where only it has such, what it is and why.
_WITHOUT_UPDATE: tuple[tuple[str, str, str], ...] = (
    ("PROMPT_TUNING", r"^prompt_embeddings$", "a soft prompt: it is put before the input and changes no weight"),
    ("MULTITASK_PROMPT_TUNING", r"^prefix_task_(?:cols|rows)$", "soft prompts of several tasks: they change no weight"),
    ("P_TUNING", "", "a soft prompt from a prompt encoder (P-tuning): it changes no weight"),
    ("PREFIX_TUNING", "", "a prefix of keys and values for the attention: it changes no weight"),
    ("CARTRIDGE", "", "a cartridge, a trained cache of keys and values: it changes no weight"),
    ("CPT", "", "a context-aware prompt (CPT): it changes no weight"),
    ("ADAPTION_PROMPT", r"\.adaption_(?:prompt|gate)$", "adaption prompts for the attention: they change no weight"),
    ("LILY", r"\.lily_[AB](?:\.|$)", "Lily: a router mixes shared factors anew for every input, so no one ΔW exists"),
    ("POLY", r"\.poly_lora_[AB](?:\.|$)", "Poly: each input's task mixes the skills, so no one ΔW exists"),
    (
        "XLORA",
        r"internal_xlora_classifier|xlora_classifier",
        "X-LoRA: a classifier mixes other adapters anew for every token, so no one ΔW exists; name one of them",
    ),
    ("BEFT", r"\.beft_bias(?:\.|$)", "BEFT: it changes biases only, and no matrix"),
    (
        "PSOFT",
        r"\.psoft_R(?:\.|$)",
        "PSOFT: it turns singular vectors of the base weight whose signs are in no file, as they depend on the machine "
        "that computed them, so ΔW is not determined",
    ),
    (
        "ADAMSS",
        r"\.adamss_newB(?:\.|$)",
        "AdaMSS: which rows its blocks belong to was found by k-means over a random SVD of the base weight and was not "
        "saved, so ΔW is not determined",
    ),
    ("SHADOW", r"\.shadow_(?:backbone|projection|head|down|up)\.", "a shadow network beside the model: no ΔW exists"),
)


_NAMES_WITHOUT_UPDATE = re.compile("|".join(f"(?:{pattern})" for _, pattern, _ in _WITHOUT_UPDATE if pattern))


def without_update(folder: Folder) -> str | None:
    """What the folder holds and why it has no ΔW, if the config or the tensors' names say so."""
    declared = declared_type(folder)
    for peft_type, _, why in _WITHOUT_UPDATE:
        if declared == peft_type:
            return why
    if any(map(_NAMES_WITHOUT_UPDATE.search, folder.tensors)):
        for _, pattern, why in _WITHOUT_UPDATE:
            if pattern and any(re.search(pattern, name) for name in folder.tensors):
                return why
    return None


def refused() -> list[str]:
    """The names of everything that is recognised and not read, for the README."""
    return sorted({title for _, title in _BY_KEY} | {peft_type for peft_type, *_ in _WITHOUT_UPDATE}, key=str.lower)
