"""`python -m benchmarks.gpu`: the device path on a GPU, correctness against float64 on the CPU first, then timings.

Needs nothing but this checkout and a CUDA build of torch; one call measures everything and keeps it as
`benchmarks/results/<card>/gpu.md`. Without a GPU, `--device cpu` runs the same code.
The CPU of the same machine is timed, too: on a card that is slow at float64 it may be the better choice.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.gpu_timings import Sizes, on_device, processes, timings
from spectra import Spectrum, WeightDelta
from spectra.deltas.forms import Kronecker
from spectra.engine.devices import device_named, slow_double
from spectra.engine.solve import Wanted, solve_forms

_VALUES = 1e-7  # of σ₁
_ANGLE = 1e-5


def main() -> None:
    """Check, and time what passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-gib", type=float, default=16)
    parser.add_argument("--layers", type=int, default=32, help="of the models that whole processes read")
    parser.add_argument("--out", type=Path, help="default: a folder of benchmarks/results named after the card")
    options = parser.parse_args()
    title = described(options.device)
    print(title)
    budget = int(options.budget_gib * 2**30)
    wrong = [name for name, fault in faults(options.device, budget) if report(name, fault)]
    if wrong:
        sys.exit(f"not timed: {len(wrong)} checks failed")
    out = options.out or Path(__file__).parent / "results" / re.sub(r"\W+", "-", title.split(",")[0].lower())
    keep(out / "gpu.md", title, timings(options.device, budget, Sizes(layers=options.layers)))
    keep(out / "gpu-processes.md", title, processes(options.device, options.layers))


def keep(file: Path, title: str, lines: Iterable[tuple[str, str]]) -> None:
    """Print each line and write all so far: what was measured stays if the rest cannot be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = f"{date.today()}: {title}\n\n| work | measured |\n|---|---|\n"
    for name, measured in lines:
        print(f"{name:72s} {measured}", flush=True)
        text += f"| {name} | {measured} |\n"
        file.write_text(text)


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
    yield from kronecker(device)
    yield from known_faults(device, budget)


def kronecker(device: str) -> Iterator[tuple[str, str]]:
    """A ⊗ B, whose factors are solved one by one."""
    left, right = inputs.gaussian(12, 9).double(), inputs.gaussian(11, 14, 1).double()
    delta = WeightDelta.from_tensor("A ⊗ B", torch.kron(left, right))
    for top in (0, 4):
        wanted = Wanted(top, device=device_named(device), together=True)
        (found,) = solve_forms([delta], [Kronecker(left.to(device), right.to(device))], wanted)
        yield f"Kronecker 132×126, top {top}, {found.method}", fault_of(delta, found, top)


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


if __name__ == "__main__":
    main()
