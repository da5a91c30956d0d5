"""Which spectra make one curve, and which similarities one panel: by role, layer, side and run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from spectra.metrics.similarity import SIDES, SubspaceSimilarity, pool
from spectra.results.similarities import Group, group_by_role
from spectra.spectrum import Spectrum

MOST_CURVES = 7  # as many as there are colours, and linear layers in a LLaMA block


def curves_by_role(
    spectra: Iterable[Spectrum], *, per_layer: bool = False, most: int = MOST_CURVES
) -> tuple[dict[str, list[Spectrum]], list[str]]:
    """A curve per role, ready for `plot_histogram`: those with the most values, and the names of the others.

    Args:
        spectra: the updates of one run.
        per_layer: a curve per role and layer.
        most: how many curves stay readable.

    Example:
        >>> spectra = [Spectrum(f"layers.{i}.v_proj.weight", (2, 2), S=[2.0, 1.0]) for i in range(2)]
        >>> curves, left_out = curves_by_role(spectra, per_layer=True, most=1)
        >>> list(curves), left_out
        (['v_proj, layer 0'], ['v_proj, layer 1'])
    """
    groups: dict[str, list[Spectrum]] = {}
    for spectrum in spectra:
        layer = "" if spectrum.layer is None else f", layer {spectrum.layer}"
        groups.setdefault(spectrum.role + (layer if per_layer else ""), []).append(spectrum)
    sizes = {name: sum(spectrum.rank for spectrum in members) for name, members in groups.items()}
    kept = set(sorted(groups, key=lambda name: -sizes[name])[:most])
    left_out = [name for name in groups if name not in kept]
    return {name: members for name, members in groups.items() if name in kept}, left_out


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two updates, compared: a column of a figure.

    Attributes:
        label: what the comparison is called.
        updates: what the two updates are called.
        similarities: of the matrices that both have.
    """

    label: str
    updates: tuple[str, str]
    similarities: Sequence[SubspaceSimilarity]


@dataclass(frozen=True, eq=False)
class Panels:
    """What `similarity_figure` takes: title → panel, title → what the updates are called there, panels in a row."""

    similarities: Mapping[str, SubspaceSimilarity | None]
    labels: Mapping[str, tuple[str, str]]
    columns: int | None


def panels_by_role(comparisons: Sequence[Comparison], *, named: bool = True) -> Panels:
    """A row of panels per role and side, in each the comparisons in their order, pooled over their matrices.

    Args:
        comparisons: one column each; a role that one does not have leaves its place empty.
        named: whether titles begin with the comparison's label.
    """
    groups = [group_by_role(comparison.similarities) for comparison in comparisons]
    rows = _rows(groups)
    one_side = len({side for _, side in rows}) == 1
    panels: dict[str, SubspaceSimilarity | None] = {}
    labels: dict[str, tuple[str, str]] = {}
    for role, side in rows:
        for comparison, members_of in zip(comparisons, groups, strict=True):
            what = role if named and one_side else f"{role}, {side}"
            title = f"{comparison.label}: {what}" if named else what
            members = members_of.get((role, side), [])
            panels[title] = pool(members, title) if len(members) > 1 else members[0] if members else None
            labels[title] = comparison.updates
    return Panels(panels, labels, len(comparisons) if len(rows) > 1 and len(comparisons) > 1 else None)


def _rows(groups: Sequence[Mapping[Group, object]]) -> list[Group]:
    """Every role and side that occurs: roles as they come, the sides of each together."""
    there = dict.fromkeys(group for members_of in groups for group in members_of)
    roles = dict.fromkeys(role for role, _ in there)
    return [(role, side) for role in roles for side in SIDES if (role, side) in there]
