"""`Recipe`: what every way to form a ΔW from stored tensors has to offer."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from spectra.deltas.forms import Dense, Form, LowRank
from spectra.files.tensors import TensorRef


@runtime_checkable
class Recipe(Protocol):
    """Where the numbers of one ΔW are and how to form it: frozen, small and picklable.

    A recipe whose `read` needs more memory for a while than its refs and the form (a permutation, the SVD of the
    base) says how many bytes in a property `reading_bytes`, which is optional. So is `form`, the class of what `read`
    gives where that is neither `LowRank` nor `Dense`.
    """

    @property
    def factored(self) -> bool:
        """True if `read` gives factors, such as a `LowRank`; False for a `Dense`."""
        ...

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every stored tensor that `read` opens."""
        ...

    def read(self, device: str = "cpu") -> Form:
        """Form ΔW in float64 on the device."""
        ...


def form_of(recipe: Recipe) -> type[Form]:
    """The class of what a recipe's `read` gives."""
    form: type[Form] = getattr(recipe, "form", LowRank if recipe.factored else Dense)
    return form
