"""`python -m benchmarks.gpu`: the device path on a GPU, correctness against float64 on the CPU first, then timings.

Needs nothing but this checkout and a CUDA build of torch. Without a GPU, `--device cpu` runs the same code.
The CPU of the same machine is timed, too: on a card that is slow at float64 it may be the better choice.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import inputs
from spectra import Spectrum, WeightDelta, decompose
from spectra.engine.devices import device_named, slow_double
from spectra.engine.executors.device import decompose_batches
from spectra.engine.schedule import batches, plan
from spectra.engine.solve import Wanted

_VALUES = 1e-7  # of σ₁
_ANGLE = 1e-5


def main() -> None:
    """Check, and time what passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--budget-gib", type=float, default=16)
    options = parser.parse_args()
    print(described(options.device))
    budget = int(options.budget_gib * 2**30)
    wrong = [name for name, fault in faults(options.device, budget) if report(name, fault)]
    if wrong:
        sys.exit(f"not timed: {len(wrong)} checks failed")
    for name, seconds in timings(options.device, budget, options.size, options.count):
        print(f"{name:60s} {seconds:9.4f} s per matrix", flush=True)


def described(device: str) -> str:
    """The card and the versions."""
    if not device.startswith("cuda"):
        return f"{device}, torch {torch.__version__}"
    card = torch.cuda.get_device_properties(device)
    rate = slow_double(card.major, card.minor) or "float64 at full rate"
    return (
        f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {rate}; torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}; {torch.get_num_threads()} CPU threads"
    )


def report(name: str, fault: str) -> bool:
    """Print one check; whether it failed."""
    print(f"{'FAILED' if fault else 'right':7s} {name} {fault}", flush=True)
    return bool(fault)


def on_device(deltas: list[WeightDelta], device: str, budget: int, top: int) -> list[Spectrum]:
    """The device path, in the deltas' order."""
    groups = batches(deltas, plan(deltas, budget, top or None))
    found = dict(decompose_batches(deltas, groups, Wanted(top, device=device_named(device), together=True)))
    return [found[i] for i in range(len(deltas))]


def on_cpu(deltas: list[WeightDelta], budget: int, top: int) -> list[Spectrum]:
    """What `--device cpu` does on this machine."""
    return list(decompose(deltas, top=top or None, device="cpu", memory_budget=budget))


def faults(device: str, budget: int) -> Iterator[tuple[str, str]]:
    """Every check's name, and what is wrong or ""."""
    kinds: dict[str, Callable[[int], WeightDelta]] = {
        "dense 300×200": lambda i: WeightDelta.from_tensor(f"d{i}", inputs.gaussian(300, 200, i)),
        "dense decaying 256²": lambda i: WeightDelta.from_tensor(f"e{i}", inputs.decaying(256, i)),
        "dense 40×700": lambda i: WeightDelta.from_tensor(f"w{i}", inputs.gaussian(40, 700, i)),
        "dense, rank 3 of 256 and rounding": lambda i: WeightDelta.from_tensor(f"r{i}", _nearly_low_rank(256, i)),
        "factored rank 8 on 300×200": lambda i: WeightDelta.from_factors(f"f{i}", *inputs.factors(300, 8, 200, i)),
    }
    for name, make in kinds.items():
        deltas = [make(i) for i in range(5)]
        for top in (0, 4):
            for delta, found in zip(deltas, on_device(deltas, device, budget, top), strict=True):
                yield f"{name}, top {top}, {found.method}", fault_of(delta, found, top)
    yield from known_faults(device, budget)


def known_faults(device: str, budget: int) -> Iterator[tuple[str, str]]:
    """What solvers on cards were reported to do wrong without a word, asked of this one.

    Reference: pytorch issues 187759 (svdvals of NaN is finite), 192483 (eigh of a batch is right at first and not
    orthonormal later), 105359 (eigh of nearly low rank crashes; above, with all its calls in float64).
    """
    holed = inputs.gaussian(60, 50)
    holed[1, 2] = float("nan")
    factors = inputs.factors(60, 4, 50)
    factors[0][0, 0] = float("inf")
    for delta in (
        WeightDelta.from_tensor("NaN in a matrix", holed),
        WeightDelta.from_factors("∞ in a factor", *factors),
    ):
        (found,) = on_device([delta], device, budget, 0)
        yield delta.name, "" if found.status == "nonfinite" else f"{found.status}, and not refused"
    batch = [WeightDelta.from_tensor(str(i), inputs.gaussian(40, 40, i)) for i in range(64)]
    for call in range(4):
        results = zip(batch, on_device(batch, device, budget, 4), strict=True)
        said = {fault_of(delta, found, 4) or _not_first(found) for delta, found in results} - {""}
        yield f"64 × 40², top 4, call {call + 1}", "; ".join(sorted(said))


def _not_first(found: Spectrum) -> str:
    """That a solver was caught, though the result is right: worth knowing of a card."""
    return f"right only by the next solver: {found.method}" if "rejected" in found.method else ""


def _nearly_low_rank(size: int, seed: int) -> Tensor:
    left, right = inputs.factors(size, 3, size, seed)
    return left.float() @ right.float() + 1e-12 * inputs.gaussian(size, size, seed)


def fault_of(delta: WeightDelta, found: Spectrum, top: int) -> str:
    """Against torch.linalg.svd in float64 on the CPU."""
    u, s, _ = torch.linalg.svd(delta.read("cpu").to_dense(), full_matrices=False)
    if found.status != "ok":
        return f"{found.status}: {found.reason}"
    error = float((torch.from_numpy(found.S) - s[: len(found.S)]).abs().max() / s[0])
    if error > _VALUES:
        return f"values off by {error:.1e}·σ₁"
    if top:
        kept = int((found.S[:top] > found.resolution).sum())  # the others have no direction
        mine = torch.from_numpy(found.U[:, :kept])
        angle = float(torch.linalg.matrix_norm(mine - u[:, :kept] @ (u[:, :kept].T @ mine), 2))
        return f"sin θ = {angle:.1e}" if angle > _ANGLE else ""
    return ""


def timings(device: str, budget: int, size: int, count: int) -> Iterator[tuple[str, float]]:
    """Seconds per matrix of the device path, and of torch's own calls on the same device."""
    dense = [WeightDelta.from_tensor(str(i), inputs.gaussian(size, size, i)) for i in range(count)]
    thin = [WeightDelta.from_factors(str(i), *inputs.factors(size, 64, size, i)) for i in range(count)]
    one = dense[0].read(device).to_dense()
    yield f"all values, {size}²", clock(device, lambda: on_device(dense, device, budget, 0)) / count
    yield f"values + top 30, {size}²", clock(device, lambda: on_device(dense, device, budget, 30)) / count
    yield f"factored rank 64 on {size}², top 30", clock(device, lambda: on_device(thin, device, budget, 30)) / count
    if device != "cpu":  # the other exact choice, for cards that are slow at float64
        for top in (0, 30):
            work = f"{f'values + top {top}' if top else 'all values'}, {size}², --device cpu"
            yield work, clock("cpu", partial(on_cpu, dense, budget, top), repeats=1) / count
    yield f"torch svdvals float32, {size}²", clock(device, lambda: torch.linalg.svdvals(one.float()))
    yield f"torch svdvals float64, {size}²", clock(device, lambda: torch.linalg.svdvals(one))
    yield (
        f"torch eigvalsh float64 of the Gram matrix, {size}²",
        clock(device, lambda: torch.linalg.eigvalsh(one @ one.T)),
    )


def clock(device: str, work: Callable[[], object], repeats: int = 3) -> float:
    """Median seconds, after one run to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
