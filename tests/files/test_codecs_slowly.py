"""Every integer codec against its definition, entry by entry: a big integer per stream of bits, a float per entry."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import write_checkpoint

from spectra.files.folder import open_folder

MODULE = "model.layers.0.mlp.up_proj"
SCALES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


def words(generator, *shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)


def code(stream, bits, index):
    """The index-th code of a stream of 32-bit words."""
    number = sum((int(word) % 2**32) << (32 * place) for place, word in enumerate(stream))
    return (number >> (bits * index)) % 2**bits


def rounded(value, dtype):
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def decoded(tensors, config):
    with tempfile.TemporaryDirectory() as place:
        folder = open_folder(write_checkpoint(Path(place), tensors, config={"model_type": "llama"} | config))
        assert folder.packed == {}
        return folder.tensors[f"{MODULE}.weight"].read()


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([2, 3, 4, 8]), st.sampled_from(["gptq", "gptq_v2"]),
    st.sampled_from(["g_idx in any order", "g_idx as it comes", "no g_idx"]), SCALES,
)  # fmt: skip
def test_gptq(seed, bits, layout, order, dtype):
    generator = torch.Generator().manual_seed(seed)
    inputs, out, size = 64, 32, 32
    tensors = {
        "qweight": words(generator, inputs * bits // 32, out),
        "qzeros": words(generator, inputs // size, out * bits // 32),
        "scales": torch.rand(inputs // size, out, generator=generator).to(dtype),
    }
    group = torch.arange(inputs) // size
    if order != "no g_idx":
        group = group[torch.randperm(inputs, generator=generator)] if "any" in order else group
        tensors["g_idx"] = group.to(torch.int32)
    config = {"quant_method": "gptq", "group_size": size, "checkpoint_format": layout, "desc_act": "any" in order}
    got = decoded({f"{MODULE}.{name}": part for name, part in tensors.items()}, {"quantization_config": config})
    assert got.shape == (out, inputs)
    for o, i in [(0, 0), (31, 63), *torch.randint(0, 32, (30, 2), generator=generator).tolist()]:
        g = int(group[i])
        zero = code(tensors["qzeros"][g], bits, o) + (layout == "gptq")
        scale, q = float(tensors["scales"][g, o]), code(tensors["qweight"][:, o], bits, i)
        assert float(got[o, i]) == rounded(scale * (q - zero % 2**bits), dtype)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), SCALES)
def test_awq(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    inputs, out, size = 48, 16, 16
    tensors = {
        "qweight": words(generator, inputs, out // 8),
        "qzeros": words(generator, inputs // size, out // 8),
        "scales": torch.rand(inputs // size, out, generator=generator).to(dtype),
    }
    config = {"quant_method": "awq", "group_size": size, "version": "GEMM"}
    got = decoded({f"{MODULE}.{name}": part for name, part in tensors.items()}, {"quantization_config": config})
    for i in range(0, inputs, 7):
        for word in range(out // 8):
            for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                o, g = 8 * word + column, i // size
                q, zero = (
                    code(tensors[name][row], 4, 8 * word + place) for name, row in (("qweight", i), ("qzeros", g))
                )
                assert float(got[o, i]) == rounded(float(tensors["scales"][g, o]) * (q - zero), dtype)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([32, 64]), SCALES)
def test_mlx_is_the_sum_before_any_kernel_rounds_it(seed, bits, size, dtype):
    generator = torch.Generator().manual_seed(seed)
    out, inputs = 5, 128
    tensors = {
        "weight": words(generator, out, inputs * bits // 32).view(torch.uint32),
        "scales": torch.rand(out, inputs // size, generator=generator).to(dtype),
        "biases": torch.randn(out, inputs // size, generator=generator).to(dtype),
    }
    config = {"quantization": {"group_size": 32, "bits": 7, MODULE: {"group_size": size, "bits": bits}}}
    got = decoded({f"{MODULE}.{name}": part for name, part in tensors.items()}, config)
    for o in range(out):
        for i in range(0, inputs, 9):
            scale, bias = (float(tensors[name][o, i // size]) for name in ("scales", "biases"))
            product = scale * code(tensors["weight"].view(torch.int32)[o], bits, i)
            assert abs(float(got[o, i]) - (product + bias)) <= 2**-23 * (product + abs(bias))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([4, 8]), st.sampled_from([1, 3]), st.booleans(), SCALES)
def test_compressed_tensors(seed, bits, groups, ordered, dtype):
    generator = torch.Generator().manual_seed(seed)
    out, inputs = 10, 36
    tensors = {
        "weight_packed": words(generator, out, -(-inputs * bits // 32)),
        "weight_zero_point": words(generator, -(-out * bits // 32), groups),
        "weight_scale": torch.rand(out, groups, generator=generator).to(dtype),
        "weight_shape": torch.tensor([out, inputs]),
    }
    group = torch.arange(inputs) // (inputs // groups)
    if ordered:
        group = group[torch.randperm(inputs, generator=generator)]
        tensors["weight_g_idx"] = group.to(torch.int32)
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    got = decoded({f"{MODULE}.{name}": part for name, part in tensors.items()}, config)
    for o in range(out):
        for i in range(0, inputs, 5):
            q, zero = (
                code(tensors["weight_packed"][o], bits, i),
                code(tensors["weight_zero_point"][:, group[i]], bits, o),
            )
            assert float(got[o, i]) == rounded(float(tensors["weight_scale"][o, group[i]]) * (q - zero), dtype)
