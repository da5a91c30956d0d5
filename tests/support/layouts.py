"""Other layouts of formats that have an example already: more for the fuzzer to damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as checkpoint
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Shard

from support.checkpoints import llama_tensors, write_adapter, write_checkpoint
from support.distributed import write_ranks
from support.gguf_lora import HEADS, interleaved
from support.litgpt import write_model
from support.peft_oracle import Oracle

_Q = "model.layers.0.self_attn.q_proj"
_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def _factors(prefix: str, named: str = "") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    A, B = torch.randn(2, 16), torch.randn(16, 2)
    tensors = {f"{prefix}.lora_A.{named}weight": A, f"{prefix}.lora_B.{named}weight": B}
    return tensors, 2 * B.double() @ A.double()


def _dump(folder: Path) -> Oracle:
    """A whole PEFT model in one file, of which one weight is adapted and one was trained."""
    base, other = llama_tensors(layers=1), "model.layers.0.mlp.up_proj.weight"
    tensors, delta = _factors(f"base_model.model.{_Q}", "default.")
    for name, tensor in base.items():
        inner = f"{_Q}.base_layer.weight" if name == f"{_Q}.weight" else name
        tensors[f"base_model.model.{inner}"] = tensor + (0.1 if name == other else 0.0)
    adapter = write_adapter(folder / "adapter", tensors, _CONFIG)
    (adapter / "adapter_model.safetensors").rename(adapter / "model.safetensors")
    moved = tensors[f"base_model.model.{other}"].double() - base[other].double()
    return Oracle(write_checkpoint(folder / "base", base), adapter, {f"{_Q}.weight": delta, other: moved})


def _latent(folder: Path) -> Oracle:
    """LoRA-XS."""
    tensors, _ = _factors(f"base_model.model.{_Q}")
    A, B = (tensors[f"base_model.model.{_Q}.lora_{letter}.weight"].double() for letter in "AB")
    R = tensors[f"base_model.model.{_Q}_lora_latent_mapping.weight"] = torch.randn(2, 2)
    base = write_checkpoint(folder / "base", llama_tensors(layers=1))
    return Oracle(base, write_adapter(folder / "adapter", tensors, _CONFIG), {f"{_Q}.weight": 2 * B @ R.double() @ A})


def _tied(folder: Path) -> Oracle:
    """LoRA on a head that the base holds as its embedding, and on the embedding."""
    base = {name: tensor for name, tensor in llama_tensors(layers=1).items() if name != "lm_head.weight"}
    tensors = {"base_model.model.lm_head.lora_A.weight": torch.randn(2, 16)}
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.randn(32, 2)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.randn(2, 32)
    tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.randn(16, 2)
    A, B, up, down = (tensor.double() for tensor in tensors.values())
    config = {"model_type": "llama", "tie_word_embeddings": True}
    delta = 2 * (B @ A + (down @ up).T)
    adapter = write_adapter(folder / "adapter", tensors, _CONFIG)
    return Oracle(write_checkpoint(folder / "base", base, config=config), adapter, {"model.embed_tokens.weight": delta})


def _comfyui(folder: Path) -> Oracle:
    """Two components in one file, an integer α and one in the header, and changes of norms."""
    block, clip = "double_blocks.0.img_attn.qkv", "text_model.encoder.layers.0.self_attn.q_proj"
    places = {f"diffusion_model.{block}": "model.", f"text_encoders.clip_l.transformer.{clip}": ""}
    tensors, deltas, base = {}, {}, {}
    for number, (module, place) in enumerate(places.items()):
        down, up = torch.randn(2, 16), torch.randn(16, 2)
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.diff_b": up[:, 0]}
        if number == 0:
            tensors[f"{module}.alpha"] = torch.tensor(4)
        deltas[f"{place}{module}.weight"] = 2 * up.double() @ down.double()
        base[f"{place}{module}.weight"] = torch.randn(16, 16)
    tensors["diffusion_model.norm.diff"] = torch.randn(16)
    header = {"ss_network_alpha": "4", "ss_network_dim": "2", "ss_network_args": json.dumps({"split_qkv": "False"})}
    (folder / "adapter").mkdir(parents=True)
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "adapter" / "comfy.safetensors", header)
    return Oracle(write_checkpoint(folder / "base", base, config={"model_type": ""}), folder / "adapter", deltas)


def _parts(folder: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    base = llama_tensors(layers=1)
    tuned = {name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in base.items()}
    return folder / "adapter", write_checkpoint(folder / "base", base), tuned


def _deltas(base: Path, tuned: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    held = load_file(base / "model.safetensors")
    return {name: tensor.double() - held[name].double() for name, tensor in tuned.items() if tensor.ndim == 2}


def _rank_files(folder: Path) -> Oracle:
    """A checkpoint that two FSDP ranks left in parts."""
    home, base, tuned = _parts(folder)
    write_ranks(home, tuned, [2], lambda name: [Shard(0)])
    return Oracle(base, home, _deltas(base, tuned))


def _dcp(folder: Path) -> Oracle:
    """A training state that torch.distributed.checkpoint wrote."""
    home, base, tuned = _parts(folder)
    state = {"model": tuned, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(home), no_dist=True)
    return Oracle(base, home, _deltas(base, tuned))


def _in_own_names(folder: Path, *, litgpt: bool) -> Oracle:
    """Full weights in LitGPT's or torchtune's names, against a LLaMA in transformers'."""
    base, tuned = llama_tensors(layers=1), llama_tensors(layers=1, seed=1)
    stem = "model.layers.0."
    if litgpt:
        joint = [tuned[f"{stem}self_attn.{part}_proj.weight"] for part in "qkv"]
        own = {"transformer.h.0.attn.qkv.weight": torch.cat(joint)}
        own["transformer.h.0.mlp.fc_1.weight"] = tuned[f"{stem}mlp.gate_proj.weight"]
        write_model(folder / "adapter", own)
    else:
        q = tuned[f"{stem}self_attn.q_proj.weight"]
        own = {"layers.0.attn.q_proj.weight": interleaved(q, 4)}
        own["layers.0.mlp.w1.weight"] = tuned[f"{stem}mlp.gate_proj.weight"]
        (folder / "adapter").mkdir(parents=True)
        torch.save(own, folder / "adapter" / "model-00001-of-00001.pt")
    parts = [f"self_attn.{part}_proj" for part in ("qkv" if litgpt else "q")] + ["mlp.gate_proj"]
    names = [f"{stem}{part}.weight" for part in parts]
    config = {"model_type": "llama", "hidden_size": 16, **HEADS}
    return Oracle(
        write_checkpoint(folder / "base", {name: base[name] for name in names}, config=config),
        folder / "adapter",
        {name: tuned[name].double() - base[name].double() for name in names},
    )


LAYOUTS: dict[str, Callable[[Path], Oracle]] = {
    "lora-in-a-dump": _dump,
    "LoRA-XS": _latent,
    "tied": _tied,
    "comfyui": _comfyui,
    "rank-files": _rank_files,
    "dcp": _dcp,
    "litgpt-whole": partial(_in_own_names, litgpt=True),
    "torchtune-whole": partial(_in_own_names, litgpt=False),
}
