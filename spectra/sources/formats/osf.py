"""OSF: the large singular directions of W₀ stay, what is left of it is trained freely (Nayak et al. 2025, §3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import regex

from spectra.deltas.forms import Dense, Form, LowRank
from spectra.deltas.recipes import svd_bytes
from spectra.deltas.source import Source
from spectra.errors import SourceError
from spectra.files.folder import Folder
from spectra.files.tensors import TensorRef
from spectra.sources.adapter import (
    Slots,
    add_modules_on_base,
    add_rest,
    config_of,
    modules_of,
    need_base,
    refuse_options,
    unusable,
)
from spectra.sources.ledger import Ledger

KIND = "osf"
_NAMES = ("U_low", "S_low", "V_low")
_SLOTS = rf"osf_svd_params\.(?:(?P<adapter>[^.]+)\.)?(?P<slot>{'|'.join(_NAMES)})"
_PATTERN_SECONDS = 1.0
_TIED = 1e-9  # a relative gap below which the split of W₀'s singular directions is not determined


@dataclass(frozen=True)
class SmallDirectionsReplaced:
    """ΔW = U S V − (W₀ − its top k singular triplets), of rank at most 2(min(out, in) − k).

    Attributes:
        base: W₀ (out, in).
        left: U (out, l), l = min(out, in) − k.
        values: S (l,).
        right: V (l, in).
    """

    base: TensorRef
    left: TensorRef
    values: TensorRef
    right: TensorRef

    @property
    def factored(self) -> bool:
        """Where the factors are narrower than the matrix."""
        return 2 * self.values.shape[0] < min(self.shape)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """W₀ and the three factors."""
        return (self.base, self.left, self.values, self.right)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.base.shape[0], self.base.shape[1])

    @property
    def rank(self) -> int:
        """2l."""
        return min(2 * self.values.shape[0], *self.shape)

    @property
    def reading_bytes(self) -> int:
        """W₀ in float64, its SVD, and the update if its factors are multiplied."""
        return svd_bytes(*self.shape) + (0 if self.factored else 8 * self.base.numel)

    def read(self, device: str = "cpu") -> Form:
        """Left [U S | −U₀ S₀], right [V; V₀], the second halves from W₀'s SVD; or their product.

        Raises:
            SourceError: W₀'s singular values do not separate the small directions from the large ones.
        """
        import torch

        base = self.base.read_float64(device)
        left, values, right = (ref.read_float64(device) for ref in (self.left, self.values, self.right))
        if not bool(base.isfinite().all()):  # there is no SVD, and no number in ΔW
            return LowRank(left * torch.nan, right) if self.factored else Dense(base * torch.nan)
        U, S, Vh = torch.linalg.svd(base, full_matrices=False)
        k = len(S) - len(values)
        if 0 < k < len(S) and float(S[k - 1] - S[k]) < _TIED * float(S[0]):
            raise SourceError(
                f"{self.base.name}: singular values {k} and {k + 1} of the base weight are equal, so which directions "
                "OSF trained is not determined"
            )
        norm = float(base.norm())
        outer = torch.cat((left * values, -U[:, k:] * S[k:]), 1), torch.cat((right, Vh[k:]), 0)
        return LowRank(*outer, norm) if self.factored else Dense(outer[0] @ outer[1], norm)


def open_osf(tuned: Folder, base: Folder | None, *, split: bool, heads: str | int, scale: float | None) -> Source:
    """Read the trained triplets of every module.

    Raises:
        BaseRequiredError: there is no base.
        SourceError: the config is missing, or a rank in it is no number.
    """
    ledger = Ledger(tuned, base)
    need_base(ledger, "OSF")
    refuse_options(ledger, heads, scale)
    config = config_of(tuned, "OSF")
    modules, rest = modules_of(ledger, _SLOTS)
    add_modules_on_base(ledger, modules, partial(_replaced, config, str(tuned.path)), split=split)
    add_rest(ledger, rest, split=split)
    return ledger.source(KIND)


def _replaced(
    config: Mapping[str, Any], where: str, module: str, slots: Slots, base: TensorRef
) -> SmallDirectionsReplaced | str:
    """The trained triplets of one module, or why there are none."""
    why = unusable(slots, _NAMES)
    if why:
        return why
    left, values, right = (slots[name] for name in _NAMES)
    kept = _kept(config, module, min(base.shape), where)
    trained = min(base.shape) - kept
    if values.shape != (trained,) or left.shape != (base.shape[0], trained) or right.shape != (trained, base.shape[1]):
        return (
            f"effective_rank = {kept} leaves {trained} directions of the base weight {list(base.shape)} to {module}, "
            f"the factors in {where} are {list(left.shape)}, {list(values.shape)}, {list(right.shape)}"
        )
    return SmallDirectionsReplaced(base, left, values, right)


def _kept(config: Mapping[str, Any], module: str, full: int, where: str) -> int:
    """The number k of directions that stay: half of them, a share, or a count; the first pattern found wins."""
    value = config.get("effective_rank")
    patterns = config.get("rank_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise SourceError(f"{where}: rank_pattern is not an object of pattern: number; mend the config")
    for pattern, rank in patterns.items():
        try:
            if regex.search(pattern, module, timeout=_PATTERN_SECONDS):
                value = rank
                break
        except (TimeoutError, regex.error) as problem:
            raise SourceError(f"{where}: the rank_pattern {pattern!r} is unusable: {problem}") from None
    if value is None:
        return full // 2
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or value == float("inf"):
        raise SourceError(f"{where}: effective_rank = {value!r} for {module} is no rank; mend the config")
    return min(int(full * value) if isinstance(value, float) and value <= 1 else int(value), full)
