"""LoKr against PEFT's own merge, in all the ways in which its two sides are stored."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from support.checkpoints import write_adapter, write_checkpoint
from support.peft_oracle import Convolutions, assert_matches, make_oracle

import spectra
from spectra.errors import SourceError

ALL = ["q_proj", "v_proj", "down_proj"]
CASES = {
    "right side factored": ("llama", {"r": 1, "alpha": 3, "target_modules": ALL, "decompose_factor": 2}),
    "both factored": (
        "llama",
        {"r": 1, "alpha": 3, "target_modules": ALL, "decompose_both": True, "decompose_factor": 4},
    ),
    "both whole": ("llama", {"r": 8, "alpha": 3, "target_modules": ALL}),
    "patterns": (
        "bert",
        {
            "r": 1,
            "alpha": 3,
            "target_modules": ["query", "value"],
            "decompose_factor": 2,
            "rank_pattern": {"layer.0.attention.self.query": 2},
            "alpha_pattern": {"value": 7},
        },
    ),
    "flat convolutions": (
        Convolutions,
        {"r": 1, "alpha": 3, "target_modules": ["two", "one", "point", "grouped"], "decompose_factor": 2},
    ),
    "effective convolutions": (
        Convolutions,
        {
            "r": 1,
            "alpha": 3,
            "target_modules": ["two", "point", "grouped"],
            "decompose_factor": 2,
            "use_effective_conv2d": True,
        },
    ),
    "whole kernels": (Convolutions, {"r": 8, "alpha": 3, "target_modules": ["two", "point", "grouped"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind if isinstance(kind, str) else kind(), peft.LoKrConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "lokr"
    assert_matches(source, oracle.deltas)
    assert not source.coverage.unsupported
    assert_matches(spectra.open_source(oracle.adapter), oracle.deltas)
    for delta in source:
        assert torch.linalg.matrix_rank(delta.read().to_dense()) <= delta.max_rank


def test_the_cases_hold_every_layout(tmp_path):
    seen = set()
    for case, (kind, options) in CASES.items():
        model = kind if isinstance(kind, str) else kind()
        oracle = make_oracle(tmp_path / case.replace(" ", "_"), model, peft.LoKrConfig(**options))
        for delta in spectra.open_source(oracle.adapter):
            seen.add(tuple(sorted(ref.name.rsplit(".", 1)[1].removeprefix("lokr_") for ref in delta.recipe.refs)))
    assert seen >= {
        ("w1", "w2"),
        ("w1", "w2_a", "w2_b"),
        ("w1_a", "w1_b", "w2_a", "w2_b"),
        ("t2", "w1", "w2_a", "w2_b"),
    }


def test_the_rank_is_the_product_of_the_sides_ranks(tmp_path):
    options = {"r": 1, "alpha": 3, "target_modules": ["q_proj"], "decompose_factor": 2}
    oracle = make_oracle(tmp_path, "llama", peft.LoKrConfig(**options))
    (delta, _) = spectra.open_source(oracle.adapter)
    assert delta.max_rank == 2
    (spectrum, _) = spectra.decompose(spectra.open_source(oracle.adapter, oracle.base))
    assert spectrum.rank == 2


def test_a_recipe_survives_pickling_and_the_base_gives_its_norm(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.LoKrConfig(r=2, alpha=2, target_modules=["q_proj"]))
    delta = spectra.open_source(oracle.adapter, oracle.base).deltas[0]
    again = pickle.loads(pickle.dumps(delta)).read()
    assert torch.equal(again.to_dense(), delta.read().to_dense())
    assert again.base_norm > 0


def test_a_whole_one_dimensional_kernel_is_refused(tmp_path):
    config = peft.LoKrConfig(r=8, alpha=3, target_modules=["one", "two"])
    oracle = make_oracle(tmp_path, Convolutions(), config)
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert "multiply differently" in source.coverage.unsupported["one.weight"]
    assert torch.allclose(source["two.weight"].read().to_dense(), oracle.deltas["two.weight"], atol=1e-12)


def test_a_one_dimensional_effective_convolution_by_the_formula(tmp_path):
    # PEFT's merge stops with an error of torch.kron here.
    shapes = {"w1": (2, 3), "w2_a": (2, 4), "w2_b": (2, 5), "t2": (2, 2, 3, 1)}
    t = {slot: torch.randn(shape).double() for slot, shape in shapes.items()}
    write_adapter(tmp_path, {f"base_model.model.one.lokr_{slot}": tensor for slot, tensor in t.items()}, CONFIG)
    (delta,) = spectra.open_source(tmp_path)
    expected = torch.einsum("ac,pqkl,pb,qd->abcdkl", *(t[slot] for slot in ("w1", "t2", "w2_a", "w2_b")))
    assert torch.allclose(delta.read().to_dense(), 2.0 * expected.reshape(8, 45))


def test_a_core_without_a_kernel_is_a_matrix_between_the_factors(tmp_path):
    t = {slot: torch.randn(2, 2).double() for slot in ("w1", "w2_a", "w2_b", "t2")}
    write_adapter(tmp_path, {f"base_model.model.one.lokr_{slot}": tensor for slot, tensor in t.items()}, CONFIG)
    (delta,) = spectra.open_source(tmp_path)
    expected = 2.0 * torch.kron(t["w1"], t["w2_a"].T @ t["t2"] @ t["w2_b"])
    assert torch.allclose(delta.read().to_dense(), expected)


MODULE = "base_model.model.model.layers.{}.self_attn.q_proj"
CONFIG = {"peft_type": "LOKR", "r": 2, "alpha": 4}


def factors(layer=0, r=2):
    shapes = {"w1": (2, 3), "w2_a": (4, r), "w2_b": (r, 5)}
    return {f"{MODULE.format(layer)}.lokr_{slot}": torch.randn(shape) for slot, shape in shapes.items()}


def without(tensors, slot):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(slot)}


@pytest.mark.parametrize(
    ("mutate", "reason"),
    [
        (lambda t: without(t, "w2_b"), "lokr_w2_b is missing"),
        (lambda t: without(t, "w1"), "lokr_w1_a is missing"),
        (lambda t: t | {f"{MODULE.format(0)}.lokr_w2": torch.randn(4, 5)}, "both whole and as factors"),
        (lambda t: t | {f"{MODULE.format(0)}.lokr_w2_b": torch.randn(3, 5)}, "cannot be multiplied"),
        (lambda t: t | {f"{MODULE.format(0)}.lokr_w1": torch.randn(3)}, "not the shape of a matrix"),
        (lambda t: t | {f"{MODULE.format(0)}.lokr_w2_a": torch.randn(0)}, "has size 0"),
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "not as real numbers"),
        (lambda t: factors(r=3), "the config says r = 2"),
        (
            lambda t: (
                without(t, "w1")
                | {
                    f"{MODULE.format(0)}.lokr_w1_a": torch.randn(2, 1),
                    f"{MODULE.format(0)}.lokr_w1_b": torch.randn(1, 3),
                }
            ),
            "different ranks",
        ),
    ],
)
def test_a_module_that_cannot_be_read_is_refused_and_the_others_are_done(tmp_path, mutate, reason):
    write_adapter(tmp_path, factors(1) | mutate(factors()), CONFIG)
    source = spectra.open_source(tmp_path)
    assert reason in source.coverage.unsupported["model.layers.0.self_attn.q_proj.weight"]
    assert source["model.layers.1.self_attn.q_proj.weight"].read().shape == (8, 15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": True}, "r = True"),
        ({"alpha": float("nan")}, "alpha = nan"),
        ({"peft_type": "LOHA"}, "says peft_type 'LOHA', the tensors"),
    ],
)
def test_an_unusable_config_is_named(tmp_path, change, message):
    write_adapter(tmp_path, factors(), CONFIG | change)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(tmp_path)


def test_without_a_config_the_scale_is_asked_for(tmp_path):
    tensors = factors()
    write_adapter(tmp_path, tensors, None)
    with pytest.raises(SourceError, match="pass scale="):
        spectra.open_source(tmp_path)
    (delta,) = spectra.open_source(tmp_path, scale=0.5)
    w1, a, b = (tensors[name].double() for name in sorted(tensors))
    slow = torch.stack([torch.stack([w1[i // 4, j // 5] * (a @ b)[i % 4, j % 5] for j in range(15)]) for i in range(8)])
    assert torch.allclose(delta.read().to_dense(), 0.5 * slow)


def test_a_weight_of_another_shape_is_refused(tmp_path):
    write_adapter(tmp_path / "adapter", factors(), CONFIG)
    base = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(15, 8)}
    source = spectra.open_source(tmp_path / "adapter", write_checkpoint(tmp_path / "base", base))
    assert "[8, 15]" in source.coverage.shape_mismatch["model.layers.0.self_attn.q_proj.weight"]
