"""Write `weights.safetensors`: small weights as the quantising libraries store them, and as they decode them.

Run once, where the libraries are: bitsandbytes 0.50.2, mlx 0.32.4 (with mlx-cpu), compressed-tensors 0.20.0 and
transformers, with AutoGPTQ's qlinear_cuda.py and qlinear_cuda_old.py (0.8.0.dev0) and AutoAWQ's packing_utils.py
(0.2.9) on the path. The tests need none of them.

Each case's tensors are `<case>/<name>`, what its library decodes is `<case>=`, and its config is in the metadata.
"""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import mlx.core as mx
import numpy as np
import packing_utils
import qlinear_cuda
import qlinear_cuda_old
import torch
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Case = tuple[dict[str, torch.Tensor], torch.Tensor, dict]
MX_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def four_bit(shape, quant_type, dtype, *, nested, blocksize, storage=torch.uint8) -> Case:
    weight = torch.randn(shape).to(dtype)
    codes, state = bnb.quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=nested, blocksize=blocksize, quant_storage=storage
    )
    tensors = {"weight": codes} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    return tensors, bnb.dequantize_4bit(codes, state), {}


def eight_bit() -> Case:
    codes, maxima, _ = bnb.int8_vectorwise_quant(torch.randn(6, 20).half())
    tensors = {"weight": codes, "SCB": maxima, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, bnb.int8_vectorwise_dequant(codes, maxima), {}


def to_torch(array) -> torch.Tensor:
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.astype(mx.float32))).bfloat16()
    return torch.from_numpy(np.array(array))


def mlx_affine(shape, bits, dtype) -> Case:
    weight = mx.array(np.random.randn(*shape).astype(np.float32)).astype(MX_DTYPES[dtype])
    codes, scales, biases = mx.quantize(weight, group_size=32, bits=bits)
    decoded = mx.dequantize(codes, scales, biases, group_size=32, bits=bits)
    tensors = {"weight": to_torch(codes), "scales": to_torch(scales), "biases": to_torch(biases)}
    return tensors, to_torch(decoded), {"quantization": {"group_size": 32, "bits": bits}}


def mlx_mxfp4() -> Case:
    weight = mx.array(np.random.randn(6, 64).astype(np.float32)).astype(mx.bfloat16)
    codes, scales = mx.quantize(weight, mode="mxfp4")
    decoded = mx.dequantize(codes, scales, mode="mxfp4", dtype=mx.bfloat16)
    config = {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}
    return {"weight": to_torch(codes), "scales": to_torch(scales)}, to_torch(decoded), config


def gptq(bits, *, act_order=False) -> Case:
    outputs, inputs, size, dtype = 32, 64, 16, torch.float16
    layer = torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    scales = (torch.rand(outputs, inputs // size) / 2**bits).to(dtype)
    zeros = torch.randint(1, 2**bits, (outputs, inputs // size)).to(dtype)
    module = (qlinear_cuda if act_order else qlinear_cuda_old).QuantLinear(
        bits, size, inputs, outputs, False, weight_dtype=dtype
    )
    order = torch.randperm(inputs) // size if act_order else torch.arange(inputs) // size
    module.pack(layer, scales, zeros, order.to(torch.int32))
    tensors = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": act_order}
    return tensors, module(torch.eye(inputs, dtype=dtype)).T, {"quantization_config": settings}


def awq() -> Case:
    inputs, outputs, size = 64, 24, 32
    words = torch.randint(-(2**31), 2**31, (inputs, outputs // 8), dtype=torch.int32)
    zeros = torch.randint(-(2**31), 2**31, (inputs // size, outputs // 8), dtype=torch.int32)
    scales = torch.rand(inputs // size, outputs).half() / 16
    decoded = packing_utils.dequantize_gemm(words, zeros, scales, 4, size)
    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    return {"qweight": words, "qzeros": zeros, "scales": scales}, decoded.T, {"quantization_config": settings}


def compressed(bits, *, symmetric, strategy, dtype, packed=True, shape=(12, 64)) -> Case:
    size = {"group_size": 16} if strategy == "group" else {}
    arguments = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, **size)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    groups = shape[1] // 16 if strategy == "group" else 1
    state = {
        "weight": torch.randn(shape).to(dtype),
        "weight_scale": (torch.rand(shape[0], groups) / 2 ** (bits - 2) + 0.01).to(dtype),
        "weight_zero_point": torch.zeros(shape[0], groups, dtype=torch.int8),
    }
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-4, 4, (shape[0], groups), dtype=torch.int8)
    compressor = PackedQuantizationCompressor if packed else NaiveQuantizationCompressor
    stored = compressor.compress(state, scheme)
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    return stored, compressor.decompress(stored, scheme)["weight"], {"quantization_config": settings}


def mxfp4() -> Case:
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 6, 3), dtype=torch.uint8)
    return {"_blocks": blocks, "_scales": scales}, convert_moe_packed_tensors(blocks, scales), {}


def cases() -> dict[str, Case]:
    half, wide, brain = torch.float16, torch.float32, torch.bfloat16
    group = {"symmetric": True, "strategy": "group"}
    return {
        "nf4": four_bit((12, 40), "nf4", half, nested=False, blocksize=64),
        "nf4 nested": four_bit((96, 96), "nf4", brain, nested=True, blocksize=32),
        "nf4 odd": four_bit((7, 5), "nf4", wide, nested=True, blocksize=64),
        "nf4 in bfloat16 storage": four_bit((8, 32), "nf4", brain, nested=True, blocksize=64, storage=brain),
        "fp4": four_bit((12, 40), "fp4", half, nested=False, blocksize=64),
        "fp4 nested": four_bit((12, 40), "fp4", brain, nested=True, blocksize=64),
        "int8": eight_bit(),
        "mlx experts": mlx_affine((3, 4, 64), 4, "float32"),
        "mlx half": mlx_affine((4, 64), 4, "float16"),
        "mlx bfloat16": mlx_affine((4, 64), 8, "bfloat16"),
        "mlx mxfp4": mlx_mxfp4(),
        **{f"mlx {bits} bits": mlx_affine((4, 64), bits, "float32") for bits in (2, 3, 4, 5, 6, 8)},
        **{f"gptq {bits} bits": gptq(bits) for bits in (2, 3, 4, 8)},
        **{f"gptq {bits} bits in act-order": gptq(bits, act_order=True) for bits in (3, 4)},
        "awq": awq(),
        "compressed 4 bits": compressed(4, dtype=brain, **group),
        "compressed 8 bits": compressed(8, dtype=half, **group),
        "compressed asymmetric": compressed(4, symmetric=False, strategy="group", dtype=brain),
        "compressed per row": compressed(4, symmetric=False, strategy="channel", dtype=half, shape=(10, 36)),
        "compressed int8": compressed(8, symmetric=True, strategy="channel", dtype=brain, packed=False),
        "compressed int8 asymmetric": compressed(8, symmetric=False, strategy="group", dtype=half, packed=False),
        "mxfp4": mxfp4(),
    }


def main() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    made = cases()
    tensors = {}
    for case, (stored, decoded, _) in made.items():
        tensors |= {f"{case}/{name}": tensor.detach().clone().contiguous() for name, tensor in stored.items()}
        tensors[f"{case}="] = decoded.detach().clone().contiguous()
    configs = {case: json.dumps(config) for case, (_, _, config) in made.items()}
    save_file(tensors, Path(__file__).with_name("weights.safetensors"), metadata=configs)


if __name__ == "__main__":
    main()
