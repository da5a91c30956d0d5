"""The scale s of a LoRA-like adapter from its config: α/r, α/√r, and per-module patterns, as PEFT reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from spectra.errors import SourceError

_PATTERN_SECONDS = 1.0  # patterns come from the file; one that backtracks forever must end


def scaling(config: Mapping[str, Any], module: str, where: str, *, alpha_key: str = "lora_alpha") -> tuple[float, int]:
    r"""s and the configured rank of one module.

    s = α/r, or α/√r with `use_rslora`; `rank_pattern` and `alpha_pattern` replace r and α for the
    modules whose name ends with a key (`(.*\.)?(key)$`), the first key in the file's order winning.

    Args:
        config: the adapter's config.
        module: the module's path without `base_model.model.`.
        where: the file, for messages.
        alpha_key: what the config calls α.

    Raises:
        SourceError: r or α is missing or not a positive, or finite, number; a pattern is unusable.

    Example:
        >>> scaling({"r": 8, "lora_alpha": 16}, "layers.0.v_proj", "adapter_config.json")
        (2.0, 8)

    Reference: Hu et al. 2021, §4.1; Kalajdzievski 2023 (rsLoRA), eq. 4.
    """
    rank = rank_of(config, module, where)
    alpha = override(config, "alpha_pattern", module, config.get(alpha_key), where)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise SourceError(f"{where}: {alpha_key} = {alpha!r} for {module} is not a finite number; mend the config")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def rank_of(config: Mapping[str, Any], module: str, where: str) -> int:
    """The configured rank of one module, `rank_pattern` included.

    Raises:
        SourceError: it is missing or not a positive whole number; a pattern is unusable.
    """
    rank = override(config, "rank_pattern", module, config.get("r"), where)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
        raise SourceError(f"{where}: r = {rank!r} for {module} is not a positive whole number; mend the config")
    return rank


def override(config: Mapping[str, Any], key: str, module: str, default: Any, where: str) -> Any:
    r"""A module's own value of an option, from the first pattern that its name ends with (`(.*\.)?(pattern)$`).

    Raises:
        SourceError: a pattern is unusable.

    Example:
        >>> override({"rank_pattern": {"v_proj": 2}}, "rank_pattern", "layers.0.v_proj", 8, "adapter_config.json")
        2
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise SourceError(f"{where}: {key} is not an object of pattern: number; mend the config")
    if not patterns:
        return default
    import regex

    for pattern, value in patterns.items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", module, timeout=_PATTERN_SECONDS):
                return value
        except TimeoutError:
            raise SourceError(f"{where}: the {key} {pattern!r} takes forever to match; simplify it") from None
        except regex.error as problem:
            raise SourceError(f"{where}: the {key} {pattern!r} is not a regular expression: {problem}") from None
    return default
