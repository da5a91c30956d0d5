"""MLX adapters against mlx-lm's `fuse` written out: which way the factors lie, what s is, and what is refused."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.examples import write_mlx

import spectra
from spectra.errors import BaseRequiredError, SourceError

LAYER = "model.layers.0.self_attn.q_proj"
TODAY = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}


def factors(module=LAYER, seed=0, shapes=((16, 2), (2, 16)), names=("lora_a", "lora_b")):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.{name}": torch.randn(shape, generator=generator) for name, shape in zip(names, shapes, strict=True)
    }


def product(tensors):
    a, b = (tensor.double() for tensor in tensors.values())
    return (a @ b).T


def close(found, expected):
    assert found.status == "ok", found.reason
    assert torch.allclose(found.read().to_dense(), expected, rtol=0, atol=1e-12 * float(expected.norm()))


@pytest.mark.parametrize(
    ("config", "s"),
    [
        (TODAY, 20),
        ({"lora_parameters": {"rank": 2, "scale": 3}}, 3),  # mlx-swift, mlx-vlm
        (TODAY | {"lora_parameters": {"rank": 2, "alpha": 16, "scale": 10.0}}, 10),  # written until 2025, and not used
        ({"lora_layers": 16, "lora_parameters": {"rank": 2, "alpha": 16, "scale": 10.0}}, 80),  # spring of 2024
        ({"lora_layers": 16, "use_dora": False, "lora_parameters": {"rank": 2, "alpha": 2, "scale": 10.0}}, 10),
    ],
)
def test_s_is_what_the_trainer_of_that_time_took(config, s, tmp_path):
    tensors = factors()
    source = spectra.open_source(write_mlx(tmp_path, tensors, config))
    assert source.kind == "mlx"
    close(source[f"{LAYER}.weight"], s * product(tensors))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "no adapter_config.json beside it"),
        ({"fine_tune_type": "lora"}, "no lora_parameters.scale"),
        ({"lora_parameters": {"rank": 2, "scale": "20"}}, "no lora_parameters.scale"),
        ({"lora_layers": 4, "use_dora": False, "lora_parameters": {"rank": 2, "alpha": 16, "scale": 10.0}}, "10 or 80"),
    ],
)
def test_an_unknown_s_is_a_refusal_until_it_is_given(config, words, tmp_path):
    tensors = factors()
    folder = write_mlx(tmp_path, tensors, config)
    with pytest.raises(SourceError, match=rf"{words}.*: pass scale= \(--scale\)"):
        spectra.open_source(folder)
    close(spectra.open_source(folder, scale=0.5)[f"{LAYER}.weight"], product(tensors) / 2)


def test_a_given_s_beside_a_certain_one_is_ignored_aloud(tmp_path):
    tensors = factors()
    source = spectra.open_source(write_mlx(tmp_path, tensors, TODAY), scale=3)
    close(source[f"{LAYER}.weight"], 20 * product(tensors))
    assert any("scale was ignored" in warning for warning in source.coverage.warnings)


def test_mlx_vlms_first_names_took_alpha_alone_and_later_divided_it(tmp_path):
    tensors = factors(names=("A", "B"))
    folder = write_mlx(tmp_path / "a", tensors, {"rank": 2, "alpha": 0.1, "dropout": 0.1})
    with pytest.raises(SourceError, match=r"0.05 or 0.1"):
        spectra.open_source(folder)
    close(spectra.open_source(folder, scale=0.1)[f"{LAYER}.weight"], 0.1 * product(tensors))


def test_numbered_checkpoints_are_not_the_adapter_unless_named(tmp_path):
    tensors, earlier = factors(), factors(seed=1)
    (write_mlx(tmp_path, earlier, None) / "adapters.safetensors").rename(tmp_path / "0000100_adapters.safetensors")
    write_mlx(tmp_path, tensors, TODAY)
    source = spectra.open_source(tmp_path)
    close(source[f"{LAYER}.weight"], 20 * product(tensors))
    assert any("left out 0000100_adapters.safetensors" in warning for warning in source.coverage.warnings)
    one = spectra.open_source(tmp_path / "0000100_adapters.safetensors")
    close(one[f"{LAYER}.weight"], 20 * product(earlier))


PARTS = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}


def _experts_base(folder, layout):
    """Three experts as files of transformers keep them, apart or fused, and as MLX stacks them."""
    torch.manual_seed(0)
    weights = {part: torch.randn(3, *shape) for part, shape in PARTS.items()}
    names, kind = {}, "qwen3_moe"
    mlp = "model.layers.0.mlp"
    if layout == "apart":
        tensors = {f"{mlp}.experts.{e}.{part}.weight": w[e] for part, w in weights.items() for e in range(3)}
        names = {(part, e): f"{mlp}.experts.{e}.{part}.weight" for part in PARTS for e in range(3)}
    elif layout == "numbered":
        kind, mlp = "mixtral", "model.layers.0.block_sparse_moe"
        words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        names = {(part, e): f"{mlp}.experts.{e}.{words[part]}.weight" for part in PARTS for e in range(3)}
        tensors = {name: weights[part][e] for (part, e), name in names.items()}
    elif layout == "fused":
        both = torch.cat([weights["gate_proj"], weights["up_proj"]], 1)
        tensors = {f"{mlp}.experts.gate_up_proj": both, f"{mlp}.experts.down_proj": weights["down_proj"]}
        for e in range(3):
            names |= {(f"{half}_proj", e): f"{mlp}.experts.gate_up_proj[{e}][{half}]" for half in ("gate", "up")}
            names["down_proj", e] = f"{mlp}.experts.down_proj[{e}]"
    else:
        tensors = {f"{mlp}.switch_mlp.{part}.weight": w for part, w in weights.items()}
        names = {(part, e): f"{mlp}.switch_mlp.{part}.weight[{e}]" for part in PARTS for e in range(3)}
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    return write_checkpoint(folder, tensors, config={"model_type": kind}), mlp, names, weights


@pytest.mark.parametrize("layout", ["apart", "numbered", "fused", "mlx"])
def test_every_expert_is_the_bases_expert_whatever_its_layout(layout, tmp_path):
    base, mlp, names, weights = _experts_base(tmp_path / "base", layout)
    tensors = {}
    for seed, (part, (rows, columns)) in enumerate(PARTS.items()):
        tensors |= factors(f"{mlp}.switch_mlp.{part}", seed, ((3, 2, columns), (3, rows, 2)))
    folder = write_mlx(tmp_path / "adapter", tensors, TODAY)
    source = spectra.open_source(folder, base)
    assert {delta.name for delta in source} == set(names.values())
    for (part, e), name in names.items():
        a, b = (tensors[f"{mlp}.switch_mlp.{part}.lora_{side}"][e].double() for side in "ab")
        close(source[name], 20 * b @ a)
        close(spectra.open_source(folder)[f"{mlp}.switch_mlp.{part}.weight[{e}]"], 20 * b @ a)
        assert torch.equal(source[name].base.read(), weights[part][e].double())


def test_a_language_model_inside_another_is_found(tmp_path):
    base = write_checkpoint(tmp_path / "base", llama_tensors())
    tensors = factors(f"language_model.{LAYER}")
    source = spectra.open_source(write_mlx(tmp_path / "adapter", tensors, TODAY), base)
    close(source[f"{LAYER}.weight"], 20 * product(tensors))


def test_dora_needs_the_base_and_a_config_that_agrees(tmp_path):
    tensors = factors() | {f"{LAYER}.m": torch.ones(16)}
    with pytest.raises(BaseRequiredError):
        spectra.open_source(write_mlx(tmp_path / "a", tensors, TODAY | {"fine_tune_type": "dora"}))
    base = write_checkpoint(tmp_path / "base", llama_tensors())
    source = spectra.open_source(write_mlx(tmp_path / "b", tensors, TODAY), base)
    assert "the config says LoRA" in source[f"{LAYER}.weight"].reason
    plain = spectra.open_source(write_mlx(tmp_path / "c", factors(), TODAY | {"fine_tune_type": "dora"}), base)
    assert "m of model.layers.0.self_attn.q_proj is not there" in plain[f"{LAYER}.weight"].reason


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (factors(shapes=((16, 3), (3, 16))), "the config says rank = 2"),
        (factors(shapes=((16, 2), (3, 16))), "cannot be multiplied"),
        (factors(shapes=((2, 2, 16), (3, 16, 2))), "cannot be multiplied"),
        (factors(shapes=((16, 2), (2, 16, 1))), "cannot be multiplied"),
        (dict(list(factors().items())[:1]), "lora_b is missing"),
        (factors() | {f"{LAYER}.lora_a_scales": torch.ones(16, 1)}, "lora_a_scales"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused(tensors, words, tmp_path):
    (found,) = spectra.open_source(write_mlx(tmp_path, tensors, TODAY))
    assert found.status == "unsupported"
    assert words in found.reason


def test_layers_that_were_trained_whole_are_compared_with_the_base(tmp_path):
    base, config = llama_tensors(), TODAY | {"fine_tune_type": "full"}
    tuned = {name: tensor for name, tensor in nudged(base).items() if ".layers.1." in name}
    folder = write_mlx(tmp_path / "tuned", tuned, config)
    with pytest.raises(BaseRequiredError):
        spectra.open_source(folder)
    source = spectra.open_source(folder, write_checkpoint(tmp_path / "base", base))
    assert {delta.name for delta in source} == {name for name in tuned if tuned[name].ndim == 2}
    for delta in source:
        close(delta, tuned[delta.name].double() - base[delta.name].double())
