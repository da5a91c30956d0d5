"""Exact SVD of a Kronecker product from the SVDs of its two sides."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor


def kronecker_svd(
    first: Float64[Tensor, "m1 n1"], second: Float64[Tensor, "m2 n2"], top: int = 0
) -> tuple[Float64[Tensor, " s"], Float64[Tensor, "m k"] | None, Float64[Tensor, "k n"] | None]:
    r"""Singular values of A ⊗ B, and its top singular vectors.

    With A = U_A Σ_A V_Aᵀ and B = U_B Σ_B V_Bᵀ: A ⊗ B = (U_A ⊗ U_B)(Σ_A ⊗ Σ_B)(V_A ⊗ V_B)ᵀ. The values are all
    products σᵢτⱼ, sorted; values beyond min(m₁, n₁)·min(m₂, n₂) are zero and left out.

    Args:
        first: A.
        second: B.
        top: how many vectors to return; 0 for none.

    Example:
        >>> A, B = torch.diag(torch.tensor([2.0, 1.0])).double(), torch.tensor([[3.0, 4.0]]).double()
        >>> kronecker_svd(A, B)[0].tolist()
        [10.0, 5.0]

    Reference: Van Loan 2000, "The ubiquitous Kronecker product" (the SVD of a Kronecker product).
    """
    if top == 0:
        values = torch.outer(torch.linalg.svdvals(first), torch.linalg.svdvals(second))
        return values.flatten().sort(descending=True).values, None, None
    u1, s1, vh1 = torch.linalg.svd(first, full_matrices=False)
    u2, s2, vh2 = torch.linalg.svd(second, full_matrices=False)
    s, order = torch.outer(s1, s2).flatten().sort(descending=True, stable=True)
    i, j = order[:top] // len(s2), order[:top] % len(s2)
    u = (u1[:, None, i] * u2[None, :, j]).flatten(0, 1)
    vh = (vh1[i, :, None] * vh2[j, None, :]).flatten(1)
    return s, u, vh
