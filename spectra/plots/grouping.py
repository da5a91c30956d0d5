"""Which spectra make one curve, and which similarities one panel: by role, layer, side and run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from spectra import naming
from spectra.metrics.similarity import SIDES, SubspaceSimilarity, pool
from spectra.results.similarities import Group, group_by_role
from spectra.spectrum import Spectrum

MOST_CURVES = 7  # as many as there are colours, and linear layers in a LLaMA block


def curves_by_role(
    spectra: Iterable[Spectrum], *, most: int = MOST_CURVES
) -> tuple[dict[str, list[Spectrum]], list[str]]:
    """A curve per role, ready for `plot_histogram`: those with the most values, and the names of the others.

    Args:
        spectra: the updates of one run.
        most: how many curves stay readable.

    Example:
        >>> spectra = [Spectrum(f"layers.0.{role}.weight", (2, 2), S=[2.0, 1.0]) for role in ("v_proj", "q_proj")]
        >>> curves, left_out = curves_by_role(spectra)
        >>> list(curves), left_out
        (['q_proj', 'v_proj'], [])
    """
    groups: dict[str, list[Spectrum]] = {}
    for spectrum in spectra:
        groups.setdefault(spectrum.role, []).append(spectrum)
    roles = naming.in_model_order(groups)
    sizes = {role: sum(spectrum.rank for spectrum in groups[role]) for role in roles}
    kept = set(sorted(roles, key=lambda role: -sizes[role])[:most])
    return {role: groups[role] for role in roles if role in kept}, [role for role in roles if role not in kept]


def pages_by_layer(spectra: Iterable[Spectrum], *, most: int = MOST_CURVES) -> dict[str, dict[str, list[Spectrum]]]:
    """Page → its curves, one for each layer of a role: as few pages as `most` curves on each allow, as even as they go.

    Example:
        >>> spectra = [Spectrum(f"layers.{i}.v_proj.weight", (2, 2), S=[2.0, 1.0]) for i in range(3)]
        >>> {page: list(curves) for page, curves in pages_by_layer(spectra, most=2).items()}
        {'v_proj, layers 0 to 1': ['v_proj, layer 0', 'v_proj, layer 1'], 'v_proj, layer 2': ['v_proj, layer 2']}
    """
    roles: dict[str, dict[int | None, list[Spectrum]]] = {}
    for spectrum in spectra:
        roles.setdefault(spectrum.role, {}).setdefault(spectrum.layer, []).append(spectrum)
    pages: dict[str, dict[str, list[Spectrum]]] = {}
    for role in naming.in_model_order(roles):
        layers = sorted(roles[role], key=lambda layer: -1 if layer is None else layer)
        size = math.ceil(len(layers) / math.ceil(len(layers) / most))
        for start in range(0, len(layers), size):
            some = layers[start : start + size]
            span = f"layer {some[0]}" if len(some) == 1 else f"layers {some[0]} to {some[-1]}"
            page = role if some == [None] else f"{role}, {span}"
            pages[page] = {role if layer is None else f"{role}, layer {layer}": roles[role][layer] for layer in some}
    return pages


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
    """Every role and side that occurs: roles in the model's order, the sides of each together."""
    there = dict.fromkeys(group for members_of in groups for group in members_of)
    roles = naming.in_model_order(role for role, _ in there)
    return [(role, side) for role in roles for side in SIDES if (role, side) in there]
