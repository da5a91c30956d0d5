"""Merging changes the weights and not the function, and can be undone bit for bit."""

from __future__ import annotations

import pytest
import torch
from adapted import CONFIGS, TARGETS, adapted_model, config_for, layer, logits, trained
from support.peft_oracle import tiny_model
from torch import nn

from spectra.training import AdapterError, inject_adapter, merge_adapter, unmerge_adapter
from spectra.training.inject import attached

UNROUTED = ["multilora", "rlora"]


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", UNROUTED)
def test_merged_computes_the_same_and_is_a_plain_model(kind, name):
    model = adapted_model(name, kind)
    adapted, plain = logits(model), tiny_model(kind)
    assert merge_adapter(model) is model
    torch.testing.assert_close(logits(model), adapted, rtol=1e-9, atol=1e-11)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("name", UNROUTED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_every_bit_of_base_and_adapter(name, dtype):
    model = trained(inject_adapter(tiny_model("gpt2").to(dtype), config_for(name, "gpt2")))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(3):
        merge_adapter(model)
        assert any(not torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
        assert unmerge_adapter(model) is model
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_unmerged_model_trains_on():
    model = unmerge_adapter(merge_adapter(layer(CONFIGS["multilora"])))
    model(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    assert model[0].adapter.multilora_scaling.grad.any()
    assert not model[0].weight.requires_grad


def test_merging_rounds_once():
    model = trained(layer(CONFIGS["multilora"], dtype=torch.bfloat16))
    left, right = model[0].adapter.factors()
    wanted = (model[0].weight.double() + left @ right).bfloat16()
    assert torch.equal(merge_adapter(model)[0].weight, wanted)


@pytest.mark.parametrize("name", ["rlora routed", "hydralora"])
def test_routed_heads_are_merged_only_by_a_named_definition(name):
    model = trained(layer(CONFIGS[name]))
    base, adapter = model[0].weight.clone(), model[0].adapter
    with pytest.raises(AdapterError, match="0: 3 routed heads have no one ΔW: name a definition"):
        merge_adapter(model)
    assert attached(model)
    for heads in ("mean", "sum", 0, 2):
        expected = base + torch.matmul(*adapter.factors(heads))
        torch.testing.assert_close(merge_adapter(model, heads=heads)[0].weight.detach(), expected, rtol=0, atol=1e-14)
        unmerge_adapter(model)
    with pytest.raises(AdapterError, match="heads = 3 is none of"):
        merge_adapter(model, heads=3)


def test_merging_without_a_copy_cannot_be_undone():
    model = merge_adapter(layer(CONFIGS["rlora"]), keep_base=False)
    assert "merged_adapter" not in vars(model[0])
    with pytest.raises(AdapterError, match="merged with keep_base=False"):
        unmerge_adapter(model)


def test_nothing_to_merge_is_an_error():
    with pytest.raises(AdapterError, match="no adapter to merge"):
        merge_adapter(nn.Linear(2, 2))
    with pytest.raises(AdapterError, match="no adapter is merged"):
        unmerge_adapter(layer(CONFIGS["rlora"]))


def test_a_diverged_adapter_is_not_merged_and_nothing_is_changed():
    model = adapted_model("multilora")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    _, last = list(attached(model).values())[-1]
    with torch.no_grad():
        last.multilora_B[0, 0, 0] = torch.nan
    with pytest.raises(AdapterError, match="NaN or infinite"):
        merge_adapter(model)
    after = model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == [
        "model.layers.1.mlp.down_proj.adapter.multilora_B"
    ]


def test_a_tied_weight_is_not_merged():
    model = tiny_model("gpt2")  # lm_head and wte are one tensor
    inject_adapter(model, config_for("multilora", "gpt2"))
    merge_adapter(model, keep_base=False)
    from spectra.training import MultiLoRAConfig

    inject_adapter(model, MultiLoRAConfig(1, 1, 1, target_modules=["lm_head"]))
    with pytest.raises(AdapterError, match=r"lm_head.weight is tied to transformer.wte.weight"):
        merge_adapter(model)


def test_a_quantised_weight_is_not_merged():
    model = layer(CONFIGS["rlora"], dtype=torch.float32)
    model[0].weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"stored as torch.uint8.*dequantise"):
        merge_adapter(model)
