"""LoHa against PEFT's own merge, and its Khatri–Rao factors against the entrywise product."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from support.checkpoints import write_adapter, write_checkpoint
from support.peft_oracle import Convolutions, assert_matches, make_oracle

import spectra
from spectra.deltas.forms import Dense, LowRank
from spectra.errors import SourceError

PATTERNS = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 6}}
CASES = {
    "llama": ("llama", {"r": 3, "alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "patterns": ("llama", {"r": 3, "alpha": 12, "target_modules": ["q_proj", "v_proj"], **PATTERNS}),
    "bert": ("bert", {"r": 2, "alpha": 3, "target_modules": ["query", "dense"]}),
    "wide": ("llama", {"r": 5, "alpha": 5, "target_modules": ["q_proj"]}),
    "flat convolutions": (Convolutions, {"r": 2, "alpha": 3, "target_modules": ["two", "one", "point"]}),
    "effective convolutions": (
        Convolutions,
        {"r": 2, "alpha": 3, "target_modules": ["two", "one", "point"], "use_effective_conv2d": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind if isinstance(kind, str) else kind(), peft.LoHaConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "loha"
    assert_matches(source, oracle.deltas)
    assert not source.coverage.unsupported
    assert_matches(spectra.open_source(oracle.adapter), oracle.deltas)


def test_a_scale_that_float32_cannot_hold(tmp_path):
    # PEFT keeps α/r in float32, which rounds 7/3 by up to 2⁻²⁴ of itself; we do not.
    oracle = make_oracle(tmp_path, "llama", peft.LoHaConfig(r=3, alpha=7, target_modules=["q_proj"]))
    assert_matches(spectra.open_source(oracle.adapter), oracle.deltas, 2**-24)


def test_it_is_factored_where_that_is_smaller(tmp_path):
    narrow = make_oracle(tmp_path / "3", "llama", peft.LoHaConfig(r=3, alpha=6, target_modules=["q_proj"]))
    (delta, _) = spectra.open_source(narrow.adapter)
    form = delta.read()
    assert delta.factored
    assert isinstance(form, LowRank)
    assert form.left.shape == (16, 9)
    assert delta.max_rank == 9
    wide = make_oracle(tmp_path / "4", "llama", peft.LoHaConfig(r=4, alpha=2, target_modules=["q_proj"]))
    (delta, _) = spectra.open_source(wide.adapter)
    assert not delta.factored
    assert isinstance(delta.read(), Dense)
    assert delta.max_rank == 16


def test_the_spectrum_is_that_of_the_matrix(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.LoHaConfig(r=3, alpha=6, target_modules=["q_proj"]))
    for spectrum in spectra.decompose(spectra.open_source(oracle.adapter, oracle.base)):
        expected = torch.linalg.svdvals(oracle.deltas[spectrum.name])[:9]
        assert torch.allclose(torch.tensor(spectrum.S), expected, rtol=0, atol=1e-12 * float(expected[0]))


def test_a_recipe_survives_pickling_and_the_base_gives_its_norm(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.LoHaConfig(r=2, alpha=2, target_modules=["q_proj"]))
    delta = spectra.open_source(oracle.adapter, oracle.base).deltas[0]
    again = pickle.loads(pickle.dumps(delta)).read()
    assert torch.equal(again.to_dense(), delta.read().to_dense())
    assert again.base_norm > 0
    assert spectra.open_source(oracle.adapter).deltas[0].read().base_norm is None


MODULE = "base_model.model.model.layers.{}.self_attn.q_proj"
CONFIG = {"peft_type": "LOHA", "r": 2, "alpha": 4}


def factors(layer=0, r=2):
    shapes = {"w1_a": (12, r), "w1_b": (r, 10), "w2_a": (12, r), "w2_b": (r, 10)}
    return {f"{MODULE.format(layer)}.hada_{slot}": torch.randn(shape) for slot, shape in shapes.items()}


def without(tensors, slot):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(slot)}


@pytest.mark.parametrize(
    ("mutate", "reason"),
    [
        (lambda t: without(t, "w2_b"), "hada_w2_b is missing"),
        (lambda t: t | {f"{MODULE.format(0)}.hada_t1": torch.randn(2, 2, 3, 3)}, "hada_t2 is missing"),
        (lambda t: {k: v.T for k, v in t.items()}, "cannot be multiplied"),
        (lambda t: t | {f"{MODULE.format(0)}.hada_w2_b": torch.randn(2, 9)}, "no entrywise product"),
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "not as real numbers"),
        (lambda t: factors(r=3), "the config says r = 2"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused_and_the_others_are_done(tmp_path, mutate, reason):
    write_adapter(tmp_path, factors(1) | mutate(factors()), CONFIG)
    source = spectra.open_source(tmp_path)
    assert reason in source.coverage.unsupported["model.layers.0.self_attn.q_proj.weight"]
    assert source["model.layers.1.self_attn.q_proj.weight"].read().shape == (12, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "r = 0"),
        ({"alpha": float("inf")}, "alpha = inf"),
        ({"alpha": None, "lora_alpha": 4}, "alpha = None"),
        ({"peft_type": "LOKR"}, "says peft_type 'LOKR', the tensors"),
    ],
)
def test_an_unusable_config_is_named(tmp_path, change, message):
    write_adapter(tmp_path, factors(), CONFIG | change)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(tmp_path)


def test_without_a_config_the_scale_is_asked_for(tmp_path):
    tensors = factors()
    write_adapter(tmp_path, tensors, None)
    with pytest.raises(SourceError, match=r"pass scale= \(--scale\)"):
        spectra.open_source(tmp_path)
    (delta,) = spectra.open_source(tmp_path, scale=0.5)
    a1, b1, a2, b2 = (tensors[name].double() for name in sorted(tensors))
    assert torch.allclose(delta.read().to_dense(), 0.5 * (a1 @ b1) * (a2 @ b2))


def test_a_weight_of_another_shape_is_refused(tmp_path):
    write_adapter(tmp_path / "adapter", factors(), CONFIG)
    base = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(10, 12)}
    source = spectra.open_source(tmp_path / "adapter", write_checkpoint(tmp_path / "base", base))
    assert "[12, 10]" in source.coverage.shape_mismatch["model.layers.0.self_attn.q_proj.weight"]
