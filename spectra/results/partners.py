"""Which matrix of one update belongs to which of another: by name, heads with the whole, or across roles of a layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, get_args

from spectra import naming
from spectra.errors import SelectionError

By = Literal["name", "layer"]
_HEAD = re.compile(r"\[(?:head|module)\d+\]")


@dataclass(frozen=True)
class Link:
    """Two matrices that are to be compared, each as its update's place and its name there."""

    a: tuple[int, str]
    b: tuple[int, str]

    @property
    def weight(self) -> str:
        """What a group of links shares: the first one's name without its head."""
        return weight_of(self.a[1])


def weight_of(name: str) -> str:
    """The weight that a head or a module of an adapter belongs to; other parts of names stay.

    >>> weight_of("layers.0.v_proj.weight[head2]"), weight_of("h.0.c_attn.weight[v]")
    ('layers.0.v_proj.weight', 'h.0.c_attn.weight[v]')
    """
    return _HEAD.sub("", name)


def partners(first: Sequence[str], second: Sequence[str], by: By = "name") -> list[tuple[str, str]]:
    """The pairs of names to compare, in the first update's order.

    Equal names belong together; so does each head of a weight with the weight itself, where the other update has no
    heads of it.

    Args:
        first: the matrices of one update.
        second: those of the other.
        by: "layer" for matrices of different roles, such as query and key, that stand in the same place of a layer.

    Raises:
        SelectionError: `by` is neither, or a matrix has several partners in its layer and none is nearer than the rest.

    Example:
        >>> partners(["a[head0]", "a[head1]", "b"], ["a", "b"])
        [('a[head0]', 'a'), ('a[head1]', 'a'), ('b', 'b')]
        >>> partners(["layers.0.attn.q_proj.weight"], ["layers.0.attn.k_proj.weight"], by="layer")
        [('layers.0.attn.q_proj.weight', 'layers.0.attn.k_proj.weight')]
    """
    if by not in get_args(By):
        raise SelectionError(f"by={by!r} is not one of {', '.join(get_args(By))}")
    return list(_in_layers(first, second) if by == "layer" else _of_names(first, second))


def _of_names(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[str, str]]:
    there, here = set(second), set(first)
    heads: dict[str, list[str]] = {}
    for name in second:
        if weight_of(name) != name:
            heads.setdefault(weight_of(name), []).append(name)
    for name in first:
        if name in there:
            yield name, name
        elif weight_of(name) in there and weight_of(name) not in here:
            yield name, weight_of(name)
        else:
            yield from ((name, head) for head in heads.get(name, ()))


def _in_layers(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in first:
        nearness = {other: _nearness(name, other) for other in second if other != name}
        best = max(nearness.values(), default=0)
        nearest = [other for other, near in nearness.items() if near and near == best]
        if len(nearest) > 1:
            raise SelectionError(
                f"{name} has {len(nearest)} partners in its layer, such as {nearest[0]} and {nearest[1]}: "
                "choose one of them (--against)"
            )
        yield from ((name, other) for other in nearest)


def _nearness(name: str, other: str) -> int:
    """0 where two matrices are of different layers or heads; else 1 + how much of their modules' path they share."""
    if naming.layer_of(name) != naming.layer_of(other) or _HEAD.findall(name) != _HEAD.findall(other):
        return 0
    paths = [[*naming.module_of(one).split("."), *naming.split_parts(one)[1]] for one in (name, other)]
    return 1 + alike(*paths)


def apart(name: str, other: str) -> str:
    """What tells a weight's name from another's: its own last words; "" where they are the same.

    >>> apart("layers.0.q_proj.weight", "layers.0.k_proj.weight")
    'k_proj.weight'
    """
    words, others = name.split("."), other.split(".")
    return ".".join(others[alike(words, others) :])


def alike(*lists: Sequence[str]) -> int:
    """With how many equal words the lists begin.

    >>> alike(["a", "b", "c"], ["a", "b"], ["a", "b", "d"])
    2
    """
    columns = zip(*lists, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def links_of(names: Sequence[Sequence[str]], by: By = "name") -> list[Link]:
    """The links of every two updates, given as the names that each has; arguments and errors as for `partners`."""
    return [
        Link((i, name), (j, other))
        for i in range(len(names))
        for j in range(i + 1, len(names))
        for name, other in partners(names[i], names[j], by)
    ]


def groups_of(links: Iterable[Link]) -> Mapping[str, list[Link]]:
    """Links that share updates, weight by weight: each matrix is in one group only, so it is computed once."""
    groups: dict[str, list[Link]] = {}
    group_of: dict[tuple[int, str], str] = {}
    for link in links:
        key = group_of.get(link.a) or group_of.get(link.b) or link.weight
        group_of[link.a] = group_of[link.b] = key
        groups.setdefault(key, []).append(link)
    return groups
