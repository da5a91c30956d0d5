"""What the formats of quantised weights share: a weight made of codes and companions, and how it is found.

A format's `find` names each weight that it recognises, with all tensors that belong to it, from names and
shapes alone. They leave the list of tensors together: decoded as one weight, or refused as one.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from spectra.errors import SourceError
from spectra.files.codecs.packing import BLOCK_ENTRIES
from spectra.files.dtypes import DTYPES
from spectra.files.tensors import Codec, TensorRef
from spectra.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BROKEN = "broken"  # in the place of a storage type: the file names the tensor and does not hold it
_MOST_CONTENTS = 2**16
_WORK_BYTES = 40  # per entry of such a block: codes, group numbers, scales and products before they are rounded


@dataclass(frozen=True)
class Coded(Codec, ABC):
    """A weight that is stored as codes.

    Attributes:
        codes: the stored codes.
    """

    linear: ClassVar[bool] = True  # else the weight is as the architecture stores it
    decodes: ClassVar[bool] = True
    codes: TensorRef

    @property
    @abstractmethod
    def kind(self) -> str:
        """What the codes are, in the place of a storage type: "NF4"."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The decoded weight's, (out, in) or a stack of such."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The type that decoding gives, in safetensors' words."""

    @property
    @abstractmethod
    def companions(self) -> tuple[TensorRef, ...]:
        """What decoding needs besides the codes."""

    @abstractmethod
    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """The weight, from the stored tensors as they are.

        Raises:
            SourceError: their contents contradict the format.
        """

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The codes and what goes with them."""
        return (self.codes, *self.companions)

    @property
    def reading_bytes(self) -> int:
        """All stored parts, the weight, and the work space of one block."""
        numel = math.prod(self.shape)
        stored = sum(ref.nbytes for ref in self.refs)
        return stored + numel * DTYPES[self.dtype][1] + self.working_bytes

    @property
    def working_bytes(self) -> int:
        """What decoding takes besides: a block, and the companions in the form in which they are applied."""
        return _WORK_BYTES * min(math.prod(self.shape), BLOCK_ENTRIES) + 16 * sum(ref.numel for ref in self.companions)

    def read(self) -> Tensor:
        """Read the parts and decode them."""
        return self.decode(self.codes.read(), [ref.read() for ref in self.companions])

    def rows(self, start: int, stop: int) -> Coded | None:
        """The same for some rows; None where their codes do not lie apart."""
        return None

    def item(self, index: int) -> Coded | None:
        """The same for one matrix of a stack; None where its codes do not lie apart."""
        return None

    def as_ref(self, name: str) -> TensorRef:
        """The weight under its name, to be read like any other."""
        return replace(
            self.codes, name=name, dtype=self.kind, shape=self.shape, stored=(), offset=0, views=(), codec=self
        )


@dataclass(frozen=True)
class Candidate:
    """A weight that a format recognises.

    Attributes:
        weight: its name.
        title: whose codes they are.
        names: the stored tensors that belong to it, that in whose place it is listed first.
        build: how it is read; raises SourceError with what is wrong.
    """

    weight: str
    title: str
    names: tuple[str, ...]
    build: Callable[[], Coded]


def modules(tensors: Mapping[str, TensorRef], parts: str, marker: str) -> dict[str, dict[str, TensorRef]]:
    """Module → its tensors by their last words, for modules that have one called `marker`.

    Args:
        tensors: what the files hold.
        parts: a regular expression for the last words that belong to the format.
        marker: one for those that tell it.
    """
    if not re.search(rf"\.(?:{marker})\n", "\n".join([*tensors, ""])):  # most models have none: one look at all names
        return {}
    pattern, telling = re.compile(rf"(.+)\.({parts})"), re.compile(marker)
    tells = cache(lambda part: telling.fullmatch(part) is not None)  # of thousands of modules, a few words
    by_module: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        if match := pattern.fullmatch(name):
            by_module.setdefault(match[1], {})[match[2]] = ref
    return {module: mine for module, mine in by_module.items() if any(map(tells, mine))}


def full_names(module: str, parts: Mapping[str, TensorRef], first: str) -> tuple[str, ...]:
    """The stored names of a module's parts, one of them first."""
    return tuple(f"{module}.{part}" for part in sorted(parts, key=lambda part: part != first))


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a model's config says of its quantisation, where transformers writes it; {} if nothing."""
    text = config.get("text_config")
    places = (config, text) if isinstance(text, Mapping) else (config,)
    for place in places:
        for key in ("quantization_config", "compression_config"):
            settings = place.get(key)
            if isinstance(settings, Mapping):
                return settings
    return {}


def needed(parts: Mapping[str, TensorRef], part: str) -> TensorRef:
    """A part that the weight cannot do without.

    Raises:
        SourceError: it is not there.
    """
    if part not in parts:
        raise SourceError(f"their {part} is not in the file; download or save it again")
    return parts[part]


def expect(ref: TensorRef, dtypes: Sequence[str], *shapes: Sequence[int]) -> None:
    """Check what a stored part is.

    Raises:
        SourceError: it has another type, or none of the shapes.
    """
    if ref.dtype not in dtypes:
        raise SourceError(f"{ref.name} is stored as {ref.dtype}, not as {' or '.join(dtypes)}")
    if shapes and ref.shape not in [tuple(shape) for shape in shapes]:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise SourceError(f"{ref.name} is {list(ref.shape)}, where the other parts ask for {wanted}")


def contents(ref: TensorRef) -> bytes:
    """The bytes of a tensor that is part of the header in all but name; without torch where the file allows it.

    Raises:
        SourceError: it is larger than such a thing is, or cannot be read.
    """
    if not 0 < ref.nbytes <= _MOST_CONTENTS:
        raise SourceError(f"{ref.name} has {ref.nbytes} bytes, where a few hundred are expected")
    if ref.container == "safetensors":
        return bytes(ref.file.read(ref.offset, ref.nbytes))
    return ref.read().contiguous().flatten().view(torch.uint8).numpy().tobytes()
