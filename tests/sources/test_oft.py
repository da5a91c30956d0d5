"""OFT against PEFT's own merge, the series of older versions against its definition, and what is refused."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.adapters import (
    assert_needs_the_base,
    assert_one_is_refused,
    assert_recipes_keep_their_laws,
    cast,
    damaged,
    reshaped,
)
from support.checkpoints import write_adapter
from support.peft_oracle import assert_matches, make_oracle, save_model, tiny_model

import spectra
from spectra.errors import SourceError, UnsupportedFormatError

ON = {"target_modules": ["q_proj", "down_proj"]}


class Square(torch.nn.Module):
    """A convolution with a square kernel, the kind whose inputs PEFT rotates, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.two = torch.nn.Conv2d(4, 6, 3)
        self.linear = torch.nn.Linear(6, 8)
        self.double()


CASES = {
    "default series": ("llama", {"oft_block_size": 4, **ON}),
    "exact": ("llama", {"oft_block_size": 4, "use_cayley_neumann": False, **ON}),
    "by number of blocks": ("llama", {"r": 2, "oft_block_size": 0, **ON}),
    "odd blocks": ("bert", {"oft_block_size": 3, "target_modules": ["output.dense"]}),
    "adjusted size": ("llama", {"oft_block_size": 5, **ON}),
    "shared block": ("llama", {"oft_block_size": 8, "block_share": True, "use_cayley_neumann": False, **ON}),
    "embedding": ("llama", {"oft_block_size": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "convolution": (Square, {"oft_block_size": 6, "target_modules": ["two", "linear"]}),
    **{
        f"series of {terms}": ("llama", {"oft_block_size": 4, "num_cayley_neumann_terms": terms, **ON})
        for terms in (2, 3, 4, 6, 9)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge_minus_base(case, tmp_path):
    kind, options = CASES[case]
    oracle = make_oracle(tmp_path, kind if isinstance(kind, str) else kind(), peft.OFTConfig(**options))
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == "oft"
    assert oracle.deltas
    assert_matches(source, oracle.deltas)
    assert_recipes_keep_their_laws(source, oracle.base)
    assert not source.coverage.unsupported
    assert not source.coverage.tuned_only


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("eps", [0.5, 1e3])
def test_a_constrained_rotation(tmp_path, share, eps):
    # PEFT takes √n of the n blocks in float32, so its radius is off by up to 2⁻²⁴ of itself.
    config = peft.OFTConfig(oft_block_size=4, coft=True, eps=eps, block_share=share, **ON)
    oracle = make_oracle(tmp_path, "llama", config)
    assert_matches(spectra.open_source(oracle.adapter, oracle.base), oracle.deltas, 2**-23)


def test_one_term_is_no_rotation(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=1, **ON))
    assert not oracle.deltas
    found = list(spectra.decompose(spectra.open_source(oracle.adapter, oracle.base)))
    assert {spectrum.status for spectrum in found} == {"unchanged"}


@pytest.mark.parametrize("version", [None, "0.17.1", "0.17.0.dev0@abcdef"])
def test_before_0_18_the_last_power_counts_twice(tmp_path, version):
    oracle = make_oracle(tmp_path, "llama", peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]))
    damaged(oracle.adapter, config={"peft_version": version})
    base, angles = load_file(oracle.base / "model.safetensors"), load_file(oracle.adapter / "adapter_model.safetensors")
    source = spectra.open_source(oracle.adapter, oracle.base)
    for delta in source:
        stored = angles[f"base_model.model.{delta.name.removesuffix('.weight')}.oft_R.weight"]
        expected = []
        for n, row in enumerate(stored):
            Q = torch.zeros(4, 4, dtype=torch.float64)
            for value, (i, j) in zip(row, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], strict=True):
                Q[i, j], Q[j, i] = value, -value
            R = torch.eye(4).double() + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + 2 * Q @ Q @ Q @ Q
            columns = base[delta.name][:, 4 * n : 4 * n + 4]
            expected.append(columns @ R.T - columns)
        assert torch.allclose(delta.read().to_dense(), torch.cat(expected, 1), rtol=0, atol=1e-14)
        assert "before 0.18" in delta.note
        assert not torch.allclose(delta.read().to_dense(), oracle.deltas[delta.name], atol=1e-3)


def test_a_fused_projection_comes_in_parts(tmp_path):
    # PEFT rotates no Conv1D, so the whole is the formula's: W₀Rᵀ − W₀ with W₀ in Linear orientation.
    save_model(tmp_path / "base", tiny_model("gpt2"))
    angle = 0.7
    name = "base_model.model.transformer.h.0.attn.c_attn.oft_R.weight"
    stored = torch.full((8, 1), math.tan(angle / 2), dtype=torch.float64)
    config = {"peft_type": "OFT", "use_cayley_neumann": False, "block_share": False, "coft": False, "oft_block_size": 2}
    write_adapter(tmp_path / "adapter", {name: stored}, config)
    W = load_file(tmp_path / "base" / "model.safetensors")["transformer.h.0.attn.c_attn.weight"].T
    cos, sin = math.cos(angle), math.sin(angle)
    R = torch.block_diag(*[torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)] * 8)
    expected = W @ R.T - W
    for part, delta in zip("qkv", spectra.open_source(tmp_path / "adapter", tmp_path / "base"), strict=True):
        assert delta.name == f"transformer.h.0.attn.c_attn.weight[{part}]"
        start = "qkv".index(part) * 16
        assert torch.allclose(delta.read().to_dense(), expected[start : start + 16], rtol=0, atol=1e-14)


@pytest.fixture
def oracle(tmp_path):
    return make_oracle(tmp_path, "llama", peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]))


def test_it_needs_the_base(oracle):
    assert_needs_the_base(oracle.adapter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cast(torch.int32, "oft_R.weight"), "not as real numbers"),
        (reshaped("oft_R.weight", 4, 5), "no rows of a triangle's entries"),
        (reshaped("oft_R.weight", 24), "no rows of a triangle's entries"),
        (reshaped("oft_R.weight", 3, 6), "does not turn 16 inputs in blocks of 4"),
        (reshaped("oft_R.weight", 2, 28), "the config says oft_block_size = 4"),
        (lambda t: t | {"oft_embedding_R.weight": torch.ones(4, 6)}, "both oft_R and oft_embedding_R"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(oracle, change, reason):
    damaged(oracle.adapter, change)
    assert_one_is_refused(spectra.open_source(oracle.adapter, oracle.base), reason)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_cayley_neumann": None}, "use_cayley_neumann = None"),
        ({"block_share": "yes"}, "block_share = 'yes'"),
        ({"num_cayley_neumann_terms": 10**9}, "not believable"),
        ({"num_cayley_neumann_terms": 2.5}, "num_cayley_neumann_terms = 2.5"),
        ({"peft_version": "soon"}, "is no version"),
        ({"coft": True, "eps": float("nan")}, "eps = nan"),
        ({"peft_type": "BOFT"}, "the config says peft_type 'BOFT'"),
    ],
)
def test_an_unusable_config_is_named(oracle, config, message):
    damaged(oracle.adapter, config=config)
    with pytest.raises(SourceError, match=message):
        spectra.open_source(oracle.adapter, oracle.base)


def test_without_a_config_nothing_is_guessed(oracle):
    (oracle.adapter / "adapter_config.json").unlink()
    with pytest.raises(SourceError, match=r"no adapter_config\.json"):
        spectra.open_source(oracle.adapter, oracle.base)


def test_a_config_without_its_tensors(tmp_path):
    write_adapter(tmp_path, {"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, {"peft_type": "OFT"})
    with pytest.raises(SourceError, match="says peft_type 'OFT'"):
        spectra.open_source(tmp_path)


def test_the_first_parametrisation_is_refused_by_name(tmp_path):
    write_adapter(tmp_path, {"base_model.model.a.oft_r": torch.ones(2, 4, 4)}, {"peft_type": "OFT"})
    with pytest.raises(UnsupportedFormatError, match=r"an OFT of PEFT before 0\.16"):
        spectra.open_source(tmp_path)


def test_listing_reads_no_tensor(oracle, monkeypatch):
    def fail(*_):
        raise AssertionError("read")

    monkeypatch.setattr("spectra.files.tensors.TensorRef.read", fail)
    assert len(spectra.open_source(oracle.adapter, oracle.base)) == 2
    assert json.loads((oracle.adapter / "adapter_config.json").read_text())["peft_type"] == "OFT"
