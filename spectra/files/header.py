"""What a weights file says before its data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from spectra.errors import SourceError
from spectra.files import limits
from spectra.files.tensors import TensorRef


@dataclass(frozen=True)
class Header:
    """The header of one file, or of all the files of one model.

    Attributes:
        tensors: stored name → reference.
        broken: stored name → why it cannot be read.
        metadata: what else the header says: strings in safetensors, numbers and strings in GGUF. Where a
            tensor is stored once under two names, the second name → the first.
        warnings: what was chosen where there was a choice.
    """

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def merged(cls, headers: Iterable[Header]) -> Header:
        """The headers of a model's files as one; where two say something else under one key, the first holds.

        Raises:
            SourceError: a tensor is in two of the files.
        """
        whole = cls()
        for header in headers:
            for name in sorted(header.tensors.keys() & whole.tensors.keys()):
                first, second = whole.tensors[name].path, header.tensors[name].path
                raise SourceError(
                    f"{name} is in both {first} and {second}; save the model again, or name one of the files"
                )
            for name, ref in header.tensors.items():
                if len(name) > limits.NAME:  # what reads numbers in names never sees it
                    said = f"its name in {ref.path} has {len(name):,} characters, and at most {limits.NAME:,} are read"
                    whole.broken[name] = said
                else:
                    whole.tensors[name] = ref
            whole.broken.update(header.broken)
            whole.warnings.extend(header.warnings)
            for key, value in header.metadata.items():
                whole.metadata.setdefault(key, value)
        return whole
