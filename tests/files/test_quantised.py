"""Quantised storage: fp8 with its scales is exact; what does not fit its format is refused by name, the rest done."""

from __future__ import annotations

import pickle

import pytest
import torch
from support.checkpoints import write_checkpoint

import spectra

FP8 = torch.float8_e4m3fn
NAME = "model.layers.0.mlp.up_proj.weight"
OTHER = "model.layers.0.mlp.down_proj.weight"
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}
COMPRESSED = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"block_structure": [4, 8]}}},
    }
}


def codes(rows=10, columns=12, dtype=FP8):
    return torch.randn(rows, columns).mul(50).to(dtype)


def by_entry(code, scale, block):
    """Entry by entry: the slow way."""
    out = torch.zeros(code.shape, dtype=torch.float64)
    for i in range(code.shape[0]):
        for j in range(code.shape[1]):
            out[i, j] = float(code[i, j]) * float(scale[i // block[0], j // block[1]])
    return out


SCALES = {
    "blocks": ("weight_scale_inv", lambda: torch.rand(3, 2), (4, 8), BLOCKS),
    "blocks of compressed-tensors": ("weight_scale", lambda: torch.rand(3, 2), (4, 8), COMPRESSED),
    "per row": ("weight_scale", lambda: torch.rand(10, 1), (1, 12), {}),
    "per row as a vector": ("weight_scale", lambda: torch.rand(10), (1, 12), {}),
    "per tensor": ("weight_scale", lambda: torch.rand(1), (10, 12), {}),
    "a scalar": ("weight_scale", lambda: torch.rand(()), (10, 12), {}),
    "a scale in bf16": ("weight_scale", lambda: torch.rand(10, 1).bfloat16(), (1, 12), {}),
    "comfy": ("scale_weight", lambda: torch.rand(()), (10, 12), {}),
    "larger blocks than the matrix": (
        "weight_scale_inv",
        lambda: torch.rand(1, 1),
        (128, 128),
        {"quantization_config": {"weight_block_size": [128, 128]}},
    ),
}


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
@pytest.mark.parametrize("case", SCALES)
def test_fp8_times_its_scale_is_exact(case, dtype, tmp_path):
    suffix, make, block, config = SCALES[case]
    torch.manual_seed(0)
    code, scale, base = codes(dtype=dtype), make(), {NAME: torch.randn(10, 12), OTHER: torch.eye(12)}
    tuned = {NAME: code, NAME.replace("weight", suffix): scale, OTHER: 2 * torch.eye(12)}
    source = spectra.open_source(
        write_checkpoint(tmp_path / "t", tuned, config={"model_type": "llama"} | config),
        write_checkpoint(tmp_path / "b", base),
    )
    assert {delta.name for delta in source} == {NAME, OTHER}
    table = scale.reshape(scale.shape[0], -1) if scale.ndim else scale.reshape(1, 1)
    expected = by_entry(code, table, block) - base[NAME].double()
    assert torch.equal(source[NAME].read().to_dense(), expected)
    assert any("fp8 codes times scales" in warning for warning in source.coverage.warnings)
    assert not source.coverage.tuned_only
    found = spectra.decompose(source).collect()[NAME]
    assert (found.noise_edge, found.rounding) == (None, "tuned holds codes times scales, whose rounding is not known")
    packed = pickle.dumps(source[NAME])
    assert len(packed) < 3000
    assert torch.equal(pickle.loads(packed).read().to_dense(), expected)


def test_both_sides_in_fp8_and_cut_into_parts(tmp_path):
    name = "model.layers.0.self_attn.qkv_proj.weight"
    config = {"model_type": "phi3", "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 8} | BLOCKS
    sides = {}
    for side in "tb":
        code, scale = codes(16, 8), torch.rand(4, 1)
        write_checkpoint(tmp_path / side, {name: code, f"{name}_scale_inv": scale}, config=config)
        sides[side] = by_entry(code, scale, (4, 8))
    source = spectra.open_source(tmp_path / "t", tmp_path / "b")
    delta = sides["t"] - sides["b"]
    for part, rows in {"q": slice(0, 8), "k": slice(8, 12), "v": slice(12, 16)}.items():
        assert torch.equal(source[f"{name}[{part}]"].read().to_dense(), delta[rows])


@pytest.mark.parametrize(
    ("extra", "config", "reason"),
    [
        ({}, {}, "fp8 without its scale"),
        ({f"{NAME}_scale_inv": torch.rand(3, 2)}, {}, "gives no weight_block_size"),
        ({f"{NAME}_scale_inv": torch.rand(3, 3)}, BLOCKS, "does not fit"),
        (
            {f"{NAME}_scale_inv": torch.rand(3, 2)},
            {"quantization_config": {"weight_block_size": [0, 8]}},
            "no weight_block_size",
        ),
        (
            {f"{NAME}_scale_inv": torch.rand(3, 2)},
            {"quantization_config": {"weight_block_size": "4"}},
            "no weight_block_size",
        ),
        ({f"{NAME}_scale_inv": torch.rand(3, 2)}, {"quantization_config": [4]}, "no weight_block_size"),
        ({f"{NAME}_scale": torch.ones(3, dtype=torch.uint8)}, {}, "stored as U8"),
    ],
)
def test_fp8_that_is_not_certain_is_refused_and_the_others_are_done(tmp_path, extra, config, reason):
    base = {NAME: torch.randn(10, 12), OTHER: torch.eye(12)}
    tuned = {NAME: codes(), OTHER: 2 * torch.eye(12)} | extra
    source = spectra.open_source(
        write_checkpoint(tmp_path / "t", tuned, config={"model_type": "llama"} | config),
        write_checkpoint(tmp_path / "b", base),
    )
    assert source[OTHER].status == "ok"
    assert source[NAME].status == "unsupported"
    assert reason in source[NAME].reason
    assert source[NAME].shape == (10, 12)


MODULE = NAME.removesuffix(".weight")


def ints(*shape):
    return torch.ones(*(shape or (4, 4)), dtype=torch.int32)


PACKED = {
    "GPTQ": (
        {
            f"{MODULE}.qweight": ints(),
            f"{MODULE}.qzeros": ints(),
            f"{MODULE}.scales": torch.ones(2, 4),
            f"{MODULE}.g_idx": ints(4),
        },
        {"quantization_config": {"quant_method": "gptq"}},
    ),
    "AWQ": (
        {f"{MODULE}.qweight": ints(), f"{MODULE}.qzeros": ints(), f"{MODULE}.scales": torch.ones(2, 4)},
        {"quantization_config": {"quant_method": "awq"}},
    ),
    "GPTQ or AWQ": (
        {f"{MODULE}.qweight": ints(), f"{MODULE}.qzeros": ints(), f"{MODULE}.scales": torch.ones(2, 4)},
        {},
    ),
    "bitsandbytes 4-bit": (
        {
            NAME: torch.ones(60, 1, dtype=torch.uint8),
            f"{NAME}.absmax": torch.ones(2),
            f"{NAME}.quant_map": torch.ones(16),
            f"{NAME}.nested_absmax": torch.ones(2),
            f"{NAME}.nested_quant_map": torch.ones(16),
            f"{NAME}.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8),
        },
        {},
    ),
    "bitsandbytes 8-bit": (
        {
            NAME: torch.ones(10, 12, dtype=torch.int8),
            f"{MODULE}.SCB": torch.ones(10),
            f"{MODULE}.weight_format": torch.ones((), dtype=torch.uint8),
        },
        {},
    ),
    "compressed-tensors": (
        {
            f"{MODULE}.weight_packed": ints(),
            f"{MODULE}.weight_scale": torch.ones(10, 1),
            f"{MODULE}.weight_shape": ints(4),
        },
        {},
    ),
    "int8 codes": ({NAME: torch.ones(10, 12, dtype=torch.int8), f"{NAME}_scale": torch.ones(10, 1)}, {}),
}


@pytest.mark.parametrize("side", ["tuned", "base"])
@pytest.mark.parametrize("title", PACKED)
def test_packed_weights_are_refused_by_name_and_the_others_are_done(tmp_path, title, side):
    tensors, config = PACKED[title]
    plain = {NAME: torch.randn(10, 12), OTHER: torch.eye(12)}
    folders = {
        "packed": write_checkpoint(
            tmp_path / "p", tensors | {OTHER: 2 * torch.eye(12)}, config={"model_type": "llama"} | config
        ),
        "plain": write_checkpoint(tmp_path / "b", plain),
    }
    tuned, base = (folders["packed"], folders["plain"]) if side == "tuned" else (folders["plain"], folders["packed"])
    source = spectra.open_source(tuned, base)
    statuses = {delta.name: delta.status for delta in source}
    assert statuses == {NAME: "unsupported", OTHER: "ok"}
    assert title in source[NAME].reason
    assert source[NAME].shape == (10, 12)
    assert NAME in source.coverage.unsupported
    assert not source.coverage.tuned_only
    assert not source.coverage.base_only


@pytest.mark.parametrize("missing", ["blocks", "scales"])
def test_half_of_mxfp4_experts_is_refused_by_name(tmp_path, missing):
    name = "model.layers.0.mlp.experts.down_proj"
    packed = {
        f"{name}_blocks": torch.ones(2, 4, 3, 16, dtype=torch.uint8),
        f"{name}_scales": torch.ones(2, 4, 3, dtype=torch.uint8),
        OTHER: torch.eye(4),
    }
    del packed[f"{name}_{missing}"]
    source = spectra.open_source(
        *(write_checkpoint(tmp_path / side, packed, config={"model_type": "gpt_oss"}) for side in "tb")
    )
    assert {delta.name: delta.status for delta in source} == {name: "unsupported", OTHER: "ok"}
    assert "gpt-oss" in source[name].reason
    assert f"their {missing} is not in the file" in source[name].reason


def test_an_adapter_needs_no_decoded_base(tmp_path):
    from support.checkpoints import write_adapter

    factors = {
        f"base_model.model.{MODULE}.lora_A.weight": torch.randn(2, 12),
        f"base_model.model.{MODULE}.lora_B.weight": torch.randn(10, 2),
    }
    adapter = write_adapter(tmp_path / "a", factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    tensors, config = PACKED["bitsandbytes 4-bit"]
    base = write_checkpoint(tmp_path / "b", tensors, config={"model_type": "llama"} | config)
    (delta,) = spectra.open_source(adapter, base)
    A, B = (factors[name].double() for name in sorted(factors))
    assert delta.name == NAME
    assert torch.allclose(delta.read().to_dense(), B @ A)
