"""MultiLoRA: n parallel low-rank modules that training starts from a zero scale, not from a zero B."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from spectra.training.adapter import Adapter, Heads, side_by_side
from spectra.training.config import AdapterError, MultiLoRAConfig


class MultiLoRA(Adapter):
    """ΔW = (α/r)·Σᵢ diag(sᵢ)·Bᵢ·Aᵢ.

    Aᵢ and Bᵢ are Kaiming-uniform (a = √5, so U(±1/√in) and U(±1/√r)) and sᵢ is zero: at the first step the
    output is the base's, and only sᵢ gets a gradient. Reference: Wang et al. 2023 (MultiLoRA).

    Attributes:
        multilora_A: (n, r, in).
        multilora_B: (n, out, r).
        multilora_scaling: sᵢ, (n, out).
    """

    config: MultiLoRAConfig

    def __init__(
        self,
        out_features: int,
        in_features: int,
        config: MultiLoRAConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, config)
        n, r = config.num_modules, config.r
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.multilora_A = nn.Parameter(torch.empty(n, r, in_features, **place))
        self.multilora_B = nn.Parameter(torch.empty(n, out_features, r, **place))
        self.multilora_scaling = nn.Parameter(torch.zeros(n, out_features, **place))
        for index in range(n):  # of a 3-D tensor torch would take another fan-in
            nn.init.kaiming_uniform_(self.multilora_A[index], a=math.sqrt(5))
            nn.init.kaiming_uniform_(self.multilora_B[index], a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """ΔW·x as two products, [A₁; …; A_n] and [s₁⊙B₁ | … | s_n⊙B_n], instead of 2n small ones."""
        x = dropout(self._input(x), self.config.dropout, self.training)
        return linear(linear(x, self.multilora_A.flatten(0, 1)), self._left())

    def factors(self, heads: Heads = None) -> tuple[Float64[Tensor, "out nr"], Float64[Tensor, "nr in"]]:
        """[s₁⊙B₁ | … | s_n⊙B_n]·α/r and [A₁; …; A_n] in float64; the modules always add up.

        Raises:
            AdapterError: `heads` is given.
        """
        if heads is not None:
            raise AdapterError(f"heads = {heads!r} means nothing for MultiLoRA: its modules add up; leave it out")
        scales = self.config.scale * self.multilora_scaling.detach().double()
        left = scales.unsqueeze(-1) * self.multilora_B.detach().double()
        return side_by_side(left), self.multilora_A.detach().double().flatten(0, 1)

    def _left(self) -> Float[Tensor, "out nr"]:
        scales = self.config.scale * self.multilora_scaling
        return side_by_side(scales.unsqueeze(-1) * self.multilora_B)
