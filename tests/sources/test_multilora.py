"""MultiLoRA in both layouts against ΔW = s·Σᵢ diag(sᵢ)·Bᵢ·Aᵢ written out entry by entry."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint

import spectra
from spectra.errors import SelectionError, SourceError

N, R, OUT, IN = 3, 2, 8, 16
NAME = "model.layers.0.self_attn.v_proj"
CONFIG = {"peft_type": "MULTILORA", "r": R, "num_modules": N, "lora_alpha": 5, "target_modules": ["v_proj"]}


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def stacks(scaling=(N, OUT), seed=0):
    torch.manual_seed(seed)
    return {"A": randn(N, R, IN), "B": randn(N, OUT, R), "scaling": randn(*scaling)}


def delta(parts, s, modules=range(N)):
    """One entry at a time; a scalar scaling is for all outputs."""
    scaling = parts["scaling"].reshape(N, -1).expand(N, OUT)
    found = torch.zeros(OUT, IN, dtype=torch.float64)
    for i, o, j, r in itertools.product(modules, range(OUT), range(IN), range(R)):
        found[o, j] += s * scaling[i, o] * parts["B"][i, o, r] * parts["A"][i, r, j]
    return found


def ours(folder, parts, config=CONFIG, name=NAME):
    return write_adapter(folder, {f"base_model.model.{name}.multilora_{k}": t for k, t in parts.items()}, config)


def public(folder, parts, prefix="", name=NAME):
    """The only public implementation's layout: one torch file of a state dict, no config."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({f"{prefix}{name}.lora_{k}": t for k, t in parts.items()}, folder / "adapter.bin")
    return folder / "adapter.bin"


def close(found, expected):
    actual = found.read().to_dense()
    assert found.shape == tuple(actual.shape) == tuple(expected.shape)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-13 * float(expected.norm()))
    assert torch.equal(pickle.loads(pickle.dumps(found)).read().to_dense(), actual)


@pytest.mark.parametrize("scaling", [(N,), (N, 1), (N, OUT)])
@pytest.mark.parametrize("with_base", [True, False])
def test_our_layout(scaling, with_base, tmp_path):
    parts = stacks(scaling)
    base = write_checkpoint(tmp_path / "base", llama_tensors()) if with_base else None
    source = spectra.open_source(ours(tmp_path / "adapter", parts), base)
    assert source.kind == "multilora"
    (found,) = source
    assert found.name == f"{NAME}.weight"
    assert found.factored
    assert found.max_rank == N * R
    close(found, delta(parts, 5 / R))
    weight = load_file(base / "model.safetensors")[found.name].double().norm() if base else None
    assert found.read().base_norm == (pytest.approx(float(weight)) if base else None)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_public_layout_takes_its_scale_from_the_user(prefix, tmp_path):
    parts = stacks()
    path = public(tmp_path, parts, prefix)
    with pytest.raises(SourceError, match=r"pass scale= \(--scale\), which is 1 if it was trained with α = r"):
        spectra.open_source(path)
    (found,) = spectra.open_source(path, scale=0.5)
    assert found.name == f"{NAME}.weight"
    close(found, delta(parts, 0.5))


def test_a_scale_beside_a_config_is_ignored_aloud(tmp_path):
    parts = stacks()
    source = spectra.open_source(ours(tmp_path, parts), scale=9.0)
    close(source.deltas[0], delta(parts, 5 / R))
    assert any("scale was ignored" in warning for warning in source.coverage.warnings)


@pytest.mark.parametrize(
    ("options", "s"), [({"use_rslora": True}, 5 / R**0.5), ({"alpha_pattern": {"v_proj": 3}}, 3 / R)]
)
def test_the_configs_scale(options, s, tmp_path):
    parts = stacks()
    close(spectra.open_source(ours(tmp_path, parts, CONFIG | options)).deltas[0], delta(parts, s))


def test_each_module_apart_and_together(tmp_path):
    parts = stacks()
    path = ours(tmp_path, parts)
    for heads in ("mean", "sum"):  # they add up: there is one ΔW whatever it is called
        close(spectra.open_source(path, heads=heads).deltas[0], delta(parts, 5 / R))
    apart = spectra.open_source(path, heads="each")
    assert [found.name for found in apart] == [f"{NAME}.weight[module{i}]" for i in range(N)]
    for i, found in enumerate(apart):
        close(found, delta(parts, 5 / R, [i]))
        assert found.max_rank == R
        assert found.note == f"module {i} of {N} alone"
        (one,) = spectra.open_source(path, heads=i)
        assert one == found
    with pytest.raises(SelectionError, match=f"modules 0 to {N - 1}, not {N}"):
        spectra.open_source(path, heads=N)
    with pytest.raises(SelectionError, match="not -1"):
        spectra.open_source(path, heads=-1)


def test_a_fused_projection_comes_in_parts(tmp_path):
    name = "transformer.h.0.attn.c_attn"
    torch.manual_seed(0)
    parts = {"A": randn(N, R, 4), "B": randn(N, 12, R), "scaling": randn(N, 12)}
    base = write_checkpoint(tmp_path / "base", {f"{name}.weight": randn(4, 12)}, config={"model_type": "gpt2"})
    path = ours(tmp_path / "adapter", parts, name=name)
    whole = sum(2.5 * parts["scaling"][i][:, None] * (parts["B"][i] @ parts["A"][i]) for i in range(N))
    for part, rows in zip(spectra.open_source(path, base), whole.chunk(3), strict=True):
        close(part, rows)
    (found,) = spectra.open_source(path, base, split=False)
    close(found, whole)


def change(**changes):
    parts = stacks() | changes
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


@pytest.mark.parametrize(
    ("parts", "config", "word"),
    [
        (change(A=None), {}, "A is missing"),
        (change(B=None), {}, "B is missing"),
        (change(scaling=None), {}, "scaling is missing"),
        (change(A=randn(N, R + 1, IN)), {}, "are not (n, r, in), (n, out, r)"),
        (change(A=randn(R, IN)), {}, "are not (n, r, in), (n, out, r)"),
        (change(B=randn(N - 1, OUT, R)), {}, "are not (n, r, in), (n, out, r)"),
        (change(scaling=randn(N, OUT + 1)), {}, "the scaling [3, 9] in"),
        (change(scaling=randn(1)), {}, "is none of"),
        (change(A=torch.ones(N, R, IN, dtype=torch.int16)), {}, "not as real numbers"),
        (stacks(), {"r": R + 1}, "the config says r = 3"),
        (stacks(), {"num_modules": N + 1}, "is no stack of 4"),
        (
            {"A": randn(0, R, IN), "B": randn(0, OUT, R), "scaling": randn(0, OUT)},
            {"num_modules": 0},
            "is no stack of 0",
        ),
    ],
)
def test_a_module_that_cannot_be_read_is_refused_and_the_others_are_done(parts, config, word, tmp_path):
    other = "model.layers.1.self_attn.v_proj"
    tensors = {f"base_model.model.{NAME}.multilora_{k}": t for k, t in parts.items()}
    good = {} if config else {f"base_model.model.{other}.multilora_{k}": t for k, t in stacks().items()}
    source = spectra.open_source(write_adapter(tmp_path, tensors | good, CONFIG | config))
    assert [found.status for found in source if found.name != f"{NAME}.weight"] == ["ok"] * bool(good)
    bad = source[f"{NAME}.weight"]
    assert bad.status == "unsupported"
    assert word in bad.reason
    assert bad.name in source.coverage.unsupported


@pytest.mark.parametrize(
    ("options", "message"), [({"r": 0}, "r = 0"), ({"lora_alpha": float("nan")}, "lora_alpha = nan")]
)
def test_an_unusable_config_is_named(options, message, tmp_path):
    with pytest.raises(SourceError, match=message):
        spectra.open_source(ours(tmp_path, stacks(), CONFIG | options))


def test_what_lies_beside_the_stacks_is_accounted_for(tmp_path):
    tensors = {f"base_model.model.{NAME}.multilora_{k}": t for k, t in stacks().items()}
    tensors |= {"base_model.model.lm_head.weight": randn(32, 16), "base_model.model.lm_head.bias": randn(32)}
    source = spectra.open_source(write_adapter(tmp_path, tensors, CONFIG))
    assert "pass base= (--base)" in source.coverage.skipped["lm_head.weight"]
    assert source.coverage.skipped["lm_head.bias"] == "a bias, not a matrix"
