"""R-LoRA, HydraLoRA and kin in every layout, against ΔW = s·Σ_k ω_k·B_k·A written out entry by entry."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint

import spectra
from spectra.errors import SelectionError, SourceError

N, R, OUT, IN = 3, 2, 8, 16
NAME = "model.layers.0.self_attn.v_proj"
CONFIG = {"peft_type": "LORA", "r": R, "lora_alpha": 5, "lora_nums": N}
RLORA = {"peft_type": "RLORA", "r": R, "lora_alpha": 5, "num_heads": N}


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def heads_of(seed=0):
    torch.manual_seed(seed)
    return randn(R, IN), randn(N, OUT, R)


def delta(A, B, s, weights):
    found = torch.zeros(OUT, IN, dtype=torch.float64)
    for k, o, j, r in itertools.product(range(N), range(OUT), range(IN), range(R)):
        found[o, j] += s * weights[k] * B[k, o, r] * A[r, j]
    return found


def numbered(A, B, route=True):
    tensors = {"lora_A.weight": A} | {f"lora_B{k}.weight": B[k] for k in range(N)}
    return tensors | ({"lora_route.weight": randn(N, IN)} if route else {})


def packed(A, B):
    return {"lora_A.weight": A, "lora_B.weight": torch.cat(list(B), 1)}


def stacked(A, B, router="rlora_router"):
    return {"rlora_A": A, "rlora_B": B} | ({router: randn(N, IN)} if router else {})


LAYOUTS = {
    "numbered and routed": (numbered, CONFIG, True),
    "numbered": (lambda A, B: numbered(A, B, route=False), CONFIG, False),
    "numbered, uncounted": (numbered, {k: v for k, v in CONFIG.items() if k != "lora_nums"}, True),
    "packed": (packed, CONFIG, False),
    "stacked, routed": (stacked, RLORA, True),
    "stacked, routed by another name": (lambda A, B: stacked(A, B, "rlora_route"), RLORA, True),
    "stacked": (lambda A, B: stacked(A, B, None), RLORA, False),
}


def write(folder, tensors, config, name=NAME):
    return write_adapter(folder, {f"base_model.model.{name}.{k}": t for k, t in tensors.items()}, config)


def close(found, expected):
    actual = found.read().to_dense()
    assert found.shape == tuple(actual.shape) == tuple(expected.shape)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-13 * float(expected.norm()))
    assert torch.equal(pickle.loads(pickle.dumps(found)).read().to_dense(), actual)


@pytest.mark.parametrize("case", LAYOUTS)
def test_mean_sum_one_and_each_in_every_layout(case, tmp_path):
    layout, config, routed = LAYOUTS[case]
    A, B = heads_of()
    path = write(tmp_path / "adapter", layout(A, B), config)
    base = write_checkpoint(tmp_path / "base", llama_tensors())
    end = f"{N} routed heads, no static ΔW exists" if routed else f"{N} heads"
    for given, weights in (("mean", [1 / N] * N), ("sum", [1] * N)):
        source = spectra.open_source(path, base, heads=given)
        assert source.kind == "multihead"
        (found,) = source
        assert found.name == f"{NAME}.weight"
        assert found.max_rank == R
        assert found.note == f"{given} of {end}"
        close(found, delta(A, B, 5 / R, weights))
    apart = spectra.open_source(path, base, heads="each")
    for k, found in enumerate(apart):
        assert found.name == f"{NAME}.weight[head{k}]"
        assert found.note == f"head {k} of {end}"
        assert found.role == "v_proj"
        close(found, delta(A, B, 5 / R, [float(k == i) for i in range(N)]))
        assert list(spectra.open_source(path, base, heads=k)) == [found]
    assert len(apart) == N


@pytest.mark.parametrize("bad", [N, -1])
def test_a_head_that_is_not_there(bad, tmp_path):
    path = write(tmp_path, numbered(*heads_of()), CONFIG)
    with pytest.raises(SelectionError, match=f"heads 0 to {N - 1}; heads={bad}"):
        spectra.open_source(path, heads=bad)
    with pytest.raises(SelectionError, match="not one of mean, sum, each"):
        spectra.open_source(path, heads="all")


def test_the_offset_makes_the_update_relative_to_the_original_base(tmp_path):
    A, B = heads_of()
    A0, B0 = randn(R, IN), randn(OUT, R)
    tensors = stacked(A, B, None) | {"rlora_offset_A": A0, "rlora_offset_B": B0}
    path = write(tmp_path, tensors, RLORA)
    source = spectra.open_source(path)
    assert not any("compensated base" in warning for warning in source.coverage.warnings)
    taken = 5 / R * torch.einsum("or,ri->oi", B0, A0)
    close(source.deltas[0], delta(A, B, 5 / R, [1 / N] * N) - taken)
    assert source.deltas[0].max_rank == 2 * R
    for k, found in enumerate(spectra.open_source(path, heads="each")):
        close(found, delta(A, B, 5 / R, [float(k == i) for i in range(N)]) - taken)


def test_without_an_offset_the_base_may_be_a_compensated_one_and_that_is_said(tmp_path):
    source = spectra.open_source(write(tmp_path, numbered(*heads_of()), CONFIG))
    assert any("relative to the compensated base" in warning for warning in source.coverage.warnings)


def test_the_users_scale_wins_because_foreign_configs_are_not_to_be_trusted(tmp_path):
    A, B = heads_of()
    source = spectra.open_source(write(tmp_path, numbered(A, B), CONFIG), scale=0.25)
    close(source.deltas[0], delta(A, B, 0.25, [1 / N] * N))
    assert any("s = 0.25 as given" in warning for warning in source.coverage.warnings)


def test_without_a_config_the_scale_must_be_given(tmp_path):
    A, B = heads_of()
    path = write(tmp_path, numbered(A, B), None)
    with pytest.raises(SourceError, match=r"pass scale= \(--scale\)"):
        spectra.open_source(path)
    close(spectra.open_source(path, scale=2.0).deltas[0], delta(A, B, 2.0, [1 / N] * N))


@pytest.mark.parametrize(
    ("options", "s"), [({"use_rslora": True}, 5 / R**0.5), ({"alpha_pattern": {"v_proj": 3}}, 3 / R)]
)
def test_the_configs_scale(options, s, tmp_path):
    A, B = heads_of()
    source = spectra.open_source(write(tmp_path, numbered(A, B), CONFIG | options))
    close(source.deltas[0], delta(A, B, s, [1 / N] * N))


FORK = {"peft_type": "RLORA", "r": R, "rlora_alpha": 5, "num_heads": N, "init_seed": 0, "init_gamma": 64.0}


def test_a_forks_offset_that_is_drawn_again_is_refused_by_name(tmp_path):
    tensors = {name.replace("router", "router.weight"): tensor for name, tensor in stacked(*heads_of()).items()}
    (bad,) = spectra.open_source(write(tmp_path, tensors, FORK | {"init_weights": True}))
    assert bad.status == "unsupported"
    assert "drawn again from init_seed = 0" in bad.reason
    assert "give the merged model as tuned" in bad.reason
    (default,) = spectra.open_source(write(tmp_path, tensors, FORK))
    assert default.reason == bad.reason


def test_the_forks_heads_that_started_at_zero_are_read_by_its_own_alpha(tmp_path):
    A, B = heads_of()
    source = spectra.open_source(write(tmp_path, stacked(A, B), FORK | {"init_weights": False}))
    close(source.deltas[0], delta(A, B, 5 / R, [1 / N] * N))


def test_the_mean_of_a_fused_projection_comes_in_parts(tmp_path):
    name = "transformer.h.0.attn.c_attn"
    A, B = randn(R, 4), randn(N, 12, R)
    base = write_checkpoint(tmp_path / "base", {f"{name}.weight": randn(4, 12)}, config={"model_type": "gpt2"})
    path = write(tmp_path / "adapter", stacked(A, B), RLORA, name)
    whole = 5 / R * B.mean(0) @ A
    for part, rows in zip(spectra.open_source(path, base), whole.chunk(3), strict=True):
        close(part, rows)


def change(layout, **changes):
    tensors = layout(*heads_of()) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "config", "word"),
    [
        (change(numbered, lora_A__weight=None), CONFIG, "shared A (r, in) is missing"),
        (change(numbered, lora_B1__weight=None), CONFIG, "the heads [0, 2] are not 0 to 3"),
        (change(numbered, lora_B2__weight=None), CONFIG, "the heads [0, 1] are not 0 to 3"),
        (change(numbered, lora_B1__weight=randn(OUT, R + 1)), CONFIG, "do not fit A"),
        (change(numbered, lora_B1__weight=randn(OUT + 1, R)), CONFIG, "do not fit A"),
        (change(numbered, lora_A__weight=torch.ones(R, IN, dtype=torch.uint8)), CONFIG, "not stored as real numbers"),
        (change(numbered), CONFIG | {"r": R + 1}, "the config says r = 3"),
        (change(packed), CONFIG | {"lora_nums": N + 1}, "are not (out, 4·2)"),
        (change(packed, lora_B__weight=None), CONFIG, "are not (out, 3·2)"),
        (change(stacked, rlora_B=randn(OUT, R)), RLORA, "are not (N, out, r)"),
        (change(stacked, rlora_B=randn(N + 1, OUT, R)), RLORA, "with N = 3"),
        (change(stacked, rlora_A=None), RLORA, "shared A (r, in) is missing"),
        (change(stacked, rlora_offset_A=randn(R, IN)), RLORA, "one factor of the offset is missing"),
        (change(stacked, rlora_offset_A=randn(R, IN - 1), rlora_offset_B=randn(OUT, R)), RLORA, "do not fit the heads"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused(tensors, config, word, tmp_path):
    source = spectra.open_source(write(tmp_path, tensors, config))
    (bad,) = source
    assert (bad.name, bad.status) == (f"{NAME}.weight", "unsupported")
    assert word in bad.reason
    assert bad.name in source.coverage.unsupported


def test_the_other_modules_are_done(tmp_path):
    A, B = heads_of()
    names = ("model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj")
    tensors = {f"base_model.model.{names[0]}.{k}": t for k, t in change(numbered, lora_A__weight=None).items()}
    tensors |= {f"base_model.model.{names[1]}.{k}": t for k, t in numbered(A, B).items()}
    source = spectra.open_source(write_adapter(tmp_path, tensors, CONFIG))
    assert source[f"{names[0]}.weight"].status == "unsupported"
    close(source[f"{names[1]}.weight"], delta(A, B, 5 / R, [1 / N] * N))


def test_a_head_that_is_cut_off_makes_its_module_unreadable_and_never_fewer_heads(tmp_path):
    """Two heads of three would be a number: the third one's bytes are missing at the end of the file."""
    config = {key: value for key, value in CONFIG.items() if key != "lora_nums"}
    folder = write(tmp_path, numbered(*heads_of(), route=False), config)
    path = folder / "adapter_model.safetensors"
    header = path.read_bytes()
    path.write_bytes(header[:-8])
    (bad,) = spectra.open_source(folder)
    assert bad.status == "unreadable"
    assert "truncated" in bad.reason


def test_saved_weights_and_biases_beside_the_heads(tmp_path):
    tensors = {f"base_model.model.{NAME}.{k}": t for k, t in numbered(*heads_of()).items()}
    tensors |= {"base_model.model.lm_head.weight": randn(32, 16), "base_model.model.norm.bias": randn(4)}
    folder = tmp_path / "adapter"
    folder.mkdir()
    source = spectra.open_source(
        write_adapter(folder, tensors, CONFIG), write_checkpoint(tmp_path / "b", llama_tensors())
    )
    assert {found.name for found in source} == {f"{NAME}.weight", "lm_head.weight"}
    assert "norm.bias" in source.coverage.skipped
