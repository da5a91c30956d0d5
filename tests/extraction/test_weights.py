"""Whole weights from parts and sums from summands: recipes that keep a recipe's laws, in factors where they can be."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from support.peft_oracle import make_oracle, tiny_model

import spectra
from spectra.deltas.forms import Dense, LowRank
from spectra.extraction.inputs import inputs_of
from spectra.extraction.weights import join_factors


def blocks(given, factors=None):
    return [block.delta for weight in inputs_of(given, factors).gathered.weights for block in weight.blocks]


@pytest.fixture
def fused(tmp_path):
    """A GPT-2 of which the fused projection was adapted, in its parts and as stored: adapter and full weights."""
    config = peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)
    oracle = make_oracle(tmp_path / "made", "gpt2", config)
    tiny_model("gpt2", 3).save_pretrained(tmp_path / "tuned")
    return {
        (kind, split): spectra.open_source(tuned, oracle.base, split=split)
        for kind, tuned in (("lora", oracle.adapter), ("checkpoint", tmp_path / "tuned"))
        for split in (True, False)
    }


@pytest.mark.parametrize("kind", ["lora", "checkpoint"])
def test_parts_make_the_whole_that_was_not_split(kind, fused):
    joined, stored = blocks(fused[kind, True]), blocks(fused[kind, False])
    assert [delta.name for delta in joined] == [delta.name for delta in stored]
    for one, other in zip(joined, stored, strict=True):
        form = pickle.loads(pickle.dumps(one)).read()
        assert isinstance(form, LowRank if one.factored else Dense)
        assert one.factored == other.factored
        assert torch.equal(form.to_dense(), other.read().to_dense())
        if one.factored:
            assert form.left.shape[1] == one.max_rank == 3  # the parts share A: the whole is no wider


@pytest.mark.parametrize("split", [True, False])
def test_sums_are_in_factors_where_every_summand_is(split, fused):
    lora, full = fused["lora", split], fused["checkpoint", split]
    assert all(delta.factored for delta in blocks([lora, lora], [1.0, 2.0]))
    for delta in blocks([lora, lora], [1.0, 2.0]):
        assert delta.max_rank == 6
        (single,) = (one for one in blocks(lora) if one.name == delta.name)
        assert torch.allclose(delta.read().to_dense(), 3 * single.read().to_dense())
    mixed = [delta for delta in blocks([lora, full]) if delta.name.endswith("c_attn.weight")]
    assert len(mixed) == 2
    for delta in mixed:
        assert not pickle.loads(pickle.dumps(delta)).factored
        expected = sum(one.read().to_dense() for side in (lora, full) for one in blocks(side) if one.name == delta.name)
        assert torch.allclose(delta.read().to_dense(), expected)


def test_parts_of_fewer_rows_than_the_rank_do_not_limit_the_whole(tmp_path):
    config = peft.LoraConfig(r=16, target_modules=["query_key_value"])  # parts of 8 rows each, 24 together
    oracle = make_oracle(tmp_path / "made", tiny_model_of_narrow_heads(), config)
    (one, _) = blocks(spectra.open_source(oracle.adapter, oracle.base))
    assert one.shape == (24, 32)
    assert one.max_rank == 16


def tiny_model_of_narrow_heads():
    import transformers

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 8}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=8, **sizes)).double()
    for layer in model.gpt_neox.layers:
        layer.attention.query_key_value = torch.nn.Linear(32, 24).double()
    return model


def test_the_norm_of_the_base_is_not_read(fused, monkeypatch):
    monkeypatch.setattr("spectra.deltas.base.BaseWeight.read", lambda *_: pytest.fail("W₀ was read"))
    for delta in blocks(fused["lora", True]):
        delta.read()


def test_parts_with_factors_of_their_own_stand_side_by_side():
    torch.manual_seed(0)
    forms = [LowRank(torch.randn(2, 3).double(), torch.randn(3, 5).double()) for _ in range(2)]
    whole = join_factors((5, 5), forms, [torch.tensor([3, 0]), torch.tensor([1, 4])], shared=False)
    expected = torch.zeros(5, 5).double()
    expected[[3, 0]], expected[[1, 4]] = (form.to_dense() for form in forms)
    assert whole.left.shape == (5, 6)
    assert torch.allclose(whole.to_dense(), expected)


def test_rounding_adds_up_to_a_bound(fused):
    deltas = blocks([fused["checkpoint", False]] * 2, [3.0, -4.0])
    for delta in deltas:
        edge, whole = delta.read().noise_edge, blocks(fused["checkpoint", False])
        (single,) = (one.read().noise_edge for one in whole if one.name == delta.name)
        assert edge == pytest.approx(5 * single)
