"""Which matrices belong together: by name, heads with the whole, across the roles of a layer."""

from __future__ import annotations

import pytest

from spectra.errors import SelectionError
from spectra.results.partners import groups_of, links_of, partners

ATTENTION = ["decoder.block.{}.SelfAttention.q.weight", "decoder.block.{}.EncDecAttention.q.weight"]


def test_equal_names_in_the_first_ones_order():
    assert partners(["b", "a", "c"], ["a", "b"]) == [("b", "b"), ("a", "a")]


def test_each_head_belongs_to_the_weight_of_an_update_without_heads_on_either_side():
    heads = ["w[head0]", "w[head1]"]
    assert partners(heads, ["w"]) == [(head, "w") for head in heads]
    assert partners(["w"], heads) == [("w", head) for head in heads]
    assert partners(["w[q][module0]"], ["w[q]", "w[k]"]) == [("w[q][module0]", "w[q]")]


def test_heads_of_both_belong_to_their_namesakes_only():
    heads = ["w[head0]", "w[head1]"]
    assert partners(heads, heads) == [(head, head) for head in heads]
    assert partners([*heads, "w"], ["w"]) == [("w", "w")]


def test_an_expert_is_no_head():
    assert partners(["experts.down_proj[3]"], ["experts.down_proj"]) == []


def test_across_roles_the_layer_and_the_nearest_path_decide():
    queries = [pattern.format(layer) for layer in range(2) for pattern in ATTENTION]
    keys = [name.replace(".q.", ".k.") for name in queries]
    assert partners(queries, keys, by="layer") == list(zip(queries, keys, strict=True))
    assert partners(["h.0.c_attn.weight[q]"], ["h.0.c_attn.weight[k]"], by="layer") == [
        ("h.0.c_attn.weight[q]", "h.0.c_attn.weight[k]")
    ]
    assert partners(["h.0.q.weight[head1]"], ["h.0.k.weight[head0]", "h.0.k.weight[head1]"], by="layer") == [
        ("h.0.q.weight[head1]", "h.0.k.weight[head1]")
    ]


def test_several_partners_or_an_unknown_way_are_refused():
    with pytest.raises(SelectionError, match=r"2 partners in its layer, such as h\.0\.a\.weight and h\.0\.b\.weight"):
        partners(["h.0.q.weight"], ["h.0.a.weight", "h.0.b.weight"], by="layer")
    with pytest.raises(SelectionError, match="not one of name, layer"):
        partners(["a"], ["a"], by="role")


def test_a_matrix_is_in_one_group_whatever_it_is_linked_with():
    names = [["w[head0]", "w[head1]", "v"], ["w", "v"], ["w", "v"]]
    groups = groups_of(links_of(names))
    assert set(groups) == {"w", "v"}
    members = [{member for link in group for member in (link.a, link.b)} for group in groups.values()]
    assert sum(map(len, members)) == len(set.union(*members)) == 7
