"""Files that trainers leave behind and that are no weights yet: known by their names, with the tool that makes weights.

Sources of the tools' names: DeepSpeed's zero_to_fp32.py (its own usage text); Megatron Bridge, "Hugging Face
Conversion" (AutoBridge.export_ckpt); NeMo, "Community Model Converter" (convert_<model>_nemo_to_hf.py) and NeMo 2's
export_ckpt; accelerate's documentation of FSDP (merge-weights); verl's model_merger.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from spectra.files import dcp, rank_files

ZERO = "`python zero_to_fp32.py . OUTPUT` in the checkpoint's folder makes weights of it"
_MEGATRON = (
    "Megatron Bridge's AutoBridge.export_ckpt, or tools/checkpoint/convert.py of Megatron-LM, makes weights that "
    "transformers loads"
)
_NEMO = (
    "scripts/checkpoint_converters/convert_<model>_nemo_to_hf.py of NeMo, or export_ckpt of NeMo 2, makes weights that "
    "transformers loads"
)
_KINDS: tuple[tuple[str, str], ...] = (
    (
        r"(?:bf16_)?(?:zero_pp_rank_\d+_)?(?:\w*_)?mp_rank_\d+\w*_(?:model|optim)_states\.pt"
        r"|layer_\d+-model_\d+-model_states\.pt",
        f"a DeepSpeed training state, of which each file holds a part: {ZERO}",
    ),
    (
        r"model_optim_rng\.pt|model_rng\.pt|distrib_optim\.pt|mp_rank_\d\d(?:_\d\d\d){0,2}",
        f"a Megatron-LM training state, of which each rank holds a part: {_MEGATRON}",
    ),
    (r".+\.nemo", f"a NeMo archive: {_NEMO}"),
    (
        dcp.PIECES.pattern,
        "a piece of a distributed checkpoint, which needs all pieces and .metadata beside them: copy the whole folder "
        "and name it, or run `accelerate merge-weights` where the whole is",
    ),
    (
        rank_files.RANK_FILE.pattern,
        "what one FSDP rank holds, a part of every weight: name the folder that has the files of all ranks",
    ),
    (r"\.metadata", "the list of a distributed checkpoint's tensors: name its folder"),
    (r"(?:optim|extra_state)_world_size_\d+_rank_\d+\.pt", "one FSDP rank's optimizer or scheduler, no weights"),
)


def what(name: str) -> str:
    """What a file or folder of this name is, with the tool that makes weights of it; "" for any other name.

    >>> what("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").partition(",")[0]
    'a DeepSpeed training state'
    >>> what("model.safetensors")
    ''
    """
    return next((said for pattern, said in _KINDS if re.fullmatch(pattern, name)), "")


def among(names: Iterable[str]) -> tuple[str, str]:
    """The first of the names that is such a file, and what it is; two empty texts where there is none."""
    return next(((name, said) for name in names if (said := what(name))), ("", ""))
