"""Injection: which layers, what is frozen, and what a model goes through afterwards."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from adapted import CONFIGS, TARGETS, adapted_model, config_for, layer, logits, tokens, trained
from support.peft_oracle import tiny_model
from torch import nn

from spectra.training import AdapterError, MultiLoRAConfig, inject_adapter, merge_adapter
from spectra.training.inject import attached


def targets(model, *patterns):
    return list(attached(inject_adapter(model, MultiLoRAConfig(1, 2, 1, target_modules=patterns))))


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_starts_at_the_base_and_only_the_adapter_trains(kind, name):
    model = tiny_model(kind)
    before, state = logits(model), set(model.state_dict())
    inject_adapter(model, config_for(name, kind))
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".adapter." in key for key in trainable)
    assert {key for key in model.state_dict() if ".adapter." not in key} == state
    trained(model)
    assert not torch.allclose(logits(model), before, rtol=1e-3)


def test_names_globs_and_regular_expressions_choose_layers():
    def llama():
        return tiny_model("llama")

    assert targets(llama(), "v_proj") == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    assert targets(llama(), "layers.1.self_attn.v_proj") == ["model.layers.1.self_attn.v_proj"]
    assert len(targets(llama(), "self_attn.*")) == 8
    assert len(targets(llama(), "model.layers.0.*")) == 7
    assert targets(llama(), r"re:layers\.1\..*(q|k)_proj$") == [f"model.layers.1.self_attn.{p}_proj" for p in "qk"]
    assert len(targets(llama(), "v_proj", "up_proj")) == 4
    assert len(targets(llama(), "all-linear")) == 14  # not lm_head
    assert targets(llama(), "lm_head") == ["lm_head"]
    assert len(targets(tiny_model("gpt2"), "all-linear")) == 8


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("w_proj", r"matches no module; the Linear and Conv1D layers are: q_proj \(2\)"),
        ("v_pro", "matches no module"),
        ("re:^v_proj", "matches no module"),
        ("re:(", "is not a regular expression"),
        ("self_attn", "means model.layers.0.self_attn, a LlamaAttention"),
        ("embed_tokens", "means model.embed_tokens, a Embedding"),
        ("*norm", "what can be adapted is"),
    ],
)
def test_a_target_that_means_nothing_is_an_error_that_lists_what_there_is(pattern, complaint):
    model = tiny_model("llama")
    with pytest.raises(AdapterError, match=complaint) as caught:
        targets(model, "v_proj", pattern)
    assert "\n" not in str(caught.value)
    assert not attached(model)
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing was touched


def test_a_second_injection_is_refused():
    model = layer(CONFIGS["multilora"])
    with pytest.raises(AdapterError, match="has adapters already, such as on 0"):
        inject_adapter(model, CONFIGS["rlora"])
    with pytest.raises(AdapterError, match="merged adapter that can be undone"):
        inject_adapter(merge_adapter(model), CONFIGS["rlora"])
    merge_adapter(layer_again := layer(CONFIGS["multilora"]), keep_base=False)
    inject_adapter(layer_again, CONFIGS["rlora"])


def test_an_r_larger_than_the_weight_is_refused_before_anything_is_allocated():
    with pytest.raises(AdapterError, match=r"r = 1000000000 is larger than both sides of 0 \(6, 8\)"):
        layer(MultiLoRAConfig(10**9, 3, 1))


def test_a_model_without_numbers_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(AdapterError, match="meta device"):
        inject_adapter(model, CONFIGS["multilora"])


def test_layers_whose_weight_is_read_behind_their_back():
    """torch's attention never calls out_proj; its encoder layer calls all its layers once a hook is there."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double().eval()
    with pytest.raises(AdapterError, match="never calls the layer"):
        targets(model, "out_proj")
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        assert targets(model, "all-linear") == ["linear1", "linear2"]
        torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(trained(model)(x), before)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(name, clone):
    model = adapted_model(name)
    twin = clone(model)
    assert torch.equal(logits(twin), logits(model))
    before = logits(model)
    trained(twin, seed=5)
    assert torch.equal(logits(model), before)
    changed = logits(twin)
    assert not torch.allclose(changed, before)
    merge_adapter(twin, heads=None if name in ("multilora", "rlora") else "mean")
    assert not attached(twin)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_state_dict_restores_a_model(name):
    model, other = adapted_model(name), inject_adapter(tiny_model("llama"), config_for(name))
    assert not torch.equal(logits(model), logits(other))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_models_and_autocast(name):
    """Adapters of a bf16 model are float32; the model's dtype is unchanged, and it trains."""
    model = trained(inject_adapter(tiny_model("llama").bfloat16(), config_for(name)))
    found = attached(model)
    assert {p.dtype for _, adapter in found.values() for p in adapter.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    model(tokens()).logits.float().square().mean().backward()
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    mixed = trained(inject_adapter(tiny_model("llama").float(), config_for(name)))
    exact = logits(mixed)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mixed(tokens()).logits
    torch.testing.assert_close(loss.float(), exact, rtol=0.1, atol=0.1)
    loss.float().square().mean().backward()
    for _, adapter in attached(mixed).values():
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_moves_between_devices_carry_the_adapter_along(name):
    model = layer(CONFIGS[name]).to("meta")
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert model(torch.empty(3, 8, device="meta", dtype=torch.float64)).shape == (3, 6)


def test_keyword_inputs_and_a_frozen_base_that_was_in_training_mode():
    model = trained(layer(CONFIGS["multilora"]))
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(model[0](input=x), model[0](x))
    assert model[0].adapter.training
    assert not model.eval()[0].adapter.training
