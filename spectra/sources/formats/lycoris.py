"""One module of a kohya, LyCORIS, ComfyUI or diffusers file: its tensors, whatever the names before them, to its ΔW.

s = α/r where α is stored as a tensor beside the factors; it is read with them, not when the file is listed.
Reference: Yeh et al. 2024 (LyCORIS), §3; Hu et al. 2021 (LoRA), §4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from spectra.deltas.forms import Dense, Form, Kronecker, LowRank
from spectra.deltas.products import HadamardProduct, KroneckerProduct, Product
from spectra.deltas.recipes import Factors, Term, Update
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.models.matrices import as_matrix
from spectra.sources.adapter import Slots, unusable
from spectra.sources.formats.dora import Axis, Dora
from spectra.sources.formats.loha import cp_product

# What a module's tensors are called, and what is left of that: down and up are A and B in PEFT's words.
_SAME = {
    "lora_A": "down", "lora_B": "up", "lora_down": "down", "lora_up": "up", "lora.down": "down", "lora.up": "up",
    "lora_linear_layer.down": "down", "lora_linear_layer.up": "up", "lora_mid": "mid",
    "lora_magnitude_vector": "dora_scale",
}  # fmt: skip
_LORA, _HADA = ("down", "up"), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_VECTORS = ("diff_b", "w_norm", "b_norm")
# Suffixes of other algorithms of LyCORIS, refused by name.
_OTHER = {"oft_diag": "OFT", "oft_blocks": "OFT or BOFT", "a1": "GLoRA", "on_input": "(IA)³"}


@dataclass(frozen=True)
class Scaled:
    """α · V for an α that is stored as a tensor with one entry."""

    update: Update
    alpha: TensorRef

    @property
    def factored(self) -> bool:
        """As V."""
        return self.update.factored

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Those of V, and α."""
        return (*self.update.refs, self.alpha)

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
        alpha = float(self.alpha.read_float64().reshape(-1)[0])
        if not math.isfinite(alpha):
            raise SourceError(f"{self.alpha.name} in {self.alpha.path} is {alpha}, not a finite number")
        form = self.update.read(device)
        if isinstance(form, LowRank):
            return replace(form, left=alpha * form.left)
        if isinstance(form, Kronecker):
            return replace(form, first=alpha * form.first)
        return replace(form, matrix=alpha * form.matrix)


@dataclass(frozen=True)
class Stored:
    """ΔW as it lies in the file."""

    matrix: TensorRef

    @property
    def factored(self) -> bool:
        """False."""
        return False

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The matrix."""
        return (self.matrix,)

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


def slot(suffix: str) -> str:
    """A tensor's part in its module, from what comes after the module's name.

    >>> slot("lora_linear_layer.down.weight"), slot("hada_w1_a"), slot("alpha")
    ('down', 'hada_w1_a', 'alpha')
    """
    bare = suffix.removesuffix(".weight")
    return _SAME.get(bare, bare)


def is_vector(name: str) -> bool:
    """Whether the slot holds a bias or a norm's weight rather than a part of a matrix."""
    return name in _VECTORS


def build(slots: Slots, scale_of: Callable[[int], float | str]) -> Update | str:
    """The update of one module before any DoRA, or why there is none.

    Args:
        slots: slot → reference.
        scale_of: s for a rank r, for a module without a stored α; or why it is not known.
    """
    rest = {name: ref for name, ref in slots.items() if name not in ("alpha", "dora_scale")}
    if not rest:
        return f"{', '.join(slots)} without the factors"
    found = _body(rest)
    if isinstance(found, str):
        return found
    update, rank = found
    alpha = slots.get("alpha")
    if rank is None:  # nothing was factored: LyCORIS trains with α = r then, and the stored α means nothing
        return update
    if alpha is None:
        s = scale_of(rank)
        return s if isinstance(s, str) else _times(update, s)
    if alpha.numel != 1 or not alpha.is_float:
        return f"alpha is {list(alpha.shape)} of {alpha.dtype}, not one real number"
    return Scaled(_times(update, 1.0 / rank), alpha)


def _body(slots: Slots) -> tuple[Update, int | None] | str:
    """The update for s = 1 and its r, None where s is 1 whatever α is; or what is wrong."""
    names = set(slots)
    why = unusable(slots, slots)
    if why:
        return why
    for other, title in _OTHER.items():
        if other in names:
            return f"{other} is a part of LyCORIS' {title}, which is not supported"
    if names <= {*_LORA, "mid"}:
        return _lora(slots)
    if names <= {*_HADA, "hada_t1", "hada_t2"}:
        return _loha(slots)
    if all(name.startswith("lokr_") for name in names):
        return _lokr(slots)
    if names == {"diff"}:
        matrix = as_matrix(slots["diff"])
        return "diff is no matrix" if len(matrix.shape) != 2 else (Stored(matrix), None)
    return f"the tensors {', '.join(sorted(names))} are no module that is known"


def _lora(slots: Slots) -> tuple[Update, int] | str:
    missing = [name for name in _LORA if name not in slots]
    if missing:
        return f"lora_{missing[0]} is missing in {next(iter(slots.values())).path}"
    down, up, mid = slots["down"], slots["up"], slots.get("mid")
    shapes = f"lora_down {list(down.shape)} and lora_up {list(up.shape)}"
    if len(down.shape) < 2 or len(up.shape) < 2 or not down.numel or math.prod(up.shape[2:]) != 1:
        return f"{shapes} are no factors"
    if mid is None:
        if up.shape[1] != down.shape[0]:
            return f"{shapes} cannot be multiplied"
        return Factors((Term((as_matrix(up),), as_matrix(down)),)), down.shape[0]
    if len(mid.shape) < 3 or mid.shape[:2] != (up.shape[1], down.shape[0]) or math.prod(down.shape[2:]) != 1:
        return f"{shapes} do not fit lora_mid {list(mid.shape)}"
    return Factors((Term((as_matrix(up),), as_matrix(down), core=mid),)), down.shape[0]


def _loha(slots: Slots) -> tuple[Update, int] | str:
    cores = ("hada_t1", "hada_t2") if slots.keys() & {"hada_t1", "hada_t2"} else ()
    why = unusable(slots, (*_HADA, *cores))
    if why:
        return why
    first, second = (cp_product(slots[f"hada_w{i}_a"], slots[f"hada_w{i}_b"], slots.get(f"hada_t{i}")) for i in (1, 2))
    found = HadamardProduct(first, second)
    return found.fault or (found, slots["hada_w1_b"].shape[0])


def _lokr(slots: Slots) -> tuple[Update, int | None] | str:
    first, second = (_side(slots, index) for index in "12")
    if isinstance(first, str) or isinstance(second, str):
        return first if isinstance(first, str) else str(second)
    known = {f"lokr_w{i}{part}" for i in "12" for part in ("", "_a", "_b")} | {"lokr_t2"}
    if set(slots) - known:
        return f"{sorted(set(slots) - known)[0]} is no part of LoKr"
    found = KroneckerProduct(first, second)
    ranks = {side.right.shape[0] for side in (first, second) if isinstance(side, Product) and side.right.shape}
    if len(ranks) > 1:
        return f"the factors have different ranks: {sorted(ranks)}"
    return found.fault or (found, next(iter(ranks), None))


def _side(slots: Slots, index: str) -> TensorRef | Product | str:
    """One side of a Kronecker product."""
    whole, a, b = (slots.get(f"lokr_w{index}{factor}") for factor in ("", "_a", "_b"))
    core = slots.get("lokr_t2") if index == "2" else None
    if (whole is None) == (a is None or b is None) or (whole is not None and (a or b or core)):
        return f"lokr_w{index} is neither whole nor two factors"
    if whole is not None:
        return as_matrix(whole)
    assert a is not None
    assert b is not None
    return cp_product(a, b, core) if core else Product(as_matrix(a), as_matrix(b))


def _times(update: Update, scale: float) -> Update:
    if isinstance(update, Factors):
        return replace(update, terms=tuple(replace(term, scale=scale * term.scale) for term in update.terms))
    assert isinstance(update, HadamardProduct | KroneckerProduct)
    return replace(update, scale=scale * update.scale)


def rescaled(update: Update, magnitude: TensorRef, base: TensorRef, channels: int) -> Dora | str:
    """The update under a `dora_scale`: its shape says whether it is per output, (out, 1, …), or per input, (1, in, …).

    Args:
        update: V.
        magnitude: the trained magnitude.
        base: W (out, in·kernel).
        channels: the inputs without the kernel.
    """
    if not magnitude.is_float:
        return f"dora_scale is stored as {magnitude.dtype}, not as real numbers"
    out, shape = update.shape[0], magnitude.shape
    fits: list[Axis] = []
    if magnitude.numel == out and shape[:1] == (out,):
        fits.append("rows")
    if magnitude.numel == channels and shape[:2] == (1, channels):
        fits.append("columns")
    if len(fits) != 1:
        return f"dora_scale {list(shape)} is neither ({out}, 1) nor (1, {channels})"
    return Dora(base, update, magnitude, fits[0])
