"""A LoRA as kohya's trainers write it, which image tools load: one file, flat names, α as a tensor of each module."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from spectra.errors import SelectionError
from spectra.extraction.factors import Factors
from spectra.extraction.modules import Module
from spectra.extraction.output import TensorFile
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

# What a path begins with, in pipelines and in single files, and what its flat name begins with instead.
_COMPONENTS = (
    ("unet.", "lora_unet_"),
    ("model.diffusion_model.", "lora_unet_"),
    ("transformer.", "lora_unet_"),
    ("text_encoder_3.", "lora_te3_"),
    ("text_encoder_2.", "lora_te2_"),
    ("text_encoder.", "lora_te1_"),
    ("conditioner.embedders.0.transformer.", "lora_te1_"),
    ("conditioner.embedders.1.", "lora_te2_"),
    ("cond_stage_model.transformer.", "lora_te_"),
)


def is_flat(path: str) -> bool:
    """Whether a path is a name of this format already, as of a file that was opened without its base."""
    return "." not in path and path.startswith(("lora_", "lycoris_"))


class Kohya:
    """Writes one file in kohya's format.

    Attributes:
        pipeline: names of the components of a diffusers pipeline; empty for any other base.
    """

    file = "adapter.safetensors"

    def __init__(self, pipeline: Collection[str] = ()) -> None:
        self.pipeline = pipeline
        self._ranks: dict[str, int] = {}

    def why_not(self, module: Module) -> str:
        """Why the format has no LoRA for a module; "" if it has."""
        if module.kind not in ("linear", "convolution"):
            return "kohya's format has linear layers and convolutions only: use --format peft"
        return ""

    def tensors(self, module: Module, factors: Sequence[Factors]) -> dict[str, Tensor]:
        """Stored name → tensor, for a module that gets a LoRA.

        Raises:
            SelectionError: two modules have the same flat name.
        """
        name = self.flat_name(module.path)
        down, up = factors[0].A, factors[0].B
        if name in self._ranks:
            raise SelectionError(f"{module.path} and another module are both called {name}: use --format peft")
        self._ranks[name] = factors[0].rank
        if module.kind == "convolution":
            down = down.reshape(down.shape[0], -1, *module.kernel)
            up = up.reshape(*up.shape, *(1 for _ in module.kernel))
        alpha = torch.tensor(float(factors[0].rank), dtype=down.dtype)
        return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}

    def flat_name(self, path: str) -> str:
        """What the format calls a module.

        >>> Kohya(["unet"]).flat_name("unet.down_blocks.0.attentions.0.proj_in")
        'lora_unet_down_blocks_0_attentions_0_proj_in'
        """
        if is_flat(path):
            return path
        for start, short in _COMPONENTS:
            if path.startswith(start) and self._is_component(start):
                only = short == "lora_te1_" and start == "text_encoder." and "text_encoder_2" not in self.pipeline
                return ("lora_te_" if only else short) + path.removeprefix(start).replace(".", "_")
        return "lora_unet_" + path.replace(".", "_")

    def _is_component(self, start: str) -> bool:
        """Whether a path's beginning is a component: GPT-2's `transformer.` is none."""
        return start.count(".") > 1 or start.removesuffix(".") in self.pipeline

    def finish(self, file: TensorFile, whole: Collection[str]) -> None:
        """Write the weights; the header says what kohya's tools show of a network.

        Args:
            file: the weights.
            whole: must be empty, as the format keeps no module whole.
        """
        assert not whole
        ranks = set(self._ranks.values())
        size = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        file.close({"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": size})
