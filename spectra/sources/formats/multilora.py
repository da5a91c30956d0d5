"""MultiLoRA: ΔW = s·Σᵢ diag(sᵢ)·Bᵢ·Aᵢ over n parallel modules (Wang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spectra.deltas.recipes import Term
from spectra.errors import SelectionError
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Refusal, Slots, Target, add_factored
from spectra.sources.ledger import Ledger
from spectra.sources.targets import targets

_SLOTS = r"(?:multilora|lora)_(?P<slot>A|B|scaling)"


@dataclass(frozen=True)
class _Stack:
    """A (n, r, in), B (n, out, r) and the scaling vectors, one entry of each per module; s."""

    down: TensorRef
    up: TensorRef
    scales: TensorRef
    s: float

    def term(self, index: int) -> Term:
        row_scale = self.scales.item(index)
        return Term((self.up.item(index),), self.down.item(index), self.s, row_scale.reshape(row_scale.numel))


def read(ledger: Ledger) -> None:
    """Enter the stacks of every module. `heads`: an index for one module's ΔW, "each" for all of them apart.

    Raises:
        SelectionError: there is no module of that index.
    """
    stacks: dict[str, _Stack] = {}
    for module, slots in ledger.modules(_SLOTS).items():
        with ledger.attempt(f"{module}.weight"):
            stacks[module] = _stack(ledger, module, slots)
    shapes = {module: (stack.up.shape[1], stack.down.shape[2]) for module, stack in stacks.items()}
    for module, target in targets(ledger, shapes).items():
        _add(ledger, target, stacks[module])


def _add(ledger: Ledger, target: Target, stack: _Stack) -> None:
    heads, count = ledger.heads, stack.down.shape[0]
    terms = [stack.term(index) for index in range(count)]
    if heads in ("mean", "sum"):  # the modules of MultiLoRA add up: there is one ΔW
        add_factored(ledger, target, terms)
        return
    if isinstance(heads, int) and not 0 <= heads < count:
        raise SelectionError(f"{target.name} has MultiLoRA modules 0 to {count - 1}, not {heads}")
    for index in range(count) if heads == "each" else [int(heads)]:
        part = replace(target, name=f"{target.name}[module{index}]")
        add_factored(ledger, part, [terms[index]], note=f"module {index} of {count} alone", whole=True)


def _stack(ledger: Ledger, module: str, slots: Slots) -> _Stack:
    """The three tensors of a module, whose shapes must match each other and the config."""
    missing = sorted({"A", "B", "scaling"} - set(slots))
    if missing:
        raise Refusal(f"the MultiLoRA tensor {missing[0]} is missing in {ledger.where}")
    down, up, scales = slots.real("A", "B", "scaling")
    if len(down.shape) != 3 or len(up.shape) != 3 or (up.shape[0], up.shape[2]) != down.shape[:2]:
        raise Refusal(f"A {list(down.shape)} and B {list(up.shape)} in {ledger.where} are not (n, r, in), (n, out, r)")
    count = ledger.config.get("num_modules")
    if not down.shape[0] or not down.shape[1] or count not in (None, down.shape[0]):
        named = count if count is not None else "modules"
        raise Refusal(f"A {list(down.shape)} in {ledger.where} is no stack of {named} of a rank above 0")
    allowed = [(down.shape[0],), (down.shape[0], 1), (down.shape[0], up.shape[1])]
    if scales.shape not in allowed:
        shapes = [list(shape) for shape in allowed]
        raise Refusal(f"the scaling {list(scales.shape)} in {ledger.where} is none of {shapes}")
    s = ledger.scale_of(module, down.shape[1])
    return _Stack(down, up, scales.reshape(down.shape[0], scales.numel // down.shape[0]), s)
