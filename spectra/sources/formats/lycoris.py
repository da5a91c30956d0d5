"""What kohya's, LyCORIS', ComfyUI's and diffusers' files share: a module's tensors, whatever its name, to its ΔW.

s = α/r where α is stored as a tensor beside the factors; it is read with them, not when the file is listed.
Reference: Yeh et al. 2024 (LyCORIS); Hu et al. 2021 (LoRA), §4.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from spectra.deltas.forms import Dense, Form
from spectra.deltas.products import HadamardProduct, KroneckerProduct, Product
from spectra.deltas.recipes import Factors, FromTensors, Term, Update
from spectra.errors import SourceError
from spectra.files.dtypes import DTYPES
from spectra.files.tensors import TensorRef
from spectra.models.matrices import as_matrix
from spectra.models.pairing import unwrap
from spectra.sources.adapter import Refusal, Slots, Target, add_update
from spectra.sources.formats import components
from spectra.sources.formats.alpha import Scales, UnknownScale
from spectra.sources.formats.dora import Axis, Dora
from spectra.sources.formats.loha import cp_product, hadamard_product
from spectra.sources.ledger import Ledger
from spectra.sources.rest import is_unknown_part
from spectra.sources.targets import weight_targets

# What LyCORIS calls the tensors of a module, as a regular expression.
NAMES = (
    r"hada_[wt][12](?:_[ab])?|lokr_w[12](?:_[ab])?|lokr_t2|alpha|dora_scale|diff|diff_[bm]|w_norm|b_norm"
    r"|oft_diag|oft_blocks|on_input|set_weight"
)
# What a module's tensors are called, and what is left of that: down and up are A and B in PEFT's words.
_SAME = {
    "lora_A": "down", "lora_B": "up", "lora_down": "down", "lora_up": "up", "lora.down": "down", "lora.up": "up",
    "lora_linear_layer.down": "down", "lora_linear_layer.up": "up", "lora_mid": "mid",
    "lora_magnitude_vector": "dora_scale",
}  # fmt: skip
_KNOWN = re.compile(rf"down|up|mid|{NAMES}")
_LORA, _HADA = ("down", "up"), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_VECTORS = ("diff_b", "diff_m", "w_norm", "b_norm")  # of biases, modulations and norms
# Suffixes of what is not read, refused by name.
_OTHER = {
    "oft_diag": "a part of LyCORIS' OFT", "oft_blocks": "a part of LyCORIS' OFT or BOFT",
    "a1": "a part of LyCORIS' GLoRA", "on_input": "a part of LyCORIS' (IA)³",
    "set_weight": "ComfyUI's name for new values instead of an update",
}  # fmt: skip
_INTEGERS = tuple(name for name in DTYPES if name[0] in "IU")
_NOT_A_MATRIX = "the change of a bias or a norm, not a matrix"
_OF_THE_LAYER = (".weight", ".base_layer.weight")  # after a module's path: what it adapts, and no part of the adapter


@dataclass(frozen=True)
class Scaled(FromTensors):
    """α · V for an α that is stored as a tensor with one entry."""

    update: Update
    alpha: TensorRef

    @property
    def factored(self) -> bool:
        """As V."""
        return self.update.factored

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.update.shape

    @property
    def rank(self) -> int:
        """As V."""
        return self.update.rank

    def read(self, device: str = "cpu") -> Form:
        """V with α in it.

        Raises:
            SourceError: α is not a finite number.
        """
        alpha = float(self.alpha.read().reshape(-1)[0])  # of any number type: some trainers store an integer
        if not math.isfinite(alpha):
            raise SourceError(f"{self.alpha.name} in {self.alpha.path} is {alpha}, not a finite number")
        return self.update.read(device).scaled(alpha)


@dataclass(frozen=True)
class Stored(FromTensors):
    """ΔW as it lies in the file, of full rank for all that is known."""

    matrix: TensorRef

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.matrix.shape[0], self.matrix.shape[1])

    @property
    def rank(self) -> int:
        """min(out, in)."""
        return min(self.shape)

    def read(self, device: str = "cpu") -> Dense:
        """The matrix in float64."""
        return Dense(self.matrix.read_float64(device))


class Part(NamedTuple):
    """Where a tensor of a file belongs.

    Attributes:
        path: what stands before the tensor's own part in its name.
        module: the module that this is.
        slot: what the tensor is there; see `slot`.
    """

    path: str
    module: str
    slot: str


def slot(suffix: str) -> str:
    """A tensor's part in its module, from what comes after the module's name.

    >>> slot("lora_linear_layer.down.weight"), slot("hada_w1_a"), slot("alpha")
    ('down', 'hada_w1_a', 'alpha')
    """
    bare = suffix.removesuffix(".weight")
    return _SAME.get(bare, bare)


def grouped(ledger: Ledger, part: Callable[[str], Part | None]) -> dict[str, Slots]:
    """module → slot → reference; what is no part of a module, or cannot be read, is accounted for.

    A tensor of unknown meaning under a module's path is counted with that module, so that `build` refuses it.
    """
    tuned = ledger.tuned
    parts = {name: part(name) for name in (*tuned.tensors, *tuned.broken)}
    paths = {found.path: found.module for found in parts.values() if found and _KNOWN.fullmatch(found.slot)}
    modules: dict[str, Slots] = {}
    lost: dict[str, str] = {}
    for name, own in parts.items():
        found = own if own and own.path in paths else _under_a_path(unwrap(name), paths) or own
        if found is not None and name in tuned.broken:
            ledger.owners[name], lost[found.module] = found.module, tuned.broken[name]
        elif found is not None and found.slot in _VECTORS:
            ledger.skip(name, _NOT_A_MATRIX)
        elif found is not None:
            ledger.owners[name] = found.module
            modules.setdefault(found.module, Slots())[found.slot] = tuned.tensors[name]
        elif name in tuned.tensors and not is_unknown_part(name) and not name.endswith(".bias"):
            ledger.skip(name, "no part of an adapter that is known")
    for module in [module for module, slots in modules.items() if _changes_a_vector(slots)]:
        for name in [name for name, owner in ledger.owners.items() if owner == module]:
            ledger.skip(name, _NOT_A_MATRIX)
        del modules[module]
    for module, why in lost.items():
        modules.pop(module, None)
        ledger.refuse(f"{module}.weight", (), "unreadable", why)
    return modules


def _under_a_path(name: str, paths: Mapping[str, str]) -> Part | None:
    """The module under whose path a tensor of unknown meaning lies, if any; a layer's own parameters mean nothing."""
    for path in sorted(paths, key=len, reverse=True):
        rest = name.removeprefix(path)
        if name.startswith((f"{path}.", f"{path}_")) and rest not in _OF_THE_LAYER and not rest.endswith(".bias"):
            return Part(path, paths[path], rest)  # as it is, lest it be taken for a slot that is known
    return None


def _changes_a_vector(slots: Slots) -> bool:
    """Whether a module holds the difference of a norm or a bias, whose entries lie along one axis at most."""
    change = slots.get("diff", slots.get("set_weight"))
    if change is None or not slots.keys() <= {"diff", "set_weight", "alpha"}:
        return False
    axes = change.shape
    return len(axes) < 2 or (len(axes) > 2 and sum(size > 1 for size in axes) < 2)


@dataclass(frozen=True)
class _Module:
    """What one module's tensors amount to: its update, DoRA's magnitude or None, and what is peculiar about it."""

    update: Update
    magnitude: TensorRef | None
    note: str = ""


def add(ledger: Ledger, modules: Mapping[str, Slots], names: Mapping[str, str]) -> None:
    """Enter the modules under their weights' names.

    Args:
        ledger: the account.
        modules: module → its tensors.
        names: module → its weight's name; a module that has none was accounted for when names were looked up.

    Raises:
        BaseRequiredError: a module has a DoRA magnitude, and there is no base.
        SourceError: no module has an α, and the user gave no scale.
    """
    built = _built(ledger, modules, names)
    if any(item.magnitude is not None for item in built.values()):
        ledger.need_base("ΔW of DoRA depends on the base weights")
    # LyCORIS stores an α where nothing is factored, too: no recipe reads it.
    ledger.use(slots["alpha"] for slots in modules.values() if "alpha" in slots)
    here: dict[str, _Module] = {}
    for name, place in components.names_in_base(ledger, {n: item.update.shape for n, item in built.items()}).items():
        if place in here:
            ledger.refuse(place, (), "unsupported", f"{name} and another module both stand for this weight")
        here[place] = built[name]
    here = {place: item for place, item in here.items() if place not in ledger.unsupported}
    for name, target in weight_targets(ledger, {name: item.update.shape for name, item in here.items()}).items():
        item = here[name]
        with ledger.attempt(target.name, item.update.shape):
            add_update(ledger, target, _rescaled(item, target), note=item.note)


def _built(ledger: Ledger, modules: Mapping[str, Slots], names: Mapping[str, str]) -> dict[str, _Module]:
    """Weight's name → its module's update; modules that have none are refused.

    Raises:
        SourceError: that is so for all of them, as no α is known.
    """
    scales = Scales(ledger, modules)
    built: dict[str, _Module] = {}
    unknown: dict[str, UnknownScale] = {}
    for module, name in names.items():
        try:
            built[name] = _module(scales, module, modules[module])
        except UnknownScale as why:
            unknown[module] = why
        except Refusal as why:
            ledger.refuse(name, (), why.status, f"{module}: {why}")
    scales.say()
    if unknown and not built:
        module, reason = next(iter(unknown.items()))
        count = f"{len(unknown)} modules, such as {module}" if len(unknown) > 1 else module
        raise SourceError(f"{ledger.where}: {count}: {reason}")
    for module, reason in unknown.items():
        ledger.refuse(names[module], (), reason.status, f"{module}: {reason}")
    return built


def _module(scales: Scales, module: str, slots: Slots) -> _Module:
    down = slots.get("down")
    parts, note = scales.parts(module, down.shape[0]) if down is not None and down.shape else (1, "")
    update = build(slots, partial(scales.of, module, _is_convolution(slots)), parts)
    if isinstance(update, Scaled):
        scales.told.append(module)
    return _Module(update, slots.get("dora_scale"), note)


def build(slots: Slots, scale_of: Callable[[int], float], parts: int = 1) -> Update:
    """The update of one module before any DoRA.

    Args:
        slots: slot → reference.
        scale_of: s for a rank r, for a module without a stored α.
        parts: of how many parts, each with this α, the factors are made: r is their rank divided by it.

    Raises:
        Refusal: the tensors are no module that is known, do not fit, or s is not known.
    """
    rest = Slots({name: ref for name, ref in slots.items() if name not in ("alpha", "dora_scale")})
    if not rest:
        raise Refusal(f"{', '.join(slots)} without the factors")
    update, rank = _body(rest)
    alpha = slots.get("alpha")
    if rank is None:  # nothing was factored: LyCORIS trains with α = r then, and the stored α means nothing
        return update
    if alpha is None:
        return _times(update, scale_of(rank // parts))
    if alpha.numel != 1 or not (alpha.is_float or alpha.dtype in _INTEGERS):
        raise Refusal(f"alpha is {list(alpha.shape)} of {alpha.dtype}, not one real number")
    return Scaled(_times(update, parts / rank), alpha)


def _is_convolution(slots: Slots) -> bool:
    down = slots.get("down")
    return "mid" in slots or (down is not None and math.prod(down.shape[2:]) > 1)


def _body(slots: Slots) -> tuple[Update, int | None]:
    """The update for s = 1 and its r, None where s is 1 whatever α is."""
    names = set(slots)
    slots.real(*slots)
    for other, title in _OTHER.items():
        if other in names:
            raise Refusal(f"{other} is {title}, which is not supported")
    if names <= {*_LORA, "mid"}:
        return _lora(slots)
    if names <= {*_HADA, "hada_t1", "hada_t2"}:
        return hadamard_product(slots), slots["hada_w1_b"].shape[0]
    if all(name.startswith("lokr_") for name in names):
        return _lokr(slots)
    if names == {"diff"}:
        matrix = as_matrix(slots["diff"])
        if len(matrix.shape) != 2:
            raise Refusal("diff is no matrix")
        return Stored(matrix), None
    raise Refusal(f"the tensors {', '.join(sorted(names))} are no module that is known")


def _lora(slots: Slots) -> tuple[Update, int]:
    missing = [name for name in _LORA if name not in slots]
    if missing:
        raise Refusal(f"lora_{missing[0]} is missing in {next(iter(slots.values())).path}")
    down, up, mid = slots["down"], slots["up"], slots.get("mid")
    shapes = f"lora_down {list(down.shape)} and lora_up {list(up.shape)}"
    if len(down.shape) < 2 or len(up.shape) < 2 or not down.numel or math.prod(up.shape[2:]) != 1:
        raise Refusal(f"{shapes} are no factors")
    if mid is None:
        if up.shape[1] != down.shape[0]:
            raise Refusal(f"{shapes} cannot be multiplied")
        return Factors((Term((as_matrix(up),), as_matrix(down)),)), down.shape[0]
    if len(mid.shape) < 3 or mid.shape[:2] != (up.shape[1], down.shape[0]) or math.prod(down.shape[2:]) != 1:
        raise Refusal(f"{shapes} do not fit lora_mid {list(mid.shape)}")
    return Factors((Term((as_matrix(up),), as_matrix(down), core=mid),)), down.shape[0]


def _lokr(slots: Slots) -> tuple[Update, int | None]:
    first, second = (_side(slots, index) for index in "12")
    known = {f"lokr_w{i}{part}" for i in "12" for part in ("", "_a", "_b")} | {"lokr_t2"}
    if set(slots) - known:
        raise Refusal(f"{sorted(set(slots) - known)[0]} is no part of LoKr")
    product = KroneckerProduct(first, second)
    ranks = {side.right.shape[0] for side in (first, second) if isinstance(side, Product) and side.right.shape}
    if len(ranks) > 1:
        raise Refusal(f"the factors have different ranks: {sorted(ranks)}")
    if product.fault:
        raise Refusal(product.fault)
    return product, next(iter(ranks), None)


def _side(slots: Slots, index: str) -> TensorRef | Product:
    """One side of a Kronecker product."""
    whole, a, b = (slots.get(f"lokr_w{index}{factor}") for factor in ("", "_a", "_b"))
    core = slots.get("lokr_t2") if index == "2" else None
    if whole is not None and a is None and b is None and core is None:
        return as_matrix(whole)
    if whole is not None or a is None or b is None:
        raise Refusal(f"lokr_w{index} is neither whole nor two factors")
    return cp_product(a, b, core) if core else Product(as_matrix(a), as_matrix(b))


def _times(update: Update, scale: float) -> Update:
    if isinstance(update, Factors):
        return replace(update, terms=tuple(replace(term, scale=scale * term.scale) for term in update.terms))
    assert isinstance(update, HadamardProduct | KroneckerProduct)
    return replace(update, scale=scale * update.scale)


def _rescaled(item: _Module, target: Target) -> Update:
    """The update under its `dora_scale`, whose shape says what it is for: outputs (out, 1, …) or inputs (1, in, …)."""
    update, magnitude = item.update, item.magnitude
    if magnitude is None:
        return update
    if target.real is None or target.stored is None:
        raise Refusal("DoRA needs the base weight as real numbers")
    if not magnitude.is_float:
        raise Refusal(f"dora_scale is stored as {magnitude.dtype}, not as real numbers")
    out, channels, shape = update.shape[0], target.stored.shape[1], magnitude.shape  # channels: without the kernel
    fits: list[Axis] = []
    if magnitude.numel == out and shape[:1] == (out,):
        fits.append("rows")
    if magnitude.numel == channels and shape[:2] == (1, channels):
        fits.append("columns")
    if len(fits) != 1:
        raise Refusal(f"dora_scale {list(shape)} is neither ({out}, 1) nor (1, {channels})")
    return Dora(target.real, update, magnitude, fits[0])
