"""How many directions of a stored update are real: what `signal_rank` claims, and what is true.

    python -m benchmarks.rounding [--weights model.safetensors] [--size 384] [--draws 2]

Random updates of a known rank are added to weights of several kinds, stored in several ways, and given to the toolkit
as files. True is the number of pairs of singular vectors of the stored difference, among the first as many as the
rank, that are mostly of the update: the lengths of their parts in its two spaces have a product above one half. A few
minutes on one core at the default size.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import spectra

RANKS = (1, 2, 8, 16)
SHARES = (1e-1, 1e-2, 3e-3, 1e-3, 1e-4)
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
E4M3 = torch.float8_e4m3fn
_MOSTLY = 0.5

Stored = tuple[Tensor, Tensor]  # tuned, base


def families(size: int, generator: torch.Generator, real: Tensor | None) -> dict[str, Tensor]:
    """Weights of several kinds, standard deviation .04."""

    def gaussian() -> Tensor:
        return 0.04 * torch.randn(size, size, generator=generator)

    chi = torch.stack([torch.randn(size, size, generator=generator).square() for _ in range(3)]).mean(0)
    sparse, outlier = gaussian(), gaussian()
    sparse[::2] *= 1e-2
    outlier[:, torch.randperm(size, generator=generator)[:4]] *= 50
    found = {"Gaussian": gaussian(), "t₃": gaussian() / chi.sqrt()}
    found |= {"MiniLM": real} if real is not None else {}
    return found | {"half of the rows × .01": sparse, "four columns × 50": outlier}


def update(weights: Tensor, rank: int, share: float, generator: torch.Generator) -> Tensor:
    """A random update of a rank, with a share of the weights' norm; columns that stand out do not count."""
    m, n = weights.shape
    product = (torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)).double()
    usual = (
        weights.double().clamp(-0.16, 0.16)
        if weights.norm(dim=0).max() > 10 * weights.norm(dim=0).median()
        else weights
    )
    return product * (share * usual.double().norm() / product.norm())


def ways(W: Tensor, U: Tensor) -> dict[str, Stored]:
    """How W + U comes to lie in files."""
    b, h = W.bfloat16(), W.half()
    merged = (b + U).bfloat16()
    return {
        "bf16 base, merged in bf16": (merged, b),
        "float32 base, merged in bf16": (merged, W),
        "fp16 base, merged in bf16": ((h.bfloat16() + U).bfloat16(), h),
        "float32 base, added in float32, cast to bf16": ((W + U).bfloat16(), W),
        "bf16 merge saved as float32, bf16 base": (merged.float(), b),
        "bf16 merge saved as float32, float32 base": (merged.float(), W),
        "float32 tuned, base a bf16 copy": ((W + U).float(), b),
        "float32 tuned of a base that is bf16": ((b + U).float(), b),
        "both copies in bf16 of float32 weights": ((W + U).bfloat16(), b),
        "bf16 merge saved as fp16, fp16 base": (merged.half(), h),
        "e4m3 values in bf16, bf16 base": ((b + U).to(E4M3).bfloat16(), b),
    }


def claimed_and_true(stored: Stored, U: Tensor, rank: int, folder: Path) -> tuple[int, int]:
    """The toolkit's count of directions, and the count with U known."""
    found = _found(stored, folder)
    u, _, vh = torch.linalg.svd(U, full_matrices=False)
    u, v = u[:, :rank], vh[:rank].T
    left, _, right = torch.linalg.svd(stored[0].double() - stored[1].double(), full_matrices=False)
    shares = (u.T @ left).norm(dim=0) * (right @ v).norm(dim=1)
    return found.signal_rank, int((shares[:rank] > _MOSTLY).sum())


def _found(stored: Stored, folder: Path) -> spectra.Spectrum:
    for side, weights in zip(("tuned", "base"), stored, strict=True):
        (folder / side).mkdir(exist_ok=True)
        save_file({"a.weight": weights.contiguous()}, folder / side / "model.safetensors")
    (found,) = spectra.decompose(spectra.open_source(folder / "tuned", folder / "base"))
    return found


def cell(pairs: list[tuple[int, int]]) -> str:
    """Claimed counts; the true ones beside them where they differ."""
    claimed, true = (", ".join(str(pair[i]) for pair in pairs) for i in (0, 1))
    if claimed == true:
        return claimed if len({pair[0] for pair in pairs}) > 1 else str(pairs[0][0])
    return f"**{claimed}** ({true})"


def by_family(size: int, seeds: range, real: Callable[[int], Tensor] | None, folder: Path) -> Iterator[str]:
    """One row per kind of weights, type and relative size."""
    yield "| weights | type | ‖U‖/‖W‖ | " + " | ".join(f"rank {rank}" for rank in RANKS) + " |"
    yield "|---|---|---|" + "---|" * len(RANKS)
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn.append((families(size, generator, real(seed) if real else None), generator))
    for family in drawn[0][0]:
        for name, dtype in TYPES.items():
            for share in SHARES:
                cells = []
                for rank in RANKS:
                    pairs = []
                    for kinds, generator in drawn:
                        base = kinds[family].to(dtype)
                        U = update(kinds[family], rank, share, generator)
                        pairs.append(claimed_and_true(((base + U).to(dtype), base), U, rank, folder))
                    cells.append(cell(pairs))
                yield f"| {family} | {name} | {share:g} | " + " | ".join(cells) + " |"


def by_storage(size: int, seeds: range, real: Callable[[int], Tensor] | None, folder: Path) -> Iterator[str]:
    """One row per way of storing: rank 8."""
    shares = (1e-2, 3e-3)
    yield "| how it was stored | " + " | ".join(f"{100 * share:g} %" for share in shares) + " |"
    yield "|---|" + "---|" * len(shares)
    counts: dict[str, list[list[tuple[int, int]]]] = {}
    for place, share in enumerate(shares):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            W = real(seed) if real else 0.04 * torch.randn(size, size, generator=generator)
            U = update(W, 8, share, generator)
            for way, stored in ways(W, U).items():
                counts.setdefault(way, [[] for _ in shares])[place].append(claimed_and_true(stored, U, 8, folder))
    for way, drawn in counts.items():
        yield f"| {way} | " + " | ".join(cell(pairs) for pairs in drawn) + " |"


def by_decay(size: int, seeds: range, real: Callable[[int], Tensor] | None, folder: Path) -> Iterator[str]:
    """One row per rate at which the values of an update of rank 16 fall, in bf16."""
    shares = (1e-2, 3e-3)
    yield "| σᵢ₊₁/σᵢ | " + " | ".join(f"{100 * share:g} %" for share in shares) + " |"
    yield "|---|" + "---|" * len(shares)
    for rate in (0.9, 0.7, 0.5, 0.3):
        cells = []
        for share in shares:
            pairs = []
            for seed in seeds:
                generator = torch.Generator().manual_seed(seed)
                W = real(seed) if real else 0.04 * torch.randn(size, size, generator=generator)
                left, right = (torch.randn(side, 16, generator=generator).double() for side in W.shape)
                falling = rate ** torch.arange(16).double()
                U = (torch.linalg.qr(left).Q * falling) @ torch.linalg.qr(right).Q.T
                U *= share * W.double().norm() / U.norm()
                base = W.bfloat16()
                pairs.append(claimed_and_true(((base + U).bfloat16(), base), U, 16, folder))
            cells.append(cell(pairs))
        yield f"| {rate} | " + " | ".join(cells) + " |"


def by_fine_tune(base: Path, tuned: Path, folder: Path) -> Iterator[str]:
    """One row per way of storing a real full fine-tune: counts of four matrices; true is above the errors' largest."""
    first, second = load_file(base), load_file(tuned)
    keys = [key for key, w in sorted(first.items()) if ".layer." in key and w.dim() == 2 and key in second]
    yield "| how it was stored | roundings told | claimed | true |"
    yield "|---|---|---|---|"
    counts: dict[str, list[tuple[int, int, int]]] = {}
    for key in keys[1::8][:4]:
        W, T = first[key].double(), second[key].double()
        b = W.bfloat16()
        for way, (stored, beside) in {
            "both cast to bf16 (two roundings)": (T.bfloat16(), b),
            "bf16 base, cast to bf16 (one)": ((b.double() + T - W).bfloat16(), b),
            "float32 base, cast to bf16 (one)": (T.bfloat16(), first[key]),
            "float32 base, merged in bf16 (two)": ((b.double() + T - W).bfloat16(), first[key]),
        }.items():
            found = _found((stored, beside), folder)
            delta = stored.double() - beside.double()
            error = float(torch.linalg.matrix_norm(delta - (T - W), 2))
            true = int((torch.linalg.svdvals(delta) > error).sum())
            counts.setdefault(way, []).append((2 if "base" in found.rounding else 1, found.signal_rank, true))
    for way, rows in counts.items():
        yield "| " + " | ".join([way, *(", ".join(str(row[i]) for row in rows) for i in range(3))]) + " |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a safetensors file of real weights, such as MiniLM's")
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument(
        "--first", type=int, default=1000, help="seed of the first draw; thresholds were set on 0 and 1"
    )
    parser.add_argument("--tuned", type=Path, help="a full fine-tune of --weights")
    options = parser.parse_args()
    real = None
    if options.weights:
        matrices = [w for key, w in sorted(load_file(options.weights).items()) if ".layer." in key and w.dim() == 2]

        def real(seed: int) -> Tensor:
            return matrices[(7 * seed) % len(matrices)].float()

    seeds = range(options.first, options.first + options.draws)
    with tempfile.TemporaryDirectory() as folder:
        for table in (by_storage, by_decay, by_family):
            for line in table(options.size, seeds, real, Path(folder)):
                print(line, flush=True)
            print()
        if options.weights and options.tuned:
            for line in by_fine_tune(options.weights, options.tuned, Path(folder)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
