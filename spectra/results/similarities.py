"""What a comparison gives, matrix by matrix; and how many similarities become few: the means by role and side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from spectra import naming
from spectra.metrics.similarity import Side, SubspaceSimilarity, pool


@dataclass(frozen=True)
class NotCompared:
    """A matrix that has no similarity.

    Attributes:
        name: the weight's name.
        reason: why, in words.
        one_sided: whether only one of the updates has it, which is no fault.
        unchanged: which of the updates, "first" and "second", leave it exactly as it is, which is none either.
    """

    name: str
    reason: str
    one_sided: bool = False
    unchanged: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """`one_sided`, `unchanged`, or `failed` where both updates change it and a comparison was to be expected."""
        return "one_sided" if self.one_sided else "unchanged" if self.unchanged else "failed"


Compared = SubspaceSimilarity | NotCompared
Group = tuple[str, Side]


def group_by_role(similarities: Iterable[SubspaceSimilarity]) -> dict[Group, list[SubspaceSimilarity]]:
    """(role, side) → its similarities: roles in the model's order, the rest as it comes."""
    groups: dict[Group, list[SubspaceSimilarity]] = {}
    for item in similarities:
        groups.setdefault((item.role, item.side), []).append(item)
    roles = naming.in_model_order(role for role, _ in groups)
    return {group: groups[group] for group in sorted(groups, key=lambda group: roles.index(group[0]))}


def pool_by_role(similarities: Iterable[SubspaceSimilarity]) -> list[SubspaceSimilarity]:
    """The mean φ over the matrices of each role and side, named by the role.

    Example:
        >>> import numpy as np
        >>> grids = [np.array([[1.0]]), np.array([[0.5]])]
        >>> [first, second] = [
        ...     SubspaceSimilarity(f"layers.{i}.v_proj.weight", "left", 1, grid, grid / 4, np.zeros(1))
        ...     for i, grid in enumerate(grids)
        ... ]
        >>> [(item.name, item.phi, item.note) for item in pool_by_role([first, second])]
        [('v_proj', 0.75, 'mean over 2 matrices')]
    """
    return [pool(items, role) for (role, _), items in group_by_role(similarities).items()]
