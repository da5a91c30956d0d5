"""OSF: the large singular directions of W₀ stay, what is left of it is trained freely (Nayak et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import regex

from spectra.deltas.forms import Dense, Form, LowRank
from spectra.deltas.recipes import OnBase, svd_bytes
from spectra.errors import SourceError
from spectra.files.tensors import TensorRef
from spectra.lazy import torch
from spectra.sources.adapter import Refusal, Slots, add_modules_on_base
from spectra.sources.config import Config
from spectra.sources.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = ("U_low", "S_low", "V_low")
_SLOTS = rf"osf_svd_params\.(?:(?P<adapter>[^.]+)\.)?(?P<slot>{'|'.join(_NAMES)})"
_PATTERN_SECONDS = 1.0  # patterns come from the file; one that backtracks forever must end
_TIED = 1e-9  # a relative gap below which the split of W₀'s singular directions is not determined


@dataclass(frozen=True)
class SmallDirectionsReplaced(OnBase):
    """ΔW = U S V − (W₀ − its top k singular triplets), of rank at most 2(min(out, in) − k).

    Attributes:
        left: U (out, l), l = min(out, in) − k.
        values: S (l,).
        right: V (l, in).
    """

    left: TensorRef
    values: TensorRef
    right: TensorRef

    @property
    def factored(self) -> bool:
        """Where the factors are narrower than the matrix."""
        return 2 * self.values.shape[0] < min(self.shape)

    @property
    def rank(self) -> int:
        """At most 2l: l directions come and l go."""
        return min(2 * self.values.shape[0], *self.shape)

    @property
    def reading_bytes(self) -> int:
        """W₀ in float64, its SVD, and the update if its factors are multiplied."""
        return svd_bytes(*self.shape) + (0 if self.factored else 8 * self.base.numel)

    def from_base(self, base: Tensor) -> Form:
        """Left [U S | −U₀ S₀], right [V; V₀], the second halves from W₀'s SVD; or their product.

        Raises:
            SourceError: W₀'s singular values do not separate the small directions from the large ones.
        """
        left, values, right = (ref.read_float64(str(base.device)) for ref in (self.left, self.values, self.right))
        if not bool(base.isfinite().all()):  # there is no SVD, and no number in ΔW
            return LowRank(left * torch.nan, right) if self.factored else Dense(base * torch.nan)
        U, S, Vh = torch.linalg.svd(base, full_matrices=False)
        k = len(S) - len(values)
        if 0 < k < len(S) and float(S[k - 1] - S[k]) < _TIED * float(S[0]):
            raise SourceError(
                f"{self.base.name}: singular values {k} and {k + 1} of the base weight are equal, so which directions "
                "OSF trained is not determined"
            )
        outer = torch.cat((left * values, -U[:, k:] * S[k:]), 1), torch.cat((right, Vh[k:]), 0)
        return LowRank(*outer) if self.factored else Dense(outer[0] @ outer[1])


def read(ledger: Ledger) -> None:
    """Enter the trained triplets of every module.

    Raises:
        SourceError: a rank in the config is no number, or a pattern is unusable.
    """
    add_modules_on_base(ledger, ledger.modules(_SLOTS), partial(_replaced, ledger.config))


def _replaced(config: Config, module: str, slots: Slots, base: TensorRef) -> SmallDirectionsReplaced:
    """The trained triplets of one module, as many as the config leaves of the base's directions."""
    left, values, right = slots.real(*_NAMES)
    out, inside = base.shape
    kept = _kept(config, module, min(out, inside))
    trained = min(out, inside) - kept
    if values.shape != (trained,) or left.shape != (out, trained) or right.shape != (trained, inside):
        raise Refusal(
            f"effective_rank = {kept} leaves {trained} directions of the base weight {list(base.shape)} to {module}, "
            f"the factors in {config.where} are {list(left.shape)}, {list(values.shape)}, {list(right.shape)}"
        )
    return SmallDirectionsReplaced(base, left, values, right)


def _kept(config: Config, module: str, full: int) -> int:
    """The number k of directions that stay: half of them, a share, or a count."""
    value = _effective_rank(config, module)
    if value is None:
        return full // 2
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or value == float("inf"):
        raise SourceError(f"{config.where}: effective_rank = {value!r} for {module} is no rank; mend the config")
    return min(int(full * value) if isinstance(value, float) and value <= 1 else int(value), full)


def _effective_rank(config: Config, module: str) -> object:
    """What the config says: the first pattern found anywhere in the module's name, or the one for all modules."""
    patterns = config.get("rank_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise SourceError(f"{config.where}: rank_pattern is not an object of pattern: number; mend the config")
    for pattern, rank in patterns.items():
        try:
            if regex.search(pattern, module, timeout=_PATTERN_SECONDS):
                return rank
        except (TimeoutError, regex.error) as problem:
            raise SourceError(f"{config.where}: the rank_pattern {pattern!r} is unusable: {problem}") from None
    return config.get("effective_rank")
