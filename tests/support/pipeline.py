"""A small diffusers pipeline, LoRAs for its layers as kohya names them, and their product entry by entry."""

from __future__ import annotations

import itertools
import json
import pickle

import torch
from safetensors.torch import save_file

OUT, IN, R, K = 6, 5, 2, 3
PATH = "down_blocks.0.attentions.0.to_q"
FLAT = "lora_unet_down_blocks_0_attentions_0_to_q"
BASE = {
    "unet": {
        "down_blocks.0.attentions.0.to_q.weight": (OUT, IN),
        "down_blocks.0.attentions.0.to_out.0.weight": (IN, OUT),
        "mid_block.conv.weight": (OUT, IN, K, K),
        "mid_block.conv.bias": (OUT,),
    },
    "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8)},
    "text_encoder_2": {"text_model.encoder.layers.0.self_attn.q_proj.weight": (4, 4)},
}


def pipeline(folder):
    """A diffusers pipeline folder, and its weights by their full names."""
    torch.manual_seed(5)
    folder.mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    weights = {}
    for component, shapes in BASE.items():
        index[component] = ["diffusers", "Model"]
        (folder / component).mkdir()
        tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
        file = "diffusion_pytorch_model" if component == "unet" else "model"
        save_file(tensors, folder / component / f"{file}.safetensors")
        (folder / component / "config.json").write_text(json.dumps({"model_type": component}))
        weights |= {f"{component}.{name}": tensor for name, tensor in tensors.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder, weights


def file(folder, tensors, metadata=None):
    path = folder / "adapter.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def lora(module=FLAT, out=OUT, inside=IN, kernel=(), alpha=3.0):
    torch.manual_seed(len(module))
    tensors = {
        f"{module}.lora_down.weight": randn(R, inside, *kernel),
        f"{module}.lora_up.weight": randn(out, R, *[1 for _ in kernel]),
    }
    return tensors | ({f"{module}.alpha": torch.tensor(alpha)} if alpha is not None else {})


def product(tensors, module=FLAT, s=1.5):
    """s·up·down, one entry at a time, the kernel counted with the inputs."""
    down = tensors[f"{module}.lora_down.weight"].flatten(1)
    up = tensors[f"{module}.lora_up.weight"].flatten(1)
    delta = torch.zeros(up.shape[0], down.shape[1], dtype=torch.float64)
    for o, i, r in itertools.product(*map(range, (*delta.shape, down.shape[0]))):
        delta[o, i] += s * up[o, r] * down[r, i]
    return delta


def only(source, name=None):
    (delta,) = source
    assert name is None or delta.name == name
    assert torch.equal(pickle.loads(pickle.dumps(delta)).read().to_dense(), delta.read().to_dense())
    assert len(pickle.dumps(delta)) < 4000
    return delta


def close(delta, expected, tolerance=1e-13):
    actual = delta.read().to_dense()
    assert delta.shape == tuple(actual.shape) == tuple(expected.shape)
    assert torch.allclose(actual, expected, rtol=0, atol=tolerance * float(expected.norm()))
