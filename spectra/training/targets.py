"""Which modules of a model an adapter goes to: names, globs and regular expressions over the module tree."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from spectra.training.config import ALL_LINEAR, AdapterError

_COMPILED = "_orig_mod."  # torch.compile puts it into the names of what it wraps


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's Conv1D, which stores its weight as (in, out).

    It is known by name, so that no model library is needed.
    """
    weight = getattr(module, "weight", None)
    named = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    return named and hasattr(module, "nf") and getattr(weight, "ndim", 0) == 2


def is_adaptable(module: nn.Module) -> bool:
    """Whether adapters exist for modules of this kind."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def sides(module: nn.Module) -> tuple[int, int]:
    """(out, in) of the module's weight.

    Example:
        >>> sides(nn.Linear(3, 2))
        (2, 3)
    """
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module.weight
    assert not isinstance(weight, nn.Module)
    return weight.shape[1], weight.shape[0]


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Clean name → module; wrappers of torch.compile and data parallelism leave no trace in the names."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or "_orig_mod" in model._modules:
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        assert inner is not None
        model = inner
    return {f"{name}.".replace(_COMPILED, "").rstrip("."): module for name, module in model.named_modules()}


def select_targets(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """Name → module of every Linear and Conv1D that a pattern means, in the model's order.

    A plain name is a module's path or the end of one (`v_proj`, `layers.0.mlp.up_proj`), a glob (`*.attn.*`) is
    matched against the same, `re:…` is searched in the path, and `all-linear` is all but the output layer.

    Raises:
        AdapterError: a pattern matches nothing, or a plain name means something that cannot be adapted.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> list(select_targets(model, ["2"]))
        ['2']
    """
    there = modules_of(model)
    adaptable = {name: module for name, module in there.items() if is_adaptable(module)}
    chosen: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        hits = [name for name in there if _means(pattern, name)]
        if pattern == ALL_LINEAR:
            hits = [name for name, module in adaptable.items() if module not in _not_for_all(model, there)]
        usable = [name for name in hits if name in adaptable]
        if not usable or (len(usable) < len(hits) and not _is_pattern(pattern)):
            raise AdapterError(_complaint(pattern, [name for name in hits if name not in adaptable], there, adaptable))
        chosen.update(usable)
    _refuse_bypassed(chosen, there)
    return {name: module for name, module in adaptable.items() if name in chosen}


def _is_pattern(pattern: str) -> bool:
    return pattern.startswith("re:") or any(sign in pattern for sign in "*?[")


def _means(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as problem:
            raise AdapterError(f"target {pattern!r} is not a regular expression: {problem}") from None
    words = name.split(".")
    ends = (".".join(words[start:]) for start in range(len(words)))
    return any(fnmatch.fnmatchcase(end, pattern) if _is_pattern(pattern) else end == pattern for end in ends)


def _not_for_all(model: nn.Module, there: Mapping[str, nn.Module]) -> list[nn.Module]:
    """What `all-linear` leaves out: the output layer, which a model of transformers names, and what is bypassed."""
    output = getattr(there[""], "get_output_embeddings", None)
    head = output() if callable(output) else None
    bypassed = [module.out_proj for module in there.values() if isinstance(module, nn.MultiheadAttention)]
    return [module for module in (head, *bypassed) if isinstance(module, nn.Module)]


def _refuse_bypassed(chosen: set[str], there: Mapping[str, nn.Module]) -> None:
    for name in sorted(chosen):
        if isinstance(there[name.rpartition(".")[0]], nn.MultiheadAttention):
            raise AdapterError(
                f"{name} cannot be adapted: torch's MultiheadAttention takes its weight and never calls the layer; "
                "choose other targets"
            )


def _complaint(
    pattern: str, others: Sequence[str], there: Mapping[str, nn.Module], adaptable: Mapping[str, nn.Module]
) -> str:
    counts = Counter(name.rpartition(".")[2] for name in adaptable)
    listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common(30)) or "none at all"
    more = f" and {len(counts) - 30} more" if len(counts) > 30 else ""
    if others:
        kind = type(there[others[0]]).__name__
        return (
            f"target {pattern!r} means {others[0]}, a {kind}; what can be adapted is Linear and Conv1D: {listed}{more}"
        )
    return f"target {pattern!r} matches no module; the Linear and Conv1D layers are: {listed}{more}"
