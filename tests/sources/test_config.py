"""The scale of a module: patterns against PEFT's own `get_pattern_key`, α/r and α/√r."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from spectra.errors import SourceError
from spectra.sources.config import Config

WORDS = ("model", "layers", "0", "1", "10", "self_attn", "q_proj", "v_proj", "mlp", "up_proj")
MODULES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(".".join)
# Plain ends of names, regular expressions, anchors, alternatives that PEFT's own brackets must hold together.
PIECES = st.sampled_from(
    [*WORDS, r"\d+", r"\d", ".*", "[qv]_proj", r"layers\.[01]", "q_proj|v_proj", "^model", ".", "_proj"]
)
PATTERNS = st.lists(PIECES, min_size=1, max_size=3).map(lambda parts: r"\.".join(parts)) | MODULES


@given(
    module=MODULES,
    patterns=st.lists(PATTERNS, unique=True, max_size=5),
    other=st.lists(PATTERNS, unique=True, max_size=3),
)
def test_patterns_take_precedence_as_in_peft(module, patterns, other):
    ranks = {pattern: 2 + index for index, pattern in enumerate(patterns)}
    alphas = {pattern: 100.0 + index for index, pattern in enumerate(other)}
    config = {"r": 1, "lora_alpha": 7, "rank_pattern": ranks, "alpha_pattern": alphas}
    rank = ranks.get(get_pattern_key(ranks.keys(), module), 1)
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), 7)
    assert Config(config, "here").scaling(module) == (alpha / rank, rank)


@given(r=st.integers(1, 512), alpha=st.floats(0, 1e6) | st.integers(0, 10**6), rslora=st.booleans())
def test_alpha_over_r_or_its_root(r, alpha, rslora):
    s, rank = Config({"r": r, "lora_alpha": alpha, "use_rslora": rslora}, "here").scaling("a.b")
    assert rank == r
    assert s == pytest.approx(alpha / (math.sqrt(r) if rslora else r), rel=1e-15)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_the_first_of_two_matching_patterns_wins_in_file_order(key):
    first, second = {"q_proj": 2, r".*\.q_proj": 4}, {r".*\.q_proj": 4, "q_proj": 2}
    config = {"r": 8, "lora_alpha": 8}
    got = [Config(config | {key: patterns}, "here").scaling("layers.0.q_proj") for patterns in (first, second)]
    assert got == ([(4.0, 2), (2.0, 4)] if key == "rank_pattern" else [(0.25, 8), (0.5, 8)])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 8, "lora_alpha": True}, "lora_alpha = True"),
        ({"r": True, "lora_alpha": 1}, "r = True"),
        ({"r": 8.0, "lora_alpha": 1}, "r = 8.0"),
        ({"r": 8, "lora_alpha": math.inf}, "lora_alpha = inf"),
        ({"r": 8, "lora_alpha": 1, "rank_pattern": {"b": 0}}, "r = 0"),
        ({"r": 8, "lora_alpha": 1, "alpha_pattern": {"b": "x"}}, "lora_alpha = 'x'"),
        ({"lora_alpha": 1}, "r = None"),
    ],
)
def test_what_is_no_scale_is_named(config, message):
    with pytest.raises(SourceError, match=re.escape(message)):
        Config(config, "here").scaling("a.b")
