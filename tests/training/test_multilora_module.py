"""MultiLoRA has the properties that its paper gives it (Wang et al. 2023)."""

from __future__ import annotations

import math

import pytest
import torch
from adapted import CONFIGS, layer, trained

from spectra.training import AdapterError, MultiLoRA, MultiLoRAConfig


def small_products(adapter: MultiLoRA, x: torch.Tensor) -> torch.Tensor:
    """The definition, one module at a time."""
    total = torch.zeros(*x.shape[:-1], adapter.out_features, dtype=x.dtype)
    for A, B, s in zip(adapter.multilora_A, adapter.multilora_B, adapter.multilora_scaling, strict=True):
        total += (x @ A.T @ B.T) * s
    return adapter.config.alpha / adapter.config.r * total


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8), (0, 8)])
def test_two_products_equal_n_small_ones(shape):
    adapter = trained(layer(CONFIGS["multilora"]))[0].adapter
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(adapter(x), small_products(adapter, x), rtol=1e-12, atol=1e-12)


def test_the_factors_are_the_forward_pass_and_bound_the_rank():
    adapter = trained(layer(CONFIGS["multilora"], out=12, into=10))[0].adapter
    left, right = adapter.factors()
    assert (left.shape, right.shape) == ((12, 6), (6, 10))
    assert torch.linalg.matrix_rank(left @ right) == 6  # n·r
    x = torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(adapter(x), x @ (left @ right).T, rtol=1e-12, atol=1e-12)
    with pytest.raises(AdapterError, match="its modules add up"):
        adapter.factors("mean")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_starts_at_the_base_bit_for_bit(training, dtype):
    model = layer(MultiLoRAConfig(2, 3, 5, dropout=0.5), dtype=dtype).train(training)
    x = torch.randn(4, 8).to(dtype)
    base = torch.nn.functional.linear(x, model[0].weight, model[0].bias)
    assert torch.equal(model(x), base)
    assert model(x).dtype == dtype


def test_only_the_scalings_get_a_gradient_at_the_first_step():
    model = layer(CONFIGS["multilora"])
    model(torch.randn(4, 8, dtype=torch.float64)).square().sum().backward()
    adapter = model[0].adapter
    assert not adapter.multilora_A.grad.any()
    assert not adapter.multilora_B.grad.any()
    assert (adapter.multilora_scaling.grad != 0).all()
    assert model[0].weight.grad is None
    assert model[0].bias.grad is None


def test_a_and_b_start_kaiming_uniform_and_differ_between_modules():
    adapter = layer(MultiLoRAConfig(16, 3, 1), out=400, into=300, dtype=torch.float32)[0].adapter
    for stack, fan_in in ((adapter.multilora_A, 300), (adapter.multilora_B, 16)):
        bound = 1 / math.sqrt(fan_in)  # kaiming_uniform with a = √5
        for matrix in stack.detach():
            assert float(matrix.abs().max()) == pytest.approx(bound, rel=0.01)
            assert float(matrix.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert abs(float(matrix.mean())) < 0.05 * bound
        flat = torch.nn.functional.normalize(stack.detach().flatten(1), dim=1)
        assert float((flat @ flat.T - torch.eye(3)).abs().max()) < 0.1
    assert not adapter.multilora_scaling.any()


def test_alpha_over_r_scales_the_update():
    one, three = (trained(layer(MultiLoRAConfig(2, 3, alpha)))[0].adapter for alpha in (2, 6))
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(3 * one(x), three(x), rtol=1e-12, atol=0)


def test_dropout_is_on_in_training_only_and_keeps_the_mean():
    model = trained(layer(MultiLoRAConfig(2, 3, 4, dropout=0.25)))
    x = torch.randn(1, 8, dtype=torch.float64)
    still = model.eval()(x)
    assert torch.equal(still, model(x))
    many = model.train()(x.expand(40000, 8))
    assert not torch.equal(many[0], many[1])
    spread = many.std(0) / math.sqrt(40000)
    assert ((many.mean(0) - still[0]).abs() < 5 * spread).all()


def test_it_learns_a_matrix_of_rank_n_times_r():
    torch.manual_seed(0)
    goal = torch.randn(6, 4, dtype=torch.float64) @ torch.randn(4, 8, dtype=torch.float64) * 0.2
    model = layer(MultiLoRAConfig(2, 2, 2))
    x = torch.randn(64, 8, dtype=torch.float64)
    wanted = (model(x) + x @ goal.T).detach()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(400):
        loss = (model(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]
