"""R-LoRA and its baseline HydraLoRA: one shared A, several heads B, optionally a router that weighs them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from spectra.training.adapter import Adapter, Heads, autocasts, side_by_side
from spectra.training.config import AdapterError, RLoRAConfig


class RLoRA(Adapter):
    """ΔW(x) = s·(Σ_k ω_k(x)·B_k·A − B̄⁰·A⁰), with ω = softmax(W_r·x), or 1/N without a router.

    Random heads: A ~ (out^¼/√γ)·N(0, 1/in) and every B_k ~ (out^¼/√γ)·N(0, 1/out), all different. A⁰ and
    B̄⁰ = mean_k(B_k⁰) are kept as they were at the start, and their product is subtracted: training starts
    at the base. It is kept apart from the base's weight, not subtracted from it once as in the paper,
    because a bf16 weight would round it, and then neither start nor ΔW were exact. In training every head
    sees A·x under a dropout mask of its own. Reference: Liu et al. 2025 (R-LoRA), table 1 for the start.

    The authors' code (`init="released"`) draws A ~ N(0, 1/max(r, in)) and B_k ~ N(0, 1/max(out, r)) and scales by
    t = r^¼/√γ instead, anew for every head that it draws: A ends with the factor tᴺ, B_k (k = 0 … N − 1) with tᴺ⁻ᵏ.
    Its router starts random, and s = α/√r. Reference: `reinit.py` of the repository jinda-liu/R-LoRA.

    Zero heads (the baseline): A is Kaiming-uniform, B_k = 0, no offset. Reference: Tian et al. 2024, §2.1 and 3.

    The router starts at zero for random heads of the paper, so that every ω_k is 1/N. For zero heads it starts random,
    as in HydraLoRA: with equal weights the heads, equal at the start, would stay equal for ever.

    Attributes:
        rlora_A: (r, in).
        rlora_B: (N, out, r).
        rlora_router: W_r, (N, in), or None.
        rlora_offset_A: A⁰ (r, in), a buffer, or None.
        rlora_offset_B: B̄⁰ (out, r), a buffer, or None.
    """

    config: RLoRAConfig
    rlora_router: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        config: RLoRAConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, config)
        heads, r = config.num_heads, config.r
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rlora_A = nn.Parameter(torch.empty(r, in_features, **place))
        self.rlora_B = nn.Parameter(torch.zeros(heads, out_features, r, **place))
        router = nn.Parameter(torch.zeros(heads, in_features, **place)) if config.use_router else None
        self.register_parameter("rlora_router", router)
        self.register_buffer("rlora_offset_A", None)
        self.register_buffer("rlora_offset_B", None)
        if config.head_init == "random":
            self._start_random()
        else:
            self._start_at_zero()

    def _start_random(self) -> None:
        out, into, r, heads = self.out_features, self.in_features, self.config.r, self.config.num_heads
        if self.config.init == "released":
            size = r**0.25 / math.sqrt(self.config.gamma)
            nn.init.normal_(self.rlora_A, std=size**heads / math.sqrt(max(r, into)))
            for k, head in enumerate(self.rlora_B):
                nn.init.normal_(head, std=size ** (heads - k) / math.sqrt(max(out, r)))
            self._start_router_random()
        else:
            size = out**0.25 / math.sqrt(self.config.gamma)
            nn.init.normal_(self.rlora_A, std=size / math.sqrt(into))
            nn.init.normal_(self.rlora_B, std=size / math.sqrt(out))
        self.rlora_offset_A = self.rlora_A.detach().clone()
        self.rlora_offset_B = self.rlora_B.detach().mean(0)

    def _start_at_zero(self) -> None:
        nn.init.kaiming_uniform_(self.rlora_A, a=math.sqrt(5))
        self._start_router_random()

    def _start_router_random(self) -> None:
        if self.rlora_router is not None:
            nn.init.kaiming_uniform_(self.rlora_router, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """ΔW(x)·x. Heads that see the same are averaged first; else all of them are one product."""
        x = self._input(x)
        if self.rlora_router is None and not (self.training and self.config.head_dropout > 0):
            return self._averaged(x)
        return self._apart(x)

    def factors(self, heads: Heads = None) -> tuple[Float64[Tensor, "out k"], Float64[Tensor, "k in"]]:
        """[s·B | −s·B̄⁰] and [A; A⁰] in float64, where B is the mean or sum of the heads, or one of them.

        rank ΔW ≤ 2r, or r where there is no offset; relative to the compensated base it is at most r.

        Raises:
            AdapterError: the heads are routed and `heads` names no definition, or there is no such head.
        """
        left = self.config.scale * self._chosen(heads)
        right = self.rlora_A.detach().double()
        if self._offset is None:
            return left, right
        A0, B0 = self._offset
        return torch.cat([left, -self.config.scale * B0.double()], 1), torch.cat([right, A0.double()], 0)

    def routing(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch heads"]:
        """ω(x) in float32, whatever the dtype of x and whatever autocast says; without a router 1/N each."""
        if self.rlora_router is None:
            return x.new_full((*x.shape[:-1], self.config.num_heads), 1 / self.config.num_heads, dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext():
            return linear(x.float(), self.rlora_router.float()).softmax(-1)

    @property
    def _offset(self) -> tuple[Tensor, Tensor] | None:
        A0, B0 = self._buffers["rlora_offset_A"], self._buffers["rlora_offset_B"]
        return None if A0 is None or B0 is None else (A0, B0)

    def _averaged(self, x: Tensor) -> Tensor:
        # The same operations on (A, B) and on (A⁰, B̄⁰): at the start their difference is zero bit for bit.
        scale = self.config.scale
        shared = linear(dropout(x, self.config.dropout, self.training), self.rlora_A)
        update = linear(shared, scale * self.rlora_B.mean(0))
        if self._offset is None:
            return update
        A0, B0 = self._offset
        return update - linear(linear(x, A0), scale * B0)

    def _apart(self, x: Tensor) -> Tensor:
        config = self.config
        shared = linear(dropout(x, config.dropout, self.training), self.rlora_A)
        copies = shared.unsqueeze(-2).expand(*shared.shape[:-1], config.num_heads, config.r)
        inner = dropout(copies, config.head_dropout, self.training)  # a mask per copy, so one per head
        scale = config.scale
        if self.rlora_router is None:
            scale /= config.num_heads
        else:
            inner = (inner * self.routing(x).unsqueeze(-1)).to(shared.dtype)
        inner, left = inner.flatten(-2), side_by_side(scale * self.rlora_B)
        if self._offset is not None:
            A0, B0 = self._offset
            inner, left = torch.cat([inner, linear(x, A0)], -1), torch.cat([left, -config.scale * B0], -1)
        return linear(inner, left)

    def _chosen(self, heads: Heads) -> Float64[Tensor, "out r"]:
        stack, count = self.rlora_B.detach().double(), self.config.num_heads
        if heads is None and self.rlora_router is not None:
            raise AdapterError(
                f"{count} routed heads have no one ΔW: name a definition, heads='mean', 'sum' or 0 to {count - 1}"
            )
        if heads is None or heads == "mean":
            return stack.mean(0)
        if heads == "sum":
            return stack.sum(0)
        if isinstance(heads, bool) or not isinstance(heads, int) or not 0 <= heads < count:
            raise AdapterError(f"heads = {heads!r} is none of 'mean', 'sum' and 0 to {count - 1}")
        return stack[heads]
