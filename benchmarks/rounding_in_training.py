"""How many directions are claimed of weights that were trained in bf16, each step rounded, and what is true.

    python -m benchmarks.rounding_in_training [--steps 300]

A small stack of linear layers learns a teacher's outputs by Adam from one bf16 base, once with its weights kept in
float32 and cast at the end, once with every step rounded to bf16. Both see the same batches. Of the first, the true
count is that of the values above the largest one of its only rounding. About a minute on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import spectra

SIZE, LAYERS, BATCH = 256, 3, 64


def network(seed: int) -> nn.Sequential:
    """Layers with weights of deviation .04 and a smooth function between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        linear = nn.Linear(SIZE, SIZE, bias=False)
        nn.init.normal_(linear.weight, std=0.06)
        layers += [linear, nn.GELU()]
    return nn.Sequential(*layers[:-1])


def trained(base: list[Tensor], teacher: nn.Sequential, rate: float, steps: int, *, in_bf16: bool) -> list[Tensor]:
    """The weights after `steps` of Adam; in bf16 they are rounded after each one."""
    student = network(0)
    linears = [module for module in student if isinstance(module, nn.Linear)]
    for module, weight in zip(linears, base, strict=True):
        module.weight.data.copy_(weight)
    optimiser = torch.optim.Adam(student.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(BATCH, SIZE, generator=generator)
        loss = (student(x) - teacher(x).detach()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if in_bf16:
            for module in linears:
                module.weight.data.copy_(module.weight.data.bfloat16())
    return [module.weight.data.clone() for module in linears]


def claimed(tuned: list[Tensor], base: list[Tensor], folder: Path) -> list[int]:
    """The toolkit's count for every layer."""
    for side, weights in (("tuned", tuned), ("base", base)):
        (folder / side).mkdir(exist_ok=True)
        save_file(
            {f"layers.{i}.weight": weight.bfloat16() for i, weight in enumerate(weights)},
            folder / side / "model.safetensors",
        )
    return [found.signal_rank for found in spectra.decompose(spectra.open_source(folder / "tuned", folder / "base"))]


def above_errors(exact: Tensor, base: Tensor) -> int:
    """How many values of the exact update, cast, are above the largest of what the cast changed."""
    stored = exact.bfloat16().double()
    error = float(torch.linalg.matrix_norm(stored - exact.double(), 2))
    return int((torch.linalg.svdvals(stored - base.double()) > error).sum())


def main() -> None:
    """Print a row per rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| rate | float32 weights, cast at the end | every step rounded to bf16 | cosine of the two updates |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rate in (1e-5, 3e-5, 1e-4, 3e-4):
            base = [module.weight.data.bfloat16().float() for module in network(0) if isinstance(module, nn.Linear)]
            teacher = network(0)
            rank = torch.Generator().manual_seed(2)
            for module, weight in zip((m for m in teacher if isinstance(m, nn.Linear)), base, strict=True):
                left, right = torch.randn(SIZE, 4, generator=rank), torch.randn(4, SIZE, generator=rank)
                module.weight.data.copy_(weight + 2e-3 * left @ right)
            exact = trained(base, teacher, rate, options.steps, in_bf16=False)
            rounded = trained(base, teacher, rate, options.steps, in_bf16=True)
            true = [above_errors(one, weight) for one, weight in zip(exact, base, strict=True)]
            updates = [
                torch.cat([(one - weight).flatten() for one, weight in zip(run, base, strict=True)])
                for run in (exact, rounded)
            ]
            cosine = torch.nn.functional.cosine_similarity(updates[0], updates[1], dim=0)
            cells = (claimed(exact, base, folder), true, claimed(rounded, base, folder))
            first, second, third = (", ".join(map(str, counts)) for counts in cells)
            print(f"| {rate:g} | {first} ({second}) | {third} | {float(cosine):.2f} |", flush=True)


if __name__ == "__main__":
    main()
