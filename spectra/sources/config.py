"""An adapter's config read as what it should say: numbers, flags, and s with per-module patterns as in PEFT."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spectra.errors import SourceError

_PATTERN_SECONDS = 1.0  # patterns come from the file; one that backtracks forever must end


@dataclass(frozen=True)
class Config(Mapping[str, Any]):
    """What `adapter_config.json` says, and where it lies for messages.

    Attributes:
        options: what it says; {} where there is no config.
        where: the adapter's path.

    Example:
        >>> config = Config({"r": 8, "lora_alpha": 16, "rank_pattern": {"v_proj": 2}}, "my-lora")
        >>> config.count("r"), config.scaling("layers.0.q_proj"), config.scaling("layers.0.v_proj")
        (8, (2.0, 8), (8.0, 2))
    """

    options: Mapping[str, Any]
    where: str

    def __getitem__(self, key: str) -> Any:
        return self.options[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.options)

    def __len__(self) -> int:
        return len(self.options)

    def real(self, key: str) -> float:
        """A finite number.

        Raises:
            SourceError: it is missing or something else.
        """
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SourceError(f"{self.where}: {key} = {value!r} is not a finite number; mend adapter_config.json")
        return float(value)

    def count(self, key: str) -> int:
        """A positive whole number.

        Raises:
            SourceError: it is missing or something else.
        """
        return self._count(key, self.get(key), "mend adapter_config.json")

    def flag(self, key: str) -> bool:
        """A yes or no.

        Raises:
            SourceError: it is missing or something else.
        """
        value = self.get(key)
        if not isinstance(value, bool):
            raise SourceError(f"{self.where}: {key} = {value!r} is neither true nor false; mend adapter_config.json")
        return value

    def scaling(self, module: str, *, alpha_key: str = "lora_alpha") -> tuple[float, int]:
        r"""s and the configured rank of one module.

        s = α/r, or α/√r with `use_rslora`; `rank_pattern` and `alpha_pattern` replace r and α for the
        modules whose name ends with a key (`(.*\.)?(key)$`), the first key in the file's order winning.

        Args:
            module: the module's path without `base_model.model.`.
            alpha_key: what the config calls α.

        Raises:
            SourceError: r or α is missing or not a positive, or finite, number; a pattern is unusable.

        Reference: Hu et al. 2021, §4.1; Kalajdzievski 2023 (rsLoRA).
        """
        rank = self.rank(module)
        alpha = self.override("alpha_pattern", module, self.get(alpha_key))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise SourceError(
                f"{self.where}: {alpha_key} = {alpha!r} for {module} is not a finite number; mend the config"
            )
        return float(alpha) / (math.sqrt(rank) if self.get("use_rslora") else rank), rank

    def rank(self, module: str) -> int:
        """The configured rank of one module, `rank_pattern` included.

        Raises:
            SourceError: it is missing or not a positive whole number; a pattern is unusable.
        """
        return self._count("r", self.override("rank_pattern", module, self.get("r")), f"mend the config of {module}")

    def override(self, key: str, module: str, default: Any) -> Any:
        r"""A module's own value of an option, from the first pattern that its name ends with (`(.*\.)?(pattern)$`).

        Raises:
            SourceError: a pattern is unusable.
        """
        patterns = self.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise SourceError(f"{self.where}: {key} is not an object of pattern: number; mend the config")
        if not patterns:
            return default
        import regex

        for pattern, value in patterns.items():
            try:
                if regex.match(rf"(.*\.)?({pattern})$", module, timeout=_PATTERN_SECONDS):
                    return value
            except TimeoutError:
                raise SourceError(f"{self.where}: the {key} {pattern!r} takes forever to match; simplify it") from None
            except regex.error as problem:
                raise SourceError(
                    f"{self.where}: the {key} {pattern!r} is not a regular expression: {problem}"
                ) from None
        return default

    def _count(self, key: str, value: Any, remedy: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise SourceError(f"{self.where}: {key} = {value!r} is not a positive whole number; {remedy}")
        return value
