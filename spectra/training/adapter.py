"""What every adapter is: a module that maps a layer's input to the update of its output, and knows its factors."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from spectra.training.config import AdapterError, Config

Heads = str | int | None


class Adapter(nn.Module, ABC):
    """The update of one layer. Its `state_dict` is what is saved, under the names that it is saved by.

    Attributes:
        config: what it is made of.
        out_features: m.
        in_features: n.
    """

    def __init__(self, out_features: int, in_features: int, config: Config) -> None:
        super().__init__()
        self.config = config
        self.out_features, self.in_features = out_features, in_features

    @abstractmethod
    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """ΔW·x, with dropout in training."""

    @abstractmethod
    def factors(self, heads: Heads = None) -> tuple[Float64[Tensor, "out k"], Float64[Tensor, "k in"]]:
        """ΔW = left · right relative to the base's weight, in float64.

        Args:
            heads: which ΔW where heads are routed: "mean", "sum" or an index; None if there is only one.

        Raises:
            AdapterError: there is no such ΔW.
        """

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        branches = getattr(self.config, "num_modules", None) or getattr(self.config, "num_heads", None)
        return f"in={self.in_features}, out={self.out_features}, r={self.config.r}, n={branches}"

    def _input(self, x: Tensor) -> Tensor:
        """x in the adapter's dtype; under autocast that is autocast's business."""
        return x if autocasts(x) else x.to(next(self.parameters()).dtype)


def autocasts(x: Tensor) -> bool:
    """Whether products with x run in autocast's dtype."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def refuse_oversize(config: Config, out_features: int, in_features: int, name: str) -> None:
    """Refuse an r that no factor of the layer can have.

    Raises:
        AdapterError: r is larger than both sides of the weight.
    """
    if config.r > max(out_features, in_features):
        raise AdapterError(f"r = {config.r} is larger than both sides of {name} ({out_features}, {in_features})")


def side_by_side(heads: Float[Tensor, "n out r"]) -> Float[Tensor, "out nr"]:
    """[B₁ | … | B_n]: the stack as one matrix, so that one product does the work of n.

    Example:
        >>> side_by_side(torch.tensor([[[1.0]], [[2.0]]])).tolist()
        [[1.0, 2.0]]
    """
    return heads.transpose(0, 1).flatten(1)
