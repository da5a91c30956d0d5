"""MultiLoRA: ΔW = s·Σᵢ diag(sᵢ)·Bᵢ·Aᵢ over n parallel modules (Wang et al. 2023, §3)."""

from __future__ import annotations

from dataclasses import dataclass

from spectra.deltas.recipes import Term
from spectra.deltas.source import Source
from spectra.errors import SelectionError, SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import Slots, Target, add_factored, add_rest, modules_of, targets
from spectra.sources.ledger import Ledger
from spectra.sources.scaling import scaling

KIND = "multilora"
_SLOTS = r"(?:multilora|lora)_(?P<slot>A|B|scaling)"


@dataclass(frozen=True)
class _Stack:
    """A (n, r, in), B (n, out, r) and the scaling vectors, one entry of each per module."""

    down: TensorRef
    up: TensorRef
    scales: TensorRef

    def term(self, index: int, scale: float) -> Term:
        row_scale = self.scales.item(index)
        return Term((self.up.item(index),), self.down.item(index), scale, row_scale.reshape(row_scale.numel))


def open_multilora(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the stacks of every module. `heads`: an index for one module's ΔW, "each" for all of them apart.

    Raises:
        SourceError: α/r is not known, or a stack is inconsistent.
        SelectionError: there is no module of that index.
    """
    config = tuned.adapter_config
    if config is None and scale is None:
        raise SourceError(
            f"{tuned.path} is a MultiLoRA state dict without a config, so α/r is unknown: "
            "pass --scale (1 if it was trained with α = r)"
        )
    ledger = Ledger(tuned, base)
    if config is not None and scale is not None:
        ledger.warnings.append("scale was ignored: adapter_config.json carries α and r")
    groups, rest = modules_of(ledger, _SLOTS)
    stacks, scales = {}, {}
    for module, slots in groups.items():
        stack = _stack(slots, (config or {}).get("num_modules"))
        s, rank = scaling(config, module, str(tuned.path)) if config is not None else (float(scale or 0.0), None)
        if not isinstance(stack, str) and rank not in (None, stack.down.shape[1]):
            stack = f"the config says r = {rank} for {module}, the factors have {stack.down.shape[1]}"
        if isinstance(stack, str):
            ledger.refuse(f"{module}.weight", (), "unsupported", f"{stack} in {tuned.path}")
        else:
            stacks[module], scales[module] = stack, s
    shapes = {module: (stack.up.shape[1], stack.down.shape[2]) for module, stack in stacks.items()}
    for module, target in targets(ledger, shapes).items():
        _add(ledger, target, stacks[module], scales[module], split, heads)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _add(ledger: Ledger, target: Target, stack: _Stack, scale: float, split: bool, heads: str | int) -> None:
    count = stack.down.shape[0]
    terms = [stack.term(index, scale) for index in range(count)]
    if heads in ("mean", "sum"):  # the modules of MultiLoRA add up: there is one ΔW
        add_factored(ledger, target, terms, split=split)
        return
    if isinstance(heads, int) and not 0 <= heads < count:
        raise SelectionError(f"{target.name} has MultiLoRA modules 0 to {count - 1}, not {heads}")
    for index in range(count) if heads == "each" else [int(heads)]:
        part = Target(f"{target.name}[module{index}]", target.ref)
        add_factored(ledger, part, [terms[index]], split=False, note=f"module {index} of {count} alone")


def _stack(slots: Slots, count: object) -> _Stack | str:
    """The three tensors of a module with matching shapes, or what is wrong with them."""
    missing = sorted({"A", "B", "scaling"} - set(slots))
    if missing:
        return f"the MultiLoRA tensor {missing[0]} is missing"
    down, up, scales = slots["A"], slots["B"], slots["scaling"]
    if len(down.shape) != 3 or len(up.shape) != 3 or (up.shape[0], up.shape[2]) != down.shape[:2]:
        return f"A {list(down.shape)} and B {list(up.shape)} are not (n, r, in) and (n, out, r)"
    if not down.shape[0] or not down.shape[1] or count not in (None, down.shape[0]):
        return f"A {list(down.shape)} is no stack of {count if count is not None else 'modules'} of a rank above 0"
    if not all(ref.is_float for ref in slots.values()):
        return "the factors are not stored as real numbers"
    allowed = [(down.shape[0],), (down.shape[0], 1), (down.shape[0], up.shape[1])]
    if scales.shape not in allowed:
        return f"the scaling {list(scales.shape)} is none of {[list(shape) for shape in allowed]}"
    return _Stack(down, up, scales.reshape(down.shape[0], scales.numel // down.shape[0]))
