"""Which module of a model in memory a stored weight belongs to, and how a LoRA of that module is laid out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spectra.deltas.base import BaseWeight
from spectra.deltas.delta import WeightDelta
from spectra.deltas.recipes import Factors
from spectra.models import renames, tied
from spectra.models.architectures import model_type
from spectra.models.experts import STACKS
from spectra.models.pairing import unwrap

Kind = Literal["linear", "convolution", "embedding", "parameter", "experts"]

# The last words of modules that look their rows up instead of multiplying: `nn.Embedding`.
_EMBEDDING = re.compile(
    r"(?:embed|embeds|embedding|embeddings|embed_tokens|embed_positions|embed_in|tok_embeddings|tokens_embed"
    r"|positions_embed|wte|wpe|shared|relative_attention_bias|\w+_embeddings?"
    r"|emb|(?:tok|token|word|char|pos|position|rel_pos|type|segment)_emb(?:s|ed|eds)?)"
)
# In a mixture of experts: routers, which are modules of their own, and the linear layers beside the experts, which
# PEFT (0.19 to 0.21) takes for experts by their names. Both are adapted as parameters, which it does as told.
_BESIDE_EXPERTS = re.compile(r"\.(?:gate|router|gate_proj|up_proj|down_proj|w[123])$")
# Where some checkpoints leave out the name that the model with a head has for its inner model.
_INNER_MODEL = {"gpt2": "transformer.", "bloom": "transformer.", "bert": "bert.", "roberta": "roberta."}
_WITH_HEAD = re.compile(r"For[A-Z]|LMHead|DoubleHeads")


class NotCarriedError(Exception):
    """A weight whose update no LoRA can hold, and why."""


@dataclass(frozen=True)
class Module:
    """A module as its adapter sees it.

    Attributes:
        path: its path in the model in memory, such as `model.layers.0.self_attn.q_proj`.
        kind: what it is.
        kernel: a convolution's kernel, which ΔW's columns count with the inputs; () for others.
        transposed: whether its weight is stored (in, out), as Conv1D's is.
        parameter: the parameter's name, where not the module but a parameter of it is adapted.
    """

    path: str
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()
    transposed: bool = False
    parameter: str = ""


@dataclass(frozen=True)
class Architecture:
    """What names and shapes mean in the model that an adapter will be loaded into.

    Attributes:
        config: the base's `config.json`; {} where no base is known.
        stored: the names of the base's tensors.
    """

    config: Mapping[str, Any]
    stored: tuple[str, ...] = ()

    def module(self, name: str, deltas: Sequence[WeightDelta], adapters: Sequence[WeightDelta] = ()) -> Module:
        """The module that a weight belongs to.

        Args:
            name: the weight's name in the base, or in the adapter where there is no base.
            deltas: its updates, whose base and stored tensors tell the layout.
            adapters: those of them that are from adapters, whose names are those of a model in memory.

        Raises:
            NotCarriedError: the weight is no module's, or is one that another module shares.
        """
        if not name.endswith(".weight"):
            raise NotCarriedError("a parameter of its own: a LoRA changes the weights of modules")
        base = next((delta.base for delta in deltas if delta.base is not None), None)
        if base is not None and base.name != name:
            raise NotCarriedError(f"it was compared with the base's {base.name}: the base has no such weight to add to")
        kernel = base.kernel if base is not None else _kernel_of_factors(deltas)
        path = self._path(name.removesuffix(".weight"), adapters)
        if kernel:
            return Module(path, "convolution", kernel)
        if is_embedding(name):
            return Module(path, "embedding")
        if model_type(self.config, name) in STACKS and _BESIDE_EXPERTS.search(path):
            return Module(path, "parameter", parameter="weight")
        return Module(path, transposed=base is not None and base.transposed)

    def _path(self, module: str, adapters: Iterable[WeightDelta]) -> str:
        """The module's path in memory: the adapter's own where it has one, else the base's in its newest names."""
        for delta in adapters:
            own = _own_path(module, delta)
            if own:
                return own
        return self.in_memory(f"{module}.weight").removesuffix(".weight")

    def in_memory(self, name: str) -> str:
        """The name that a stored tensor of the base has in the model that transformers makes of it."""
        name = renames.current(self.config, unwrap(name))
        inner = _INNER_MODEL.get(str(self.config.get("model_type")), "")
        classes = self.config.get("architectures")
        has_head = isinstance(classes, list) and bool(classes) and _WITH_HEAD.search(str(classes[0])) is not None
        if not inner or not has_head or any(other.startswith(inner) for other in self.stored):
            return name
        return name if tied.is_head(name) else inner + name


def is_embedding(name: str) -> bool:
    """Whether a weight is that of an `nn.Embedding`, by its module's name: nothing else in a checkpoint tells.

    >>> [is_embedding(f"{module}.weight") for module in ("model.embed_tokens", "wpe", "token_emb", "emb")]
    [True, True, True, True]
    >>> [is_embedding(f"{module}.weight") for module in ("x_embedder", "class_embed", "time_emb", "lm_head")]
    [False, False, False, False]
    """
    last = name.removesuffix(".weight").rpartition(".")[2]
    return _EMBEDDING.fullmatch(last) is not None and not tied.is_head(name)


def base_of_whole(base: BaseWeight) -> BaseWeight:
    """The weight that a part or some rows were cut from, in Linear orientation."""
    if math.prod(base.ref.shape) == base.stored.numel:
        return base
    stored = base.stored.T if base.transposed else base.stored
    columns = math.prod(stored.shape[1:])
    return BaseWeight(base.name, stored.reshape(stored.shape[0], columns), base.stored)


def _kernel_of_factors(deltas: Iterable[WeightDelta]) -> tuple[int, ...]:
    """A convolution's kernel where there is no base: of a LoRA, A has it."""
    for delta in deltas:
        if isinstance(delta.recipe, Factors):
            return delta.recipe.terms[0].right.stored[2:]
    return ()


def _own_path(module: str, delta: WeightDelta) -> str:
    """What the adapter itself calls the module, whose path may have more or fewer words before it than the base's.

    The names of an adapter are those of the model that it was trained in, which are the ones to load it with.
    """
    bare = unwrap(module)
    for ref in delta.recipe.refs if delta.recipe is not None else ():
        words = unwrap(ref.name).split(".")
        for count in range(len(words) - 1, 0, -1):
            path = ".".join(words[:count])
            if f".{path}".endswith(f".{bare}") or (count > 1 and f".{bare}".endswith(f".{path}")):
                return path
    return ""
