"""One snapshot in numbers: the spectrum of ΔW, what its start has to do with it, and how far the factors have moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

import spectra
from spectra import Source, WeightDelta
from spectra.lazy import torch
from spectra.reproduce.long.plan import START, LongPlan, LongRun
from spectra.reproduce.long.train import base_of, snapshot

if TYPE_CHECKING:
    import pandas as pd

PROJECTIONS = "re:.*_proj.weight"
_OF_THE_UPDATE = ("relative_norm", "top_1_share", "rank_90", "effective_rank")
_OF_WHAT_WAS_LEARNED = ("top_1_share", "rank_90", "effective_rank")
_FROM_START = (
    "start_share", "in_start_left", "in_start_left_chance", "in_start_right", "in_start_right_chance",
    "drift_A", "drift_B",
)  # fmt: skip
_PREFIX = "base_model.model."
_SLOT = {"lora": "lora_A", "multilora": "multilora_A", "rlora": "rlora_A"}


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

    @property
    def product(self) -> np.ndarray:
        """left @ right."""
        return self.left @ self.right


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
    with the trained s, that of R-LoRA the product B̄⁰·A⁰ that its ΔW has subtracted already, LoRA's is zero.
    `in_start_left` and `in_start_right`: the share of ΔW's energy in the start's column and row space, beside
    `…_chance`. `drift_A` = ‖A − A₀‖_F/‖A₀‖_F, `drift_B` likewise. NaN where there is no such thing.
    """
    source = open_update(run, step, plan, directory)
    whole = {delta.name: delta.read().to_dense().double() for delta in source}
    of_whole = _summary(source)
    table = of_whole[["role", "layer", *_OF_THE_UPDATE]].copy()
    table.insert(0, "run", run.name)
    table.insert(1, "step", step)
    starts = {} if run.method.kind == "full" else _starts(run, step, directory)
    of_learned = of_whole
    if run.method.kind == "multilora":
        differences = {name: whole[name] - torch.from_numpy(start.product) for name, start in starts.items()}
        of_learned = _summary([WeightDelta.from_tensor(name, matrix) for name, matrix in differences.items()])
    for column in _OF_WHAT_WAS_LEARNED:
        # With A and B as they were nothing is left but rounding, whose rank says nothing.
        table[f"learned_{column}"] = math.nan if run.scaling_only else of_learned[column]
    now = {} if run.method.kind == "full" else read_factors(snapshot(directory, run.name, step), run.method.kind)
    more = {name: _from_start(matrix.numpy(), now.get(name), starts.get(name)) for name, matrix in whole.items()}
    for column in _FROM_START:
        table[column] = [more[name][column] for name in table.index]
    return table.reset_index()


def energy_shares(run: LongRun, step: int, plan: LongPlan, directory: Path) -> pd.DataFrame:
    """Index i → σᵢ²/Σσ², means over the matrices, of ΔW, of MultiLoRA's start and of ΔW − start."""
    import pandas as pd

    source = open_update(run, step, plan, directory)
    parts: dict[str, Iterable[WeightDelta]] = {"update": source}
    if run.method.kind == "multilora":
        starts = {name: torch.from_numpy(start.product) for name, start in _starts(run, step, directory).items()}
        parts["start"] = [WeightDelta.from_tensor(*item) for item in starts.items()]
        if not run.scaling_only:
            parts["learned"] = [
                WeightDelta.from_tensor(delta.name, delta.read().to_dense().double() - starts[delta.name])
                for delta in source
            ]
    tables = []
    for part, deltas in parts.items():
        energies = [spectrum.resolved**2 / (spectrum.S**2).sum() for spectrum in spectra.decompose(deltas).collect()]
        longest = max(map(len, energies))
        mean = np.mean([np.pad(energy, (0, longest - len(energy))) for energy in energies], axis=0)
        tables.append(pd.DataFrame({"run": run.name, "step": step, "part": part,
                                    "index": np.arange(1, longest + 1), "share": mean}))  # fmt: skip
    return pd.concat(tables)


def open_update(run: LongRun, step: int, plan: LongPlan, directory: Path) -> Source:
    """The update of the projections after `step` steps."""
    return spectra.open_source(snapshot(directory, run.name, step), base_of(directory, plan)).select(PROJECTIONS)


def _summary(deltas: Iterable[WeightDelta]) -> pd.DataFrame:
    return spectra.summarize(spectra.decompose(deltas).collect()).set_index("name")


def _starts(run: LongRun, step: int, directory: Path) -> dict[str, Factors]:
    first, now = (snapshot(directory, run.name, at) for at in (START, step))
    return read_factors(first, run.method.kind, scaling=now if run.method.kind == "multilora" else None)


def _from_start(whole: np.ndarray, now: Factors | None, start: Factors | None) -> dict[str, float]:
    """How much of the update is of its start."""
    if now is None or start is None:
        return dict.fromkeys(_FROM_START, math.nan)
    energy = float((whole**2).sum())
    left, right = _basis(start.left), _basis(start.right.T)
    values = (
        float((start.product**2).sum()) / energy,
        float(((left.T @ whole) ** 2).sum()) / energy if left.size else math.nan,
        left.shape[1] / len(left) if left.size else math.nan,
        float(((whole @ right) ** 2).sum()) / energy,
        right.shape[1] / len(right),
        _drift(now.A, start.A),
        _drift(now.B, start.B),
    )
    return dict(zip(_FROM_START, values, strict=True))


def _basis(columns: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the columns' span; (m, 0) where they are zero."""
    U, S, _ = np.linalg.svd(columns, full_matrices=False)
    return U[:, 1e-10 * max(S[0], 1e-300) < S]


def _drift(now: np.ndarray, start: np.ndarray) -> float:
    before = float(np.linalg.norm(start))
    return float(np.linalg.norm(now - start)) / before if before else math.nan
