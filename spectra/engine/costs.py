"""What an update costs, known before it is read: a count of operations and peak bytes, one rule per form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense, Form, Kronecker, LowRank
from spectra.files.dtypes import DTYPES

_LANCZOS, _LANCZOS_EACH = 600.0, 90.0  # operations per entry of the Gram matrix: for any top, and for each of it
_ALL_VECTORS = 20 / 3  # the same for each of its rows where all vectors are made


@dataclass(frozen=True)
class Cost:
    """What solving one update takes, by the solvers that usually do it.

    Attributes:
        flops: a rough count of floating-point operations.
        bytes: peak working memory once the update is read.
        entries: of the tensors that are copied where several updates of a shape are stacked; 0 where they are not.
    """

    flops: float
    bytes: int
    entries: int = 0


def cost(delta: WeightDelta, top: int | None) -> Cost:
    """What the delta takes to be read and solved by the solvers that usually do it; a test measures the bytes.

    Only the last rung of the ladder, a full SVD of ΔW, takes more bytes. Nothing where there is nothing to solve.
    """
    form = delta.form
    if form is None or len(delta.shape) != 2:
        return Cost(0.0, 0)
    solving, reading = COSTS[form](delta, top or 0), getattr(delta.recipe, "reading_bytes", 0)
    most = max(solving.bytes, reading + _stored(delta) if reading else 0)
    return Cost(solving.flops, most, solving.entries)


def flops(delta: WeightDelta, top: int | None) -> float:
    """A rough operation count: what the order of work goes by."""
    return cost(delta, top).flops


def dense_flops(shape: Sequence[int], top: int | None) -> float:
    """The same of a dense matrix (m, n); 0 of what is no matrix.

    The Gram matrix, its eigenvalues, and the vectors of the top: by Lanczos where they are few, else all of them.
    By this count, one core made 20 to 30 billion a second: at 2048 with tops of 0 to 600, at 4096 with 0 and 30.
    """
    if len(shape) != 2:
        return 0.0
    short, long = sorted(shape)
    vectors = min(_LANCZOS + _LANCZOS_EACH * top, _ALL_VECTORS * short) if top else 0.0
    return short**2 * (long + 4 / 3 * short + vectors)


def needed(delta: WeightDelta, top: int | None) -> int:
    """Peak bytes while the delta is read or solved."""
    return cost(delta, top).bytes


def _dense(delta: WeightDelta, top: int) -> Cost:
    """The Gram matrix and its eigenvalues or eigenvectors.

    Bytes: the stored rows, ΔW in float64 and what rounding makes of its top once more, and the Gram matrix with its
    eigensolver's copy or, for vectors, work space.
    """
    m, n = delta.shape
    short = min(m, n)
    k = min(top, short)
    blocks = 4 * max(64, 4 * k) * short + 3 * k * (m + n) if k else 0
    again = m * n if hasattr(delta.recipe, "rounded") else 0
    size = 8 * (m * n + again + (5 * short**2 if k else 5 * short**2 // 2) + blocks) + _stored(delta)
    return Cost(dense_flops(delta.shape, top), size, m * n)


def _low_rank(delta: WeightDelta, top: int) -> Cost:
    """QR of the factors and the SVD of their core.

    Bytes: the factors as stored and in float64, their reflectors, and the vectors.
    """
    m, n = delta.shape
    r, k = delta.max_rank, min(top, m, n)
    size = 8 * ((3 * r + 3 * k) * (m + n) + 8 * r**2) + _stored(delta) + _base(delta)
    return Cost(4.0 * (m + n) * r**2 * (2 if top else 1) + 20.0 * r**3, size, (m + n) * r)


def _kronecker(delta: WeightDelta, top: int) -> Cost:
    """An SVD of each of two sides of about (√m, √n).

    Bytes: the sides as stored and in float64 with their SVDs, the values, and the vectors of the product.
    """
    m, n = delta.shape
    k = min(top, m, n)
    size = 8 * (4 * k * (m + n) + 2 * min(m, n)) + 40 * sum(ref.numel for ref in delta.refs) + _base(delta)
    return Cost(20.0 * (m * n) ** 0.75, size)


COSTS: Mapping[type[Form], Callable[[WeightDelta, int], Cost]] = {
    Dense: _dense,
    LowRank: _low_rank,
    Kronecker: _kronecker,
}


def _stored(delta: WeightDelta) -> int:
    """Bytes of the stored tensors as they are stored."""
    return sum(ref.codec.reading_bytes if ref.codec else _width(ref.dtype) * ref.numel for ref in delta.refs)


def _base(delta: WeightDelta) -> int:
    """Bytes for W₀ in float64 and as stored, where only its norm is read."""
    full = delta.shape[0] * delta.shape[1]
    return max((9 * ref.numel for ref in delta.refs if ref.numel == full), default=0)


def _width(dtype: str) -> int:
    return DTYPES[dtype][1] if dtype in DTYPES else 8
