"""Names of weights: layer index, module role across architectures, and --layer matching."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from spectra.errors import SelectionError

# Modules that are called as their role is.
_ITSELF = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
# The last path components of a module, and the role that LLaMA's names give it. First match wins.
# Attention is told apart from the MLP by its parent where both use a word such as `dense`.
_ROLE_PATTERNS: tuple[tuple[str, str], ...] = (
    (r"(?:^|\.)h\.\d+\.mlp\.w1$", "up_proj"),  # Qwen v1, which names them the other way round
    (r"(?:^|\.)h\.\d+\.mlp\.w2$", "gate_proj"),
    (r"(?:^|\.)h\.\d+\.attn\.proj$|(?:^|\.)attn\.output_proj$", "o_proj"),  # LitGPT; torchtune
    (r"(?:^|\.)h\.\d+\.mlp\.(?:experts\.\d+\.)?fc_1$", "gate_proj"),
    (r"(?:^|\.)h\.\d+\.mlp\.(?:experts\.\d+\.)?fc(?:_2)?$", "up_proj"),
    (r"(?:^|\.)h\.\d+\.mlp\.(?:experts\.\d+\.)?proj$", "down_proj"),
    (r"(?:^|\.)(?:query|query_proj|q_lin|to_q|(?:SelfAttention|EncDecAttention)\.q)$", "q_proj"),
    (r"(?:^|\.)(?:key|key_proj|k_lin|to_k|(?:SelfAttention|EncDecAttention)\.k)$", "k_proj"),
    (r"(?:^|\.)(?:value|value_proj|v_lin|to_v|(?:SelfAttention|EncDecAttention)\.v)$", "v_proj"),
    (
        r"(?:^|\.)(?:out_proj|to_out\.0|(?:SelfAttention|EncDecAttention)\.o|attention\.out_lin)$",
        "o_proj",
    ),
    (
        r"(?:^|\.)(?:attn\.c_proj|attention\.output\.dense|(?:self_)?attention\.dense|self_attn\.dense)$",
        "o_proj",
    ),
    (r"(?:^|\.)(?:c_attn|query_key_value|Wqkv|(?:\w+_)?attn\.qkv)$", "qkv_proj"),
    (r"(?:^|\.)(?:\w+_)?attn\.proj$", "o_proj"),
    (r"(?:^|\.)ff(?:_context)?\.net\.0\.proj$", "up_proj"),
    (r"(?:^|\.)ff(?:_context)?\.net\.2$", "down_proj"),
    (
        r"(?:^|\.)(?:mlp\.c_fc|dense_h_to_4h|intermediate\.dense|fc1|lin1|DenseReluDense\.wi)$",
        "up_proj",
    ),
    (
        r"(?:^|\.)(?:mlp\.c_proj|dense_4h_to_h|output\.dense|fc2|lin2|DenseReluDense\.wo)$",
        "down_proj",
    ),
    (r"(?:^|\.)(?:w1|wi_0)$", "gate_proj"),
    (r"(?:^|\.)(?:w3|wi_1)$", "up_proj"),
    (r"(?:^|\.)w2$", "down_proj"),
    (r"(?:^|\.)(?:gate|router(?:\.layer)?)$", "router"),
    (r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)$", "embed_tokens"),
    (r"(?:^|\.)(?:lm_head|embed_out)$", "lm_head"),
)
_ROLES = tuple((re.compile(pattern), role) for pattern, role in _ROLE_PATTERNS)
_PART_ROLES = {
    **{part: f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")},
    **{f"{part}_proj": f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")},
}
# Words for the two halves of a block, whatever the architecture calls them.
_ATTENTION = ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_GROUPS = {"attn": _ATTENTION, "attention": _ATTENTION, "mlp": _MLP, "ffn": _MLP}
# As data goes through a model; roles that are not here come between the last two.
_ORDER = ("embed_tokens", *_ATTENTION, "router", *_MLP, "", "lm_head")
_PARTS = re.compile(r"\[([^\]]*)\]")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|block|encoder|decoder|resblocks)\.([0-9]{1,9})(?=\.|$)")
_LAYERS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?:\.(.+))?)?")
_ONE_LAYER = re.compile(r"([0-9]{1,9})\.(.+)")
_ANY_NUMBER = re.compile(r"(?:^|\.)([0-9]{1,9})(?=\.|$)")


# What adapters call their factors, as a component of a tensor's name.
_FACTOR = re.compile(r"(?:^|\.)(?:\w*lora_\w+|lora|hada_w\d_[ab]|lokr_w\d(?:_[ab])?|to_\w+_lora)(?:\.|$)")
_FACTOR_WORDS = ("lora", "hada_w", "lokr_w")  # of which each such name has one: quicker to look for


def is_factor(name: str) -> bool:
    """Whether a tensor is called as the factors of an adapter are, so that it is no model's weight.

    >>> is_factor("layers.0.q_proj.lora_A.default.weight"), is_factor("layers.0.q_proj.weight")
    (True, False)
    """
    return any(word in name for word in _FACTOR_WORDS) and _FACTOR.search(name) is not None


def split_parts(name: str) -> tuple[str, tuple[str, ...]]:
    """The weight's own name and its `[part]` suffixes.

    >>> split_parts("h.0.attn.c_attn.weight[v]")
    ('h.0.attn.c_attn.weight', ('v',))
    """
    return (_PARTS.sub("", name), tuple(_PARTS.findall(name))) if "[" in name else (name, ())


def module_of(name: str) -> str:
    """The module that owns the weight: its name without `.weight` and without parts.

    >>> module_of("model.layers.0.self_attn.v_proj.weight")
    'model.layers.0.self_attn.v_proj'
    """
    return split_parts(name)[0].removesuffix(".weight")


@lru_cache(2**15)
def layer_of(name: str) -> int | None:
    """The index of the layer that holds the weight, or None outside the stack of layers.

    >>> layer_of("model.layers.17.self_attn.v_proj.weight")
    17
    """
    module = module_of(name)
    match = _LAYER.search(module) or _ANY_NUMBER.search(module)
    return int(match.group(1)) if match else None


@lru_cache(2**15)  # tables and figures ask for those of thousands of matrices, each several times
def role_of(name: str) -> str:
    """What the weight does in its layer, in LLaMA's words where the architecture has such a part.

    >>> role_of("encoder.layer.0.attention.self.value.weight")
    'v_proj'
    >>> role_of("transformer.h.3.attn.c_attn.weight[k]")
    'k_proj'
    >>> role_of("pooler.dense.weight")
    'pooler.dense'
    >>> role_of("model.layers.0.block_sparse_moe.gate.weight")
    'router'
    """
    module = module_of(name)
    for part in split_parts(name)[1]:
        if part in _PART_ROLES:
            return _PART_ROLES[part]
    last = module.rpartition(".")[2]
    if last in _ITSELF:
        return last
    for pattern, role in _ROLES:
        if pattern.search(module):
            return role
    words = [word for word in module.split(".") if word and not word.isdigit()] or [module]
    return ".".join(words[-2:]) if len(words) > 1 and words[-1] in {"dense", "linear", "proj"} else words[-1]


def matches(pattern: str, name: str) -> bool:
    """Whether `--layer pattern` means this weight.

    A bare word is a path component, several of them joined by dots, the role, or the whole name; `attn` and `mlp`
    are the roles of those two halves of a block as well. A number is a layer, `0-3` are the layers 0, 1, 2 and 3,
    and `0-3.q_proj` what of them the rest means. A glob is matched against the same things as a word; `re:…` is
    searched in the whole name.

    >>> matches("v_proj", "encoder.layer.0.attention.self.value.weight")
    True
    >>> matches("layers.1.*", "model.layers.11.self_attn.v_proj.weight")
    False
    """
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    layers = _LAYERS.fullmatch(pattern)
    if layers:
        layer = layer_of(name)
        inside = layer is not None and int(layers[1]) <= layer <= int(layers[2] or layers[1])
        return inside and (layers[3] is None or matches(layers[3], name))
    whole, parts = split_parts(name)
    words = [*whole.split("."), *parts]
    if pattern in (name, whole, role_of(name)) or role_of(name) in _GROUPS.get(pattern, ()):
        return True
    width = pattern.count(".") + 1
    runs = [".".join(words[i : i + width]) for i in range(len(words) - width + 1)]
    if not any(sign in pattern for sign in "*?["):
        return pattern in runs
    tails = [".".join(words[i:]) for i in range(len(words))] if width > 1 else runs
    return any(fnmatch.fnmatchcase(text, pattern) for text in [name, role_of(name), *tails])


def select(patterns: str | Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that any of the patterns means, in their order. A comma separates patterns, too.

    `0.q_proj` is what it says where a name has these parts side by side, and else q_proj of layer 0.

    Raises:
        SelectionError: a pattern is not a regular expression, or matches none of the names.

    Example:
        >>> select("q_proj,v_proj", [f"layers.{i}.{role}.weight" for i in range(2) for role in ("q_proj", "k_proj")])
        Traceback (most recent call last):
        ...
        spectra.errors.SelectionError: layer pattern 'v_proj' matches none of the 4 matrices that are there; \
roles: q_proj (2), k_proj (2); layers 0 to 1; did you mean q_proj or k_proj? Example name: layers.0.q_proj.weight
    """
    names = list(names)
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    whole = set(names)
    wanted = [piece for pattern in given for piece in ([pattern] if pattern in whole else _alternatives(pattern))]
    chosen: set[str] = set()
    for pattern in wanted:
        try:
            hits = _meant(pattern, names)
        except re.error as problem:
            raise SelectionError(f"layer pattern {pattern!r} is not a regular expression: {problem}") from None
        if not hits:
            raise SelectionError(f"layer pattern {pattern!r} matches none of {_overview(names, pattern)}")
        chosen.update(hits)
    return [name for name in names if name in chosen]


def _meant(pattern: str, names: list[str]) -> list[str]:
    """The names that match; of `0.v_proj` those of a layer, where no name has these parts side by side.

    >>> _meant("1.v_proj", [f"h.{i}.attn.v_proj.weight" for i in range(3)])
    ['h.1.attn.v_proj.weight']
    """
    hits = [name for name in names if matches(pattern, name)]
    one = None if hits else _ONE_LAYER.fullmatch(pattern)
    return [name for name in names if matches(f"{one[1]}-{one[1]}.{one[2]}", name)] if one else hits


def _alternatives(pattern: str) -> list[str]:
    """The patterns that commas separate; a regular expression, and the inside of brackets, may have commas.

    >>> _alternatives("q_proj, v_proj"), _alternatives("re:q{1,2}"), _alternatives("h.[0,1].*")
    (['q_proj', 'v_proj'], ['re:q{1,2}'], ['h.[0,1].*'])
    """
    if pattern.startswith("re:"):
        return [pattern]
    return [piece.strip() for piece in re.split(r",(?![^\[]*\])", pattern) if piece.strip()] or [pattern]


def in_model_order(roles: Iterable[str]) -> list[str]:
    """Roles as data goes through a model: q, k, v, o, gate, up, down; the unknown ones after those, as they come.

    >>> in_model_order(["lm_head", "down_proj", "pooler", "v_proj", "q_proj"])
    ['q_proj', 'v_proj', 'down_proj', 'pooler', 'lm_head']
    """
    return sorted(dict.fromkeys(roles), key=lambda role: _ORDER.index(role if role in _ORDER else ""))


def _overview(names: list[str], pattern: str) -> str:
    """What there is, for a pattern that matches none of it, and what may have been meant."""
    if not names:
        return "the 0 matrices that are there"
    counts: dict[str, int] = {}
    for name in names:
        counts[role_of(name)] = counts.get(role_of(name), 0) + 1
    listed = ", ".join(f"{role} ({counts[role]})" for role in in_model_order(counts)[:20])
    more = f" and {len(counts) - 20} more roles" if len(counts) > 20 else ""
    layers = {layer for name in names if (layer := layer_of(name)) is not None}
    told = f"; layers {min(layers)} to {max(layers)}" if layers else ""
    similar = _similar(pattern, counts, names)
    meant = f"; did you mean {' or '.join(similar)}?" if similar else "."
    return f"the {len(names)} matrices that are there; roles: {listed}{more}{told}{meant} Example name: {names[0]}"


def _similar(pattern: str, roles: Iterable[str], names: Iterable[str]) -> list[str]:
    """Roles, words and parts of names that look like a pattern or are what other architectures call so."""
    turned = _LAYERS.fullmatch(pattern)
    if turned and turned[2] and int(turned[1]) > int(turned[2]):
        return [f"{turned[2]}-{turned[1]}" + (f".{turned[3]}" if turned[3] else "")]
    roles = list(roles)
    same = [role for role in roles if role == role_of(pattern)]
    words = dict.fromkeys([*roles, *(word for name in names for word in name.split(".") if not word.isdigit())])
    groups = [group for group, members in _GROUPS.items() if {*members} & {*roles}]
    close = difflib.get_close_matches(pattern, words, n=3) or difflib.get_close_matches(pattern, groups, n=1)
    return list(dict.fromkeys([*same, *close, *(role for role in roles if role.startswith(pattern))]))[:3]
