"""One snapshot in numbers: the spectrum of ΔW, what its start has to do with it, and how far the factors have moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

import spectra
from spectra import WeightDelta
from spectra.lazy import torch
from spectra.reproduce.long.plan import START, LongPlan, LongRun
from spectra.reproduce.long.train import base_of, snapshot

if TYPE_CHECKING:
    import pandas as pd

PROJECTIONS = "re:.*_proj.weight"
TOP = 12  # the adapters' rank
_OF_THE_UPDATE = ("relative_norm", "top_1_share", "rank_90", "effective_rank")
_OF_WHAT_WAS_LEARNED = ("top_1_share", "rank_90", "effective_rank")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Factors:
    """An adapter's product of one matrix: left (m, k) times right (k, n), and A and B themselves.

    Attributes:
        left: with every scale, so that left @ right is what the product adds to the weight.
        right: A, stacked.
        A: as it is trained.
        B: as it is trained.
    """

    left: np.ndarray
    right: np.ndarray
    A: np.ndarray
    B: np.ndarray


def read_factors(folder: Path, kind: str, scaling: Path | None = None) -> dict[str, Factors]:
    """Weight → factors of a stored adapter, in float64; α/r is 1 throughout.

    Args:
        folder: the adapter's.
        kind: "lora", "multilora" or "rlora".
        scaling: another snapshot of the same run whose scaling counts instead.
    """
    tensors = _tensors(folder)
    others = _tensors(scaling) if scaling else tensors
    modules = sorted({key.partition("." + _SLOT[kind])[0] for key in tensors if "." + _SLOT[kind] in key})
    return {f"{module.removeprefix(_PREFIX)}.weight": _factors(kind, module, tensors, others) for module in modules}


_SLOT = {"lora": "lora_A", "multilora": "multilora_A", "rlora": "rlora_A"}


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return {key: value.astype(np.float64) for key, value in load_file(folder / "adapter_model.safetensors").items()}


def _factors(kind: str, module: str, tensors: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> Factors:
    if kind == "lora":
        A, B = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        return Factors(B, A, A, B)
    if kind == "rlora":
        A, B = tensors[f"{module}.rlora_A"], tensors[f"{module}.rlora_B"]
        return Factors(B.mean(0), A, A, B)
    A, B = tensors[f"{module}.multilora_A"], tensors[f"{module}.multilora_B"]
    scaled = others[f"{module}.multilora_scaling"][..., None] * B
    return Factors(np.concatenate(list(scaled), axis=1), A.reshape(-1, A.shape[-1]), A, B)


def measure(run: LongRun, step: int, plan: LongPlan, directory: Path) -> pd.DataFrame:
    """A row per matrix: the spectrum of ΔW and of ΔW − start, the start's share, drift.

    Columns: `relative_norm` ‖ΔW‖/‖W₀‖; `top_1_share`, `rank_90`, `effective_rank` of ΔW and, as `learned_…`, of ΔW
    without its start. `start_share` = ‖start‖²/‖ΔW‖², which may exceed 1: the start of MultiLoRA is Σᵢ diag(sᵢ)·Bᵢ⁰·Aᵢ⁰
    with the trained s, that of R-LoRA the product B̄⁰·A⁰ whose opposite its ΔW holds from the beginning, LoRA's
    is zero. `in_start_left` and `in_start_right`: the share of ΔW's energy in the column space of B⁰ and the row space
    of A⁰, beside `…_chance`. `drift_A` = ‖A − A₀‖_F/‖A₀‖_F, `drift_B` likewise. NaN where there is no such thing.
    """
    folder = snapshot(directory, run.name, step)
    source = spectra.open_source(folder, base_of(directory, plan)).select(PROJECTIONS)
    whole = {delta.name: delta.read().to_dense().double() for delta in source}
    table = spectra.summarize(spectra.decompose(source).collect())
    table = table.set_index("name")[["role", "layer", *_OF_THE_UPDATE]]
    starts = {} if run.method.kind == "full" else _starts(run, step, directory)
    kept = whole if run.method.kind != "multilora" else {
        name: matrix - torch.from_numpy(starts[name].left @ starts[name].right) for name, matrix in whole.items()
    }  # fmt: skip
    learned = spectra.decompose([WeightDelta.from_tensor(name, matrix) for name, matrix in kept.items()]).collect()
    of_learned = spectra.summarize(learned).set_index("name")
    for column in _OF_WHAT_WAS_LEARNED:
        table[f"learned_{column}"] = of_learned[column]
    now = {} if run.method.kind == "full" else read_factors(folder, run.method.kind)
    more = {name: _from_start(matrix.numpy(), now.get(name), starts.get(name)) for name, matrix in whole.items()}
    for column in more[next(iter(more))]:
        table[column] = [more[name][column] for name in table.index]
    table.insert(0, "run", run.name)
    table.insert(1, "step", step)
    return table.reset_index()


def _starts(run: LongRun, step: int, directory: Path) -> dict[str, Factors]:
    first, now = (snapshot(directory, run.name, at) for at in (START, step))
    return read_factors(first, run.method.kind, scaling=now if run.method.kind == "multilora" else None)


def _from_start(whole: np.ndarray, now: Factors | None, start: Factors | None) -> dict[str, float]:
    """How much of the update is of its start."""
    names = ("start_share", "in_start_left", "in_start_left_chance", "in_start_right", "in_start_right_chance",
             "drift_A", "drift_B")  # fmt: skip
    if now is None or start is None:
        return dict.fromkeys(names, math.nan)
    energy = float((whole**2).sum())
    product = start.left @ start.right
    left, right = (
        _basis(np.concatenate(list(np.atleast_3d(start.B).reshape(-1, *start.B.shape[-2:])), axis=1)),
        _basis(start.right.T),
    )
    m, n = whole.shape
    values = (
        float((product**2).sum()) / energy,
        float(((left.T @ whole) ** 2).sum()) / energy if left.size else math.nan,
        left.shape[1] / m if left.size else math.nan,
        float(((whole @ right) ** 2).sum()) / energy,
        right.shape[1] / n,
        _drift(now.A, start.A),
        _drift(now.B, start.B),
    )
    return dict(zip(names, values, strict=True))


def _basis(columns: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the columns' span; (m, 0) where they are zero."""
    U, S, _ = np.linalg.svd(columns, full_matrices=False)
    return U[:, S > 1e-10 * max(S[0], 1e-300)]


def _drift(now: np.ndarray, start: np.ndarray) -> float:
    before = float(np.linalg.norm(start))
    return float(np.linalg.norm(now - start)) / before if before else math.nan
