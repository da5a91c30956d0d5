"""Matrices with known spectra, for the tests of the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense
from spectra.spectrum import Spectrum

KINDS = (
    "gaussian", "power", "exponential", "clustered", "rank deficient", "bf16 noise", "bf16 merge",
    "no gap", "one value", "zero",
)  # fmt: skip


def values_of(kind: str, count: int) -> Tensor:
    """The singular values of a kind that is defined by them."""
    i = torch.arange(count, dtype=torch.float64)
    return {
        "power": (i + 1) ** -1.0,
        "exponential": torch.exp(-i / 8),
        "clustered": torch.where(i < count // 4, 2.0, 1.0).double(),
        "rank deficient": torch.where(i < count // 3, count - i, 0.0).double(),
        "no gap": 1 + 1e-9 * (count - i),
        "one value": torch.ones(count, dtype=torch.float64),
        "zero": torch.zeros(count, dtype=torch.float64),
    }[kind]


def matrix_of(kind: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A float64 matrix of a kind."""
    rng = np.random.default_rng(seed)
    normal = torch.from_numpy(rng.standard_normal((rows, columns)))
    if kind == "gaussian":
        return normal
    if kind.startswith("bf16"):
        base = (0.02 * normal).to(torch.bfloat16)
        rank = 0 if kind == "bf16 noise" else 4
        update = torch.from_numpy(rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns)))
        step = 1e-5 * torch.from_numpy(rng.standard_normal((rows, columns)))
        return (base.double() + step + 2e-3 * update).to(torch.bfloat16).double() - base.double()
    count = min(rows, columns)
    u, _ = torch.linalg.qr(torch.from_numpy(rng.standard_normal((rows, count))))
    v, _ = torch.linalg.qr(torch.from_numpy(rng.standard_normal((columns, count))))
    return (u * values_of(kind, count)) @ v.T


def oracle(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The slow, plain way."""
    return torch.linalg.svd(matrix.double(), full_matrices=False)


def angle(a: Tensor, b: Tensor) -> float:
    """The sine of the largest angle between two subspaces, given orthonormal columns."""
    return float(torch.linalg.matrix_norm(b - a @ (a.T @ b), 2)) if a.shape[1] else 0.0


@dataclass(frozen=True)
class SlowMatrix:
    """A recipe that takes its time, so that a run can be interrupted in the middle."""

    seed: int
    size: int
    delay: float
    factored: bool = False
    refs: tuple = ()

    def read(self, device: str = "cpu") -> Dense:
        """The matrix, after the delay."""
        time.sleep(self.delay)
        return Dense(matrix_of("gaussian", self.size, self.size, self.seed).to(device))


def slow_deltas(count: int, size: int = 12, delay: float = 0.2) -> list[WeightDelta]:
    """As many slow matrices."""
    return [WeightDelta(f"layers.{i}.w", (size, size), SlowMatrix(i, size, delay), size) for i in range(count)]


def same_spectrum(a: Spectrum, b: Spectrum) -> None:
    """Hold two spectra to the same bits and the same words."""
    arrays = [(a.S, b.S), (a.U, b.U), (a.Vh, b.Vh)]
    assert all((x is None) == (y is None) and (x is None or np.array_equal(x, y)) for x, y in arrays)
    fields = (
        "name",
        "shape",
        "status",
        "norm",
        "max_rank",
        "noise_edge",
        "noise_energy",
        "rounding",
        "method",
        "reason",
        "note",
        "base_norm",
        "k",
    )
    assert all(getattr(a, field) == getattr(b, field) for field in fields)
