"""What a card takes: the device path, torch's own ways beside it, and as processes. Every line is one measurement.

What cannot be measured on this card, for want of memory or of a driver, is a line that says so, and the next follows.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.measure import process
from spectra import Spectrum, WeightDelta, decompose
from spectra.engine.devices import device_named
from spectra.engine.executors.device import decompose_batches
from spectra.engine.schedule import batches, plan
from spectra.engine.solve import Wanted
from spectra.engine.solvers import dense

DRIVERS = ("gesvd", "gesvdj")  # of cuSOLVER, for svdvals
_STREAMS = 4
_SLOW = 4096  # rows from which a bidiagonal SVD is timed once, and beyond which not at all
Line = tuple[str, str]


@dataclass(frozen=True)
class Work:
    """Dense matrices of one shape and type."""

    rows: int
    columns: int
    count: int
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """As the lines call it."""
        shape = f"{self.rows}²" if self.rows == self.columns else f"{self.rows}×{self.columns}"
        return f"{shape} × {self.count}{', bf16' if self.dtype == torch.bfloat16 else ''}"

    def matrices(self) -> list[Tensor]:
        """On the CPU."""
        return [inputs.gaussian(self.rows, self.columns, seed).to(self.dtype) for seed in range(self.count)]


@dataclass(frozen=True)
class Sizes:
    """What is timed; tests take small ones.

    Attributes:
        works: the dense shapes.
        square: of the comparisons of solvers with one another, and the product that the card's rate is taken from.
        rank, modules: of the factored updates.
        layers: of the processes' models.
    """

    works: tuple[Work, ...] = (
        Work(384, 384, 72),
        Work(1024, 4096, 8),
        Work(4096, 4096, 1),
        Work(4096, 4096, 8),
        Work(4096, 4096, 8, torch.bfloat16),
        Work(4096, 4096, 32),
        Work(4096, 11008, 4),
        Work(8192, 8192, 2),
    )
    square: int = 4096
    rank: int = 64
    modules: int = 224
    layers: int = 32


def on_device(deltas: list[WeightDelta], device: str, budget: int, top: int) -> list[Spectrum]:
    """The device path, in the deltas' order."""
    groups = batches(deltas, plan(deltas, budget, top or None))
    found = dict(decompose_batches(deltas, groups, Wanted(top, device=device_named(device), together=True)))
    return [found[i] for i in range(len(deltas))]


def timings(device: str, budget: int, sizes: Sizes) -> Iterator[Line]:
    """All of them, those that say most first."""
    rate = _product_rate(device, sizes.square)
    yield f"float64 product, {sizes.square}²", f"{rate / 1e12:.2f} Tflop/s"
    for work in sizes.works:
        yield from _dense(work, device, budget, rate)
    yield from _factored(device, budget, sizes)
    yield from _solvers(device, sizes.square)
    yield from _vectors(device, sizes.square)
    yield from _beside(device, sizes.square)
    yield from _small_cores(device, sizes)
    yield from _on_cpu(device, budget, sizes.square)
    yield from _profile(device, budget, sizes.square)


def processes(device: str, layers: int) -> Iterator[Line]:
    """Whole processes, ours and the plain loop of torch.linalg on the same card, in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        base, tuned = map(str, inputs.write_pair(Path(scratch) / "pair", layers))
        adapter = str(inputs.write_lora(Path(scratch) / "lora", layers=layers))
        spectra = ("-m", "spectra", "svd", "--device", device, "--top", "30")
        ways = {
            f"process: v_proj, {layers} × 4096², bf16, top 30": (
                process(*spectra, "--base", base, "--tuned", tuned, "--layer", "v_proj"),
                process("-m", "benchmarks.peers", "pair", base, tuned, device),
            ),
            f"process: rank-64 adapter of {7 * layers} matrices, top 30": (
                process(*spectra, "--tuned", adapter),
                process("-m", "benchmarks.peers", "lora", adapter, device),
            ),
        }
        for name, (ours, peer) in ways.items():
            samples = [(ours(), peer()) for _ in range(3 if "adapter" in name else 2)]
            a, b = (statistics.median(sample[side].seconds for sample in samples) for side in (0, 1))
            yield name, f"{a:.2f} s, torch.linalg on the same device {b:.2f} s: {b / a:.2f}×"


def _dense(work: Work, device: str, budget: int, rate: float) -> Iterator[Line]:
    deltas = [WeightDelta.from_tensor(str(i), matrix) for i, matrix in enumerate(work.matrices())]
    short, long = sorted((work.rows, work.columns))
    flops = work.count * (short**2 * long + 4 / 3 * short**3)
    for top in (0, 30):
        what = f"values + top {top}" if top else "values"
        seconds = _seconds(device, lambda top=top: on_device(deltas, device, budget, top))
        share = "" if top else f"; {100 * flops / seconds / rate:.0f} % of a product's rate"
        yield f"{what}, {work.name}", f"{seconds / work.count:.4f} s per matrix{share}"
    if short <= _SLOW:
        few = [delta.read(device).to_dense().float() for delta in deltas[:1]]
        for what, plain in (
            ("svdvals", torch.linalg.svdvals),
            ("svd", partial(torch.linalg.svd, full_matrices=False)),
        ):
            yield _timed(f"torch {what} float32, {work.name}", device, lambda p=plain: p(few[0]), short >= _SLOW)


def _factored(device: str, budget: int, sizes: Sizes) -> Iterator[Line]:
    side = sizes.square
    thin = [WeightDelta.from_factors(str(i), *inputs.factors(side, sizes.rank, side, i)) for i in range(sizes.modules)]
    for top in (0, 30):
        seconds = _seconds(device, lambda top=top: on_device(thin, device, budget, top))
        name = f"factored rank {sizes.rank} on {side}² × {sizes.modules}, bf16, {f'top {top}' if top else 'values'}"
        yield name, f"{seconds / sizes.modules:.5f} s per matrix, {seconds:.2f} s"


def _solvers(device: str, size: int) -> Iterator[Line]:
    """Torch's own calls on one matrix: what the device path is made of, and what it is not."""
    one = inputs.gaussian(size, size).to(device)
    double = one.double()
    ways: dict[str, Callable[[], object]] = {
        "float64 Gram matrix alone": lambda: double @ double.mT,
        "float64 Gram matrix + eigvalsh": lambda: torch.linalg.eigvalsh(double @ double.mT),
        "float64 Gram matrix + eigh": lambda: torch.linalg.eigh(double @ double.mT),
    }
    for dtype, matrix in (("float32", one), ("float64", double)):
        ways[f"svdvals {dtype}"] = lambda m=matrix: torch.linalg.svdvals(m)
        for driver in DRIVERS if device != "cpu" else ():
            ways[f"svdvals {dtype}, {driver}"] = lambda m=matrix, d=driver: torch.linalg.svdvals(m, driver=d)
    for name, way in ways.items():
        yield _timed(f"torch {name}, {size}²", device, way, "svd" in name)


def _vectors(device: str, size: int) -> Iterator[Line]:
    """Values and 30 vectors: block Lanczos after the values against every eigenvector."""
    for kind, make in (("Gaussian", lambda: inputs.gaussian(size, size)), ("decaying", lambda: inputs.decaying(size))):
        matrix = make().double().to(device)
        for name, way in (("Lanczos after the values", dense.lanczos_top), ("eigh", dense.gram_top)):
            yield _timed(f"top 30 by {name}, {size}², {kind}", device, lambda w=way, m=matrix: w(m, 30))


def _beside(device: str, size: int) -> Iterator[Line]:
    """Eigenvalues of several matrices: one after another, as a batch, on several streams."""
    for side, count in ((size // 8, 32), (size // 4, 16), (size, 4)):
        matrices = [dense.gram(inputs.gaussian(side, side, i).double().to(device)) for i in range(count)]
        stacked = torch.stack(matrices)
        ways: dict[str, Callable[[], object]] = {
            "in turn": lambda ms=matrices: [torch.linalg.eigvalsh(m) for m in ms],
            "as a batch": lambda s=stacked: torch.linalg.eigvalsh(s),
        }
        if device != "cpu":
            ways[f"on {_STREAMS} streams"] = lambda ms=matrices: on_streams(device, ms, torch.linalg.eigvalsh)
        for name, way in ways.items():
            yield _timed(f"eigvalsh float64, {side}² × {count}, {name}", device, way)


def on_streams(device: str, matrices: Sequence[Tensor], solve: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Each on a stream of one of several threads, for a solver waits for its stream."""
    place = device_named(device)
    place.settle()

    def some(start: int) -> list[Tensor]:
        with place.reading() as finish:
            mine = list(matrices[start::_STREAMS])
            place.hand_over(mine)
            found = [solve(matrix).cpu() for matrix in mine]
            finish()
        return found

    with ThreadPoolExecutor(_STREAMS) as pool:
        return [values for part in pool.map(some, range(_STREAMS)) for values in part]


def _small_cores(device: str, sizes: Sizes) -> Iterator[Line]:
    """The SVDs of the factors' cores: on the card, or brought to the CPU and back."""
    cores = torch.stack([inputs.gaussian(sizes.rank, sizes.rank, i).double() for i in range(sizes.modules)]).to(device)
    name = f"SVD of {sizes.modules} cores of {sizes.rank}², float64"
    yield _timed(f"{name}, on the device", device, lambda: torch.linalg.svd(cores))
    if device != "cpu":
        yield _timed(f"{name}, on the CPU", device, lambda: [part.to(device) for part in torch.linalg.svd(cores.cpu())])


def _on_cpu(device: str, budget: int, size: int) -> Iterator[Line]:
    """The other exact choice, for cards that are slow at float64."""
    if device != "cpu":
        deltas = [WeightDelta.from_tensor(str(i), inputs.gaussian(size, size, i)) for i in range(4)]
        for top in (None, 30):
            work = partial(decompose, deltas, top=top, device="cpu", memory_budget=budget)
            seconds = _seconds("cpu", lambda w=work: list(w()), repeats=1) / len(deltas)
            yield f"--device cpu, top {top or 0}, {size}² × {len(deltas)}", f"{seconds:.4f} s per matrix"


def _profile(device: str, budget: int, size: int) -> Iterator[Line]:
    """Where the time goes: what takes most of the device's, or of the CPU's where that is the device."""
    from torch.profiler import ProfilerActivity, profile, supported_activities

    deltas = [WeightDelta.from_tensor(str(i), inputs.gaussian(size, size, i)) for i in range(4)]
    kinds = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()
    with profile(activities=kinds) as seen:
        on_device(deltas, device, budget, 30)
    rows = seen.key_averages()
    by = "self_device_time_total" if any(getattr(row, "self_device_time_total", 0) for row in rows) else ""
    by = by or "self_cpu_time_total"
    for row in sorted(rows, key=lambda row: -getattr(row, by))[:15]:
        yield f"profile, top 30, {size}² × 4: {row.key[:70]}", f"{getattr(row, by) / 1e6:.4f} s in {row.count} calls"


def _product_rate(device: str, size: int) -> float:
    one = inputs.gaussian(size, size).double().to(device)
    return 2 * size**3 / _seconds(device, lambda: one @ one)


def _timed(name: str, device: str, work: Callable[[], object], slow: bool = False) -> Line:
    """One line; that it cannot be done, where it cannot."""
    try:
        return name, f"{_seconds(device, work, 1 if slow else 3):.4f} s"
    except (RuntimeError, ArithmeticError) as problem:
        return name, f"not done: {type(problem).__name__}: {str(problem).splitlines()[0][:100]}"


def _seconds(device: str, work: Callable[[], object], repeats: int = 3) -> float:
    """Median, after one run to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        device_named(device).settle()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
