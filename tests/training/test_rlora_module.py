"""R-LoRA and its baseline have the properties that their papers give them (Liu et al. 2025)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from adapted import CONFIGS, layer, trained
from torch.nn.functional import linear

from spectra.training import AdapterError, RLoRA, RLoRAConfig

KINDS = [name for name in CONFIGS if name != "multilora"]


def one_head_at_a_time(adapter: RLoRA, x: torch.Tensor) -> torch.Tensor:
    """The definition."""
    total = torch.zeros(*x.shape[:-1], adapter.out_features, dtype=x.dtype)
    weights = torch.full((*x.shape[:-1], adapter.config.num_heads), 1 / adapter.config.num_heads, dtype=x.dtype)
    if adapter.rlora_router is not None:
        weights = torch.softmax(x @ adapter.rlora_router.T, -1)
    for k, B in enumerate(adapter.rlora_B):
        total += weights[..., k : k + 1] * (x @ adapter.rlora_A.T @ B.T)
    if adapter.rlora_offset_A is not None:
        total -= x @ adapter.rlora_offset_A.T @ adapter.rlora_offset_B.T
    root = adapter.config.init == "released"
    return adapter.config.alpha / (adapter.config.r**0.5 if root else adapter.config.r) * total


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [(8,), (2, 5, 8), (0, 8)])
def test_forward_equals_the_definition(name, shape):
    adapter = trained(layer(CONFIGS[name]))[0].adapter
    x = torch.randn(shape, dtype=torch.float64)
    # the router works in float32 whatever x is
    tolerance = 1e-6 if adapter.rlora_router is not None else 1e-12
    torch.testing.assert_close(adapter(x), one_head_at_a_time(adapter, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["rlora", "hydralora"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_starts_at_the_base_bit_for_bit(name, training, dtype):
    model = layer(CONFIGS[name], dtype=dtype).train(training)
    x = torch.randn(4, 8).to(dtype)
    assert torch.equal(model(x), linear(x, model[0].weight, model[0].bias))


def test_training_starts_at_the_base_with_a_router_and_in_evaluation_with_dropout():
    model = layer(RLoRAConfig(2, 3, 4, head_dropout=0.5, use_router=True)).eval()
    x = torch.randn(4, 8, dtype=torch.float64)
    base = linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model(x), base, rtol=1e-7, atol=1e-7)
    many = model.train()(x[:1].expand(40000, 8))
    assert ((many.mean(0) - base[0]).abs() < 5 * many.std(0) / math.sqrt(40000)).all()


@pytest.mark.parametrize("use_router", [True, False])
def test_head_dropout_keeps_the_mean_and_is_off_in_evaluation(use_router):
    model = trained(layer(RLoRAConfig(2, 3, 4, head_dropout=0.25, use_router=use_router)))
    x = torch.randn(1, 8, dtype=torch.float64)
    still = model.eval()(x)
    assert torch.equal(still, model(x))
    many = model.train()(x.expand(40000, 8))
    assert ((many.mean(0) - still[0]).abs() < 5 * many.std(0) / math.sqrt(40000)).all()


def test_a_and_every_head_get_a_gradient_at_the_first_step():
    model = layer(CONFIGS["rlora routed"])
    model(torch.randn(4, 8, dtype=torch.float64)).square().sum().backward()
    adapter = model[0].adapter
    assert adapter.rlora_A.grad.any()
    assert all(head.any() for head in adapter.rlora_B.grad)
    assert adapter.rlora_router.grad.any()
    assert model[0].weight.grad is None
    assert {name for name, _ in adapter.named_parameters()} == {"rlora_A", "rlora_B", "rlora_router"}


def test_of_the_baseline_the_heads_alone_get_a_gradient_and_the_router_makes_them_differ():
    model = layer(CONFIGS["hydralora"])
    model(torch.randn(4, 8, dtype=torch.float64)).square().sum().backward()
    adapter = model[0].adapter
    assert not adapter.rlora_A.grad.any()
    assert not adapter.rlora_router.grad.any()
    assert all(not torch.allclose(a, b) for a, b in pairwise(adapter.rlora_B.grad))


def test_the_random_start_has_the_papers_distribution_and_heads_differ():
    out, into, gamma = 400, 300, 64
    adapter = layer(RLoRAConfig(8, 4, 1, gamma=gamma), out=out, into=into, dtype=torch.float32)[0].adapter
    size = out**0.25 / math.sqrt(gamma)
    for matrix, fan in ((adapter.rlora_A.detach(), into), *((head, out) for head in adapter.rlora_B.detach())):
        sigma = size / math.sqrt(fan)
        assert float(matrix.std()) == pytest.approx(sigma, rel=0.06)
        assert abs(float(matrix.mean())) < 0.1 * sigma
        assert float((matrix / sigma).pow(4).mean()) == pytest.approx(3, rel=0.2)  # normal, not uniform (1.8)
    flat = torch.nn.functional.normalize(adapter.rlora_B.detach().flatten(1), dim=1)
    assert float((flat @ flat.T - torch.eye(4)).abs().max()) < 0.1
    assert torch.equal(adapter.rlora_offset_A, adapter.rlora_A)
    assert torch.equal(adapter.rlora_offset_B, adapter.rlora_B.mean(0))


def released_slowly(out, into, r, heads, gamma):
    """`reinit.py` of the authors' repository, line by line: the loop scales everything anew for every head."""
    t = r**0.25 / gamma**0.5
    A = torch.randn(r, into) / max(r, into) ** 0.5
    B = [torch.zeros(out, r) for _ in range(heads)]
    for i in range(heads):
        B[i] = torch.randn(out, r) / max(out, r) ** 0.5
        A *= t
        for k in range(heads):
            B[k] *= t
    return A, torch.stack(B)


@pytest.mark.parametrize(("out", "into", "r", "heads", "gamma"), [(400, 300, 8, 4, 64), (40, 500, 64, 3, 16)])
def test_the_released_start_is_the_authors_loop(out, into, r, heads, gamma):
    config = RLoRAConfig(r, heads, 1, gamma=gamma, use_router=True, init="released")
    adapter = layer(config, out=out, into=into, dtype=torch.float32)[0].adapter
    A, B = released_slowly(out, into, r, heads, gamma)
    assert float(adapter.rlora_A.detach().norm()) == pytest.approx(float(A.norm()), rel=0.1)
    for mine, theirs in zip(adapter.rlora_B.detach(), B, strict=True):
        assert float(mine.norm()) == pytest.approx(float(theirs.norm()), rel=0.25)
    norms = adapter.rlora_B.detach().flatten(1).norm(dim=1)
    t = r**0.25 / gamma**0.5
    assert (norms[:-1] / norms[1:]).tolist() == pytest.approx([t] * (heads - 1), rel=0.35)
    assert adapter.rlora_router.any()
    assert torch.equal(adapter.rlora_offset_A, adapter.rlora_A)
    assert torch.equal(adapter.rlora_offset_B, adapter.rlora_B.mean(0))


@pytest.mark.parametrize(
    ("out", "into", "r", "heads", "least", "most"),
    [
        (768, 768, 64, 3, 30, 60),
        (896, 4864, 4, 5, 20_000, 45_000),  # fine-tuning.sh: the down projection of Qwen2.5-0.5B
        (896, 896, 8, 3, 100, 1_000),
    ],
)
def test_the_released_start_is_smaller_than_the_papers(out, into, r, heads, least, most):
    norms = {}
    for init in ("paper", "released"):
        config = RLoRAConfig(r, heads, 1, use_router=True, init=init)
        adapter = layer(config, out=out, into=into, dtype=torch.float32)[0].adapter
        norms[init] = float((adapter.rlora_offset_B @ adapter.rlora_offset_A).norm())
    size, t = out**0.25 / 8, r**0.25 / 8
    mean = math.sqrt(sum(t ** (2 * (heads - k)) for k in range(heads))) / heads
    assert norms["paper"] == pytest.approx(size**2 * math.sqrt(r / heads), rel=0.2)
    assert norms["released"] == pytest.approx(t**heads * mean * math.sqrt(r), rel=0.2)
    assert least < norms["paper"] / norms["released"] < most


def test_the_released_start_with_its_random_router_is_near_the_base_and_no_farther_than_its_heads():
    config = RLoRAConfig(2, 3, 4, head_dropout=0.0, use_router=True, init="released")
    model = layer(config)
    x = torch.randn(50, 8, dtype=torch.float64)
    base = linear(x, model[0].weight, model[0].bias)
    adapter = model[0].adapter
    A = adapter.rlora_A.detach()
    largest = max(float((config.scale * head @ A).norm()) for head in adapter.rlora_B.detach())
    away = (model(x) - base).norm(dim=-1)
    assert away.max() > 0
    assert bool((away <= 2 * largest * x.norm(dim=-1)).all())


def test_the_baseline_starts_with_zero_heads_and_no_offset():
    adapter = layer(CONFIGS["hydralora"], out=40, into=30)[0].adapter
    assert not adapter.rlora_B.any()
    assert set(adapter.state_dict()) == {"rlora_A", "rlora_B", "rlora_router"}
    assert float(adapter.rlora_A.detach().abs().max()) <= 1 / math.sqrt(30)


def test_every_head_has_a_dropout_mask_of_its_own():
    """Heads that write to rows of their own show what each of them saw of A·x."""
    config = RLoRAConfig(4, 3, 12, head_dropout=0.5)
    adapter = layer(config, out=12, into=8)[0].adapter
    with torch.no_grad():
        adapter.rlora_B.zero_()
        for head in range(3):
            adapter.rlora_B[head, 4 * head : 4 * head + 4] = torch.eye(4)
        adapter.rlora_offset_B.zero_()
        seen = adapter(torch.randn(2000, 8, dtype=torch.float64)).reshape(2000, 3, 4) != 0
    assert float(seen.double().mean()) == pytest.approx(0.5, abs=0.02)
    for one, other in ((0, 1), (0, 2), (1, 2)):  # independent coins agree half of the time
        assert float((seen[:, one] == seen[:, other]).double().mean()) == pytest.approx(0.5, abs=0.03)


def test_the_baselines_dropout_is_one_for_all_heads():
    adapter = layer(RLoRAConfig.hydralora(4, 3, 12, dropout=0.5, use_router=False), out=12, into=8)[0].adapter
    with torch.no_grad():
        for head in range(3):
            adapter.rlora_B[head, 4 * head : 4 * head + 4] = torch.eye(4)
        seen = adapter(torch.randn(50, 8, dtype=torch.float64)).reshape(50, 3, 4)
    assert torch.allclose(seen[:, 0], seen[:, 1])
    assert torch.allclose(seen[:, 0], seen[:, 2])


def test_rank_is_at_most_r_around_the_compensated_base_and_2r_around_the_original():
    adapter = trained(layer(CONFIGS["rlora"], out=12, into=10))[0].adapter
    left, right = adapter.factors()
    offset = adapter.config.scale * adapter.rlora_offset_B @ adapter.rlora_offset_A
    assert torch.linalg.matrix_rank(left @ right) == 4
    assert torch.linalg.matrix_rank(left @ right + offset) == 2
    heads = [torch.matmul(*adapter.factors(k)) for k in range(3)]
    assert torch.linalg.matrix_rank(heads[0] - heads[1]) == 2
    torch.testing.assert_close(sum(heads) / 3, left @ right)
    torch.testing.assert_close(torch.matmul(*adapter.factors("sum")), sum(heads) + 2 * offset)
    bare = trained(layer(CONFIGS["hydralora"], out=12, into=10))[0].adapter
    assert torch.linalg.matrix_rank(torch.matmul(*bare.factors("mean"))) == 2


@pytest.mark.parametrize("heads", [3, -1, True, 1.0, "each", "max"])
def test_a_head_that_is_not_there_is_refused(heads):
    with pytest.raises(AdapterError, match="is none of 'mean', 'sum' and 0 to 2"):
        layer(CONFIGS["rlora"])[0].adapter.factors(heads)


def test_the_router_works_in_float32_under_autocast_and_in_bf16():
    adapter = trained(layer(CONFIGS["rlora routed"], dtype=torch.float32))[0].adapter
    x = torch.randn(4, 8)
    exact = adapter.routing(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter.routing(x), exact)
    adapter.to(torch.bfloat16)
    assert adapter.routing(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(adapter.routing(x).sum(-1), torch.ones(4))


def test_alpha_over_r_scales_the_update():
    one, three = (trained(layer(RLoRAConfig(2, 3, a, head_dropout=0.0)))[0].adapter for a in (2, 6))
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(3 * one(x), three(x), rtol=1e-10, atol=1e-12)
