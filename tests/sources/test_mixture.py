"""Several pairs per module: each format's definition written out, and what is not certain refused."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch
from support.checkpoints import write_adapter, write_checkpoint

import spectra
from spectra.errors import SelectionError, SourceError, UnsupportedFormatError

N, R, OUT, IN, TASKS, D = 3, 2, 8, 16, 4, 5
NAME = "model.layers.0.mlp.up_proj"
CONFIG = {"peft_type": "LORA", "r": R, "lora_alpha": 5}
S = 5 / R


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def pairs():
    torch.manual_seed(0)
    return randn(N, R, IN), randn(N, OUT, R)


def delta(A, B, weights, s=S):
    found = torch.zeros(OUT, IN, dtype=torch.float64)
    for i, o, j, r in itertools.product(range(N), range(OUT), range(IN), range(A.shape[1])):
        found[o, j] += s * weights[i] * B[i, o, r] * A[i, r, j]
    return found


def one(i):
    return [float(i == k) for k in range(N)]


def write(folder, tensors, config=CONFIG, prefix="base_model.model."):
    return write_adapter(folder, {f"{prefix}{NAME}.{key}": tensor for key, tensor in tensors.items()}, config)


def close(found, expected, tolerance=1e-13):
    actual = found.read().to_dense()
    assert found.status == "ok", found.reason
    assert found.shape == tuple(actual.shape) == tuple(expected.shape)
    assert torch.allclose(actual, expected, rtol=0, atol=tolerance * float(expected.norm()))
    assert torch.equal(pickle.loads(pickle.dumps(found)).read().to_dense(), actual)
    assert torch.linalg.matrix_rank(actual) <= found.max_rank


def refused(source, word):
    (found,) = source
    assert found.status == "unsupported"
    assert word in found.reason, found.reason
    assert found.name in source.coverage.unsupported


def apart(path, count, expected, noun, **options):
    """Each member by itself, by index and all of them."""
    source = spectra.open_source(path, heads="each", **options)
    assert source.kind == "mixture"
    assert [found.name for found in source] == [f"{NAME}.weight[head{i}]" for i in range(count)]
    for i, found in enumerate(source):
        close(found, expected[i])
        assert found.note == f"number {i} of {count} {noun}"
        assert list(spectra.open_source(path, heads=i, **options)) == [found]
    with pytest.raises(SelectionError, match=f"0 to {count - 1}; heads={count}"):
        spectra.open_source(path, heads=count, **options)


def loramoe(A, B):
    tensors = {f"lora_A{i}.weight": A[i] for i in range(N)} | {f"lora_B{i}.weight": B[i] for i in range(N)}
    return tensors | {"lora_route.weight": randn(N, IN)}


def test_loramoe(tmp_path):
    A, B = pairs()
    path = write(tmp_path / "adapter", loramoe(A, B), CONFIG | {"lora_nums": N})
    base = write_checkpoint(tmp_path / "base", {f"{NAME}.weight": randn(OUT, IN)})
    routed = "routed experts, no static ΔW exists"
    for heads, weight in (("mean", 1 / N), ("sum", 1)):
        (found,) = spectra.open_source(path, base, heads=heads)
        close(found, delta(A, B, [weight] * N))
        assert found.note == f"{heads} of {N} {routed}"
        assert found.read().base_norm is not None
    apart(path, N, [delta(A, B, one(i)) for i in range(N)], routed)


def moelora(A, B, embedding, gate, alias=True):
    """Every expert under both of its names, as the authors' nn.Module registers it."""
    tensors = {"lora_task_embedding.default.weight": embedding, "lora_gate.default.GateL.weight": gate}
    for e in range(N):
        for side, stack in (("A", A), ("B", B)):
            tensors[f"lora_{side}.default.lora{side}.{e}.mlp.weight"] = stack[e]
            if alias:
                tensors[f"lora_{side}.default.lora{side}.{e}.weight"] = stack[e].clone()
    return tensors


@pytest.mark.parametrize("alias", [True, False])
def test_moelora_per_task(alias, tmp_path):
    A, B = pairs()
    embedding, gate = randn(TASKS, D), randn(N, D)
    config = CONFIG | {"peft_type": "MMOELORA", "r": N * R, "expert_num": N}
    path = write(tmp_path, moelora(A, B, embedding, gate, alias), config)
    expected = []
    for task in range(TASKS):
        logits = [sum(float(gate[e, d] * embedding[task, d]) for d in range(D)) for e in range(N)]
        total = sum(math.exp(logit) for logit in logits)
        expected.append(delta(A, B, [math.exp(logit) / total for logit in logits], 5 / (N * R)))
    apart(path, TASKS, expected, "tasks")
    refused(spectra.open_source(path), "every task weighs the experts its own way (MOELoRA): pass heads=")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"lora_gate.default.GateL.weight": None}, "experts' weights are unknown"),
        ({"lora_gate.default.GateL.weight": randn(N, D + 1)}, "does not fit 3 experts"),
        ({"lora_task_embedding.default.weight": randn(0, D)}, "does not fit 3 experts"),
        ({"lora_A.default.loraA.1.mlp.weight": None}, "are not 0, 1"),
        ({"lora_A.default.loraA.1.mlp.weight": randn(R, IN + 1)}, "no equal pairs"),
    ],
)
def test_a_moelora_that_does_not_fit(change, word, tmp_path):
    tensors = moelora(*pairs(), randn(TASKS, D), randn(N, D), alias=False) | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    refused(spectra.open_source(write(tmp_path, tensors, CONFIG | {"r": N * R}), heads=0), word)


def mtl(diagonal=True, single=False):
    torch.manual_seed(1)
    count = 1 if single else N
    middle = randn(TASKS, R) if diagonal else randn(TASKS, R, R)
    factors = {"lora_A": randn(1, R, IN), "lora_B": randn(count, OUT, R)}
    return factors | {"lora_lambdas": middle, "lora_B_w": randn(TASKS, count)}


def mtl_delta(t, task, temperature, s):
    weights = [math.exp(float(w) / temperature) for w in t["lora_B_w"][task]]
    mixed = sum(w / sum(weights) * B for w, B in zip(weights, t["lora_B"], strict=True))
    middle = t["lora_lambdas"][task]
    middle = torch.diag(middle) if middle.ndim == 1 else middle
    return s * mixed @ middle @ t["lora_A"][0]


@pytest.mark.parametrize("diagonal", [True, False])
def test_mtl_lora_per_task(diagonal, tmp_path):
    tensors = mtl(diagonal)
    path = write(tmp_path, tensors, CONFIG | {"B_scale": 0.5})
    apart(path, TASKS, [mtl_delta(tensors, task, 0.5, S) for task in range(TASKS)], "tasks")
    assert spectra.open_source(path, heads=0).deltas[0].max_rank == R
    refused(spectra.open_source(path), "its own mixture of B and its own Λ (MTL-LoRA): pass heads=")


def test_mtl_lora_without_its_temperature(tmp_path):
    """Not needed for one B, whose weight is 1 whatever it is."""
    refused(spectra.open_source(write(tmp_path / "many", mtl(), CONFIG), heads=0), "as B_scale")
    tensors = mtl(single=True)
    path = write(tmp_path / "single", tensors, None, prefix="")
    (found,) = spectra.open_source(path, heads=2, scale=0.7)
    close(found, mtl_delta(tensors, 2, 1.0, 0.7))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"lora_lambdas": None}, "lora_lambdas of this MTL-LoRA is missing"),
        ({"lora_B_w": randn(TASKS, N + 1)}, "do not fit"),
        ({"lora_B_w": randn()}, "do not fit"),
        ({"lora_B_w": randn(0, N), "lora_lambdas": randn(0, R)}, "do not fit"),
        ({"lora_A": randn()}, "do not fit"),
        ({"lora_lambdas": randn(TASKS, R + 1)}, "do not fit"),
        ({"lora_A": randn(1, R + 1, IN)}, "do not fit"),
        ({"lora_B": torch.ones(N, OUT, R, dtype=torch.int32)}, "stored as I32"),
    ],
)
def test_an_mtl_lora_that_does_not_fit(change, word, tmp_path):
    tensors = {name: tensor for name, tensor in (mtl() | change).items() if tensor is not None}
    refused(spectra.open_source(write(tmp_path, tensors, CONFIG | {"B_scale": 0.5}), heads=0), word)


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_a_temperature_that_is_none(temperature, tmp_path):
    refused(
        spectra.open_source(write(tmp_path, mtl(), CONFIG | {"B_scale": temperature}), heads=0), "is no temperature"
    )


def test_mixlora_per_expert_and_its_attention_at_once(tmp_path):
    A, B = pairs()
    torch.manual_seed(2)
    attention = {"lora_A.weight": randn(R, IN), "lora_B.weight": randn(IN, R)}
    tensors = {f"mixlora.layers.0.self_attn.q_proj.{key}": tensor for key, tensor in attention.items()}
    for e in range(N):
        tensors |= {f"mixlora.layers.0.mlp.up_proj.experts.{e}.lora_{k}.weight": t[e] for k, t in (("A", A), ("B", B))}
    tensors["mixlora.layers.0.mlp.moe_gate.weight"] = randn(N, IN)
    path = write_adapter(tmp_path / "adapter", tensors, CONFIG | {"peft_type": "MIXLORA"})
    weights = {f"{NAME}.weight": randn(OUT, IN), "model.layers.0.self_attn.q_proj.weight": randn(IN, IN)}
    base = write_checkpoint(tmp_path / "base", weights)
    for heads in ("mean", "each"):
        source = spectra.open_source(path, base, heads=heads)
        plain = source["model.layers.0.self_attn.q_proj.weight"]
        close(plain, S * attention["lora_B.weight"] @ attention["lora_A.weight"])
        assert plain.note == ""
        assert "a router's weight" in source.coverage.skipped["mixlora.layers.0.mlp.moe_gate.weight"]
    for e in range(N):
        found = spectra.open_source(path, base, heads=e)[f"{NAME}.weight[head{e}]"]
        close(found, delta(A, B, one(e)))
        assert found.note == f"number {e} of {N} experts of the MLP"
    assert "a router mixes what comes out of them" in spectra.open_source(path, base)[f"{NAME}.weight"].reason


@pytest.mark.parametrize("config", [CONFIG, None])
def test_stacked_pairs_without_a_scaling_must_be_told_what_they_are(config, tmp_path):
    A, B = pairs()
    path = write(tmp_path, {"lora_A": A, "lora_B": B}, config, prefix="")
    options = {} if config else {"scale": S}
    refused(spectra.open_source(path, **options), "may be particles, of which one is drawn, or modules that add up")
    refused(spectra.open_source(path, heads="mean", **options), "or sum")
    (found,) = spectra.open_source(path, heads="sum", **options)
    close(found, delta(A, B, [1] * N))
    apart(path, N, [delta(A, B, one(i)) for i in range(N)], "stacked pairs", **options)


@pytest.mark.parametrize("lone", ["lora_A", "lora_B"])
def test_a_factor_that_is_alone_in_its_module(lone, tmp_path):
    A, B = pairs()
    tensors = {f"{NAME}.lora_A": A, f"{NAME}.lora_B": B, f"model.layers.1.mlp.up_proj.{lone}": randn(N, R, R)}
    source = spectra.open_source(write_adapter(tmp_path, tensors, CONFIG), heads="sum")
    assert source[f"{NAME}.weight"].status == "ok"
    assert f"{lone} of model.layers.1.mlp.up_proj are no pair" in source["model.layers.1.mlp.up_proj.weight"].reason


def test_several_a_with_one_b_are_refused_by_name(tmp_path):
    A, B = pairs()
    tensors = {f"lora_A{i}.weight": A[i] for i in range(N)} | {"lora_B.weight": B[0]}
    with pytest.raises(UnsupportedFormatError, match="ALoRA"):
        spectra.open_source(write(tmp_path, tensors))


def test_dora_over_several_pairs_is_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedFormatError, match="several pairs per module under DoRA"):
        spectra.open_source(write(tmp_path, loramoe(*pairs()), CONFIG | {"use_dora": True}))


def test_without_a_config_the_scale_must_be_given(tmp_path):
    A, B = pairs()
    path = write(tmp_path, loramoe(A, B), None)
    with pytest.raises(SourceError, match=r"pass scale= \(--scale\)"):
        spectra.open_source(path)
    close(spectra.open_source(path, scale=2.0).deltas[0], delta(A, B, [1 / N] * N, 2.0))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"lora_A1.weight": None}, "members [0, 2] of lora_A"),
        ({"lora_B2.weight": None}, "3 A and 2 B"),
        ({"lora_A1.weight": randn(R + 1, IN)}, "no equal pairs"),
        ({f"lora_A{i}.weight": randn(R + 1, IN) for i in range(N)}, "cannot be multiplied"),
        ({"lora_A0.weight": torch.ones(R, IN, dtype=torch.int8)}, "stored as I8"),
    ],
)
def test_a_loramoe_that_does_not_fit(change, word, tmp_path):
    tensors = {name: tensor for name, tensor in (loramoe(*pairs()) | change).items() if tensor is not None}
    refused(spectra.open_source(write(tmp_path, tensors)), word)


def test_a_rank_that_contradicts_the_config(tmp_path):
    refused(spectra.open_source(write(tmp_path, loramoe(*pairs()), CONFIG | {"r": R + 1})), "the config says r = 3")


def test_a_number_of_experts_that_contradicts_the_config(tmp_path):
    source = spectra.open_source(write(tmp_path, loramoe(*pairs()), CONFIG | {"lora_nums": N + 1}))
    refused(source, "the config says 4 experts, the file has 3")


@pytest.mark.parametrize("with_base", [True, False])
def test_moslora_is_a_lora_with_a_mixer(with_base, tmp_path):
    torch.manual_seed(3)
    A, M, B = randn(R, IN), randn(R, R), randn(OUT, R)
    path = write(tmp_path / "adapter", {"lora_A.weight": A, "lora_AB.weight": M, "lora_B.weight": B})
    base = write_checkpoint(tmp_path / "base", {f"{NAME}.weight": randn(OUT, IN)}) if with_base else None
    expected = torch.zeros(OUT, IN, dtype=torch.float64)
    for o, p, q in itertools.product(range(OUT), range(R), range(R)):
        expected[o] += S * B[o, p] * M[p, q] * A[q]
    (found,) = spectra.open_source(path, base)
    close(found, expected)
    assert found.factored
    bad = write(tmp_path / "bad", {"lora_A.weight": A, "lora_AB.weight": randn(R, R + 1), "lora_B.weight": B})
    refused(spectra.open_source(bad), "lora_AB [2, 3]")
