"""Adapters train: in a plain loop, in the Trainer, checkpointed, compiled, in mixed precision."""

from __future__ import annotations

import pytest
import torch
from adapted import CONFIGS, config_for, layer, logits, tokens, trained
from support.peft_oracle import tiny_model
from transformers import Trainer, TrainingArguments

from spectra.training import RLoRAConfig, inject_adapter, load_adapter, merge_adapter, save_adapter, unmerge_adapter
from spectra.training.inject import attached


@pytest.fixture
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fresh(name, **changes):
    torch.manual_seed(0)
    model = tiny_model("llama").float().train()
    return inject_adapter(model, config_for(name, **changes))


def gradients(model, ids=None):
    ids = tokens() if ids is None else ids
    model.zero_grad()
    torch.manual_seed(7)
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plain_loop_lowers_the_loss_and_leaves_the_base_alone(name):
    model = fresh(name)
    frozen = {key: t.clone() for key, t in model.state_dict().items() if ".adapter." not in key}
    offsets = {key: t.clone() for key, t in model.state_dict().items() if "offset" in key}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(30):
        loss = model(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    after = model.state_dict()
    assert all(torch.equal(after[key], t) for key, t in (frozen | offsets).items())
    for _, adapter in attached(model).values():
        if name != "multilora":
            assert not torch.equal(adapter.rlora_B[0], adapter.rlora_B[1])


@pytest.mark.parametrize("name", ["multilora", "rlora routed"])
def test_it_works_in_the_trainer(name, tmp_path):
    model = fresh(name)
    row = {"input_ids": tokens()[0], "labels": tokens()[0]}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        save_steps=1, seed=0, logging_steps=1, learning_rate=0.01, disable_tqdm=True,
    )  # fmt: skip
    before = {key: t.clone() for key, t in model.state_dict().items()}
    trainer = Trainer(model=model, args=arguments, train_dataset=[row] * 8)
    trainer.train()
    changed = {key for key, t in model.state_dict().items() if not torch.equal(before[key], t)}
    assert changed
    assert all(".adapter." in key and "offset" not in key for key in changed)
    # a run that continues from the Trainer's checkpoint ends where the uninterrupted one did
    again = fresh(name)
    Trainer(model=again, args=arguments, train_dataset=[row] * 8).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
    )
    torch.testing.assert_close(logits(again.eval()), logits(model.eval()), rtol=1e-6, atol=1e-7)
    save_adapter(again, tmp_path / "a")
    assert torch.equal(logits(load_adapter(tiny_model("llama").float(), tmp_path / "a")), logits(again))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["multilora", "rlora"])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    model = fresh(name, **({"dropout": 0.3} if name == "multilora" else {"head_dropout": 0.3}))
    for _, adapter in attached(model).values():
        if name == "multilora":
            torch.nn.init.ones_(adapter.multilora_scaling)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_layers_compute_the_same_without_a_graph_break(name):
    model = trained(layer(CONFIGS[name], dtype=torch.float32))
    x = torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=1e-2)
    compiled(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model[0].adapter.parameters())


@pytest.mark.usefixtures("_nothing_compiled")
def test_dropout_compiles():
    model = trained(layer(RLoRAConfig(2, 3, 4, head_dropout=0.5, use_router=True), dtype=torch.float32))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 8).expand(20, 8)
    assert len({round(float(row[0]), 6) for row in compiled(x).detach()}) > 10


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("name", ["multilora", "rlora"])
def test_a_model_that_was_compiled_before_notices_the_adapter(name):
    """torch.compile does not look at hooks: a layer that it knows without one must not be taken for it."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 6)).requires_grad_(False)
    x = torch.randn(5, 8)
    compiled = torch.compile(model, backend="eager")
    plain = compiled(x)
    inject_adapter(model, CONFIGS[name])
    torch.testing.assert_close(compiled(x), plain)
    adapted = trained(model)(x)
    assert not torch.allclose(adapted, plain, rtol=0.1)
    torch.testing.assert_close(compiled(x), adapted)
    merge_adapter(model)
    torch.testing.assert_close(compiled(x), adapted)
    unmerge_adapter(model)
    torch.testing.assert_close(compiled(x), adapted)


@pytest.mark.usefixtures("_nothing_compiled")
def test_a_whole_model_compiles_and_trains():
    model = fresh("rlora routed")
    expected = gradients(model)
    for key, value in gradients(torch.compile(model, backend="eager")).items():
        torch.testing.assert_close(value, expected[key.replace("_orig_mod.", "")], rtol=1e-4, atol=1e-6)


def test_data_parallel_wrappers_are_seen_through(tmp_path):
    model = fresh("multilora")
    save_adapter(model, tmp_path / "a")
    save_adapter(torch.nn.DataParallel(torch.compile(model, backend="eager")), tmp_path / "b")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()
