"""One small, valid example of every format, with what its update must be: for conformance tests and fuzzing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file

from support.checkpoints import VOCABULARY, llama_tensors, nudged, write_adapter, write_checkpoint
from support.gguf_lora import make_gguf_oracle
from support.litgpt import make_litgpt_oracle
from support.peft_oracle import Oracle, make_oracle


def _peft(
    config: type[peft.PeftConfig],
    *,
    prepare: Callable[[torch.nn.Module], object] | None = None,
    tolerance: float = 1e-12,
    **options: object,
) -> Callable[[Path], Oracle]:
    """A tiny LLaMA with a random adapter, against PEFT's merge."""

    def build(folder: Path) -> Oracle:
        return replace(make_oracle(folder, "llama", config(**options), prepare=prepare), tolerance=tolerance)

    return build


def _checkpoint(folder: Path) -> Oracle:
    base = llama_tensors()
    tuned = nudged(base)
    deltas = {name: tuned[name].double() - base[name].double() for name in base if base[name].ndim == 2}
    return Oracle(
        write_checkpoint(folder / "base", base, shards=2), write_checkpoint(folder / "adapter", tuned), deltas
    )


def _multilora(folder: Path) -> Oracle:
    base = write_checkpoint(folder / "base", llama_tensors())
    name = "model.layers.0.self_attn.v_proj"
    torch.manual_seed(0)
    A, B, scaling = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 2, 16), (3, 8, 2), (3, 8)))
    prefix = f"base_model.model.{name}.multilora_"
    config = {"peft_type": "MULTILORA", "r": 2, "num_modules": 3, "lora_alpha": 5}
    adapter = write_adapter(folder / "adapter", {f"{prefix}A": A, f"{prefix}B": B, f"{prefix}scaling": scaling}, config)
    delta = sum(5 / 2 * scaling[i][:, None] * (B[i] @ A[i]) for i in range(3))
    return Oracle(base, adapter, {f"{name}.weight": delta})


def _multihead(folder: Path) -> Oracle:
    base = write_checkpoint(folder / "base", llama_tensors())
    name = "model.layers.1.self_attn.q_proj"
    torch.manual_seed(0)
    tensors = {"lora_A.weight": torch.randn(2, 16), "lora_route.weight": torch.randn(3, 16)}
    tensors |= {f"lora_B{k}.weight": torch.randn(16, 2) for k in range(3)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_nums": 3}
    adapter = write_adapter(
        folder / "adapter", {f"base_model.model.{name}.{key}": tensor for key, tensor in tensors.items()}, config
    )
    heads = torch.stack([tensors[f"lora_B{k}.weight"] for k in range(3)]).double()
    return Oracle(base, adapter, {f"{name}.weight": 3 * heads.mean(0) @ tensors["lora_A.weight"].double()})


def _mixture(folder: Path) -> Oracle:
    """LoRAMoE: the mean over its routed experts."""
    base = write_checkpoint(folder / "base", llama_tensors())
    name = "model.layers.1.mlp.down_proj"
    torch.manual_seed(0)
    A, B = torch.randn(3, 2, 24), torch.randn(3, 16, 2)
    tensors = {f"lora_A{i}.weight": A[i] for i in range(3)} | {f"lora_B{i}.weight": B[i] for i in range(3)}
    tensors["lora_route.weight"] = torch.randn(3, 24)
    adapter = write_adapter(
        folder / "adapter",
        {f"base_model.model.{name}.{key}": tensor for key, tensor in tensors.items()},
        {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_nums": 3},
    )
    return Oracle(base, adapter, {f"{name}.weight": sum(B[i].double() @ A[i].double() for i in range(3))})


def _ln_tuning(folder: Path) -> Oracle:
    """Norms, which are vectors, and a head saved beside them: PEFT's own merge loses the head."""
    base, head = llama_tensors(), torch.randn(VOCABULARY, 16)
    tensors = {"base_model.model.lm_head.weight": head}
    tensors |= {"base_model.model.model.norm.ln_tuning_layers.weight": torch.ones(16)}
    adapter = write_adapter(folder / "adapter", tensors, {"peft_type": "LN_TUNING", "modules_to_save": ["lm_head"]})
    delta = head.double() - base["lm_head.weight"].double()
    return Oracle(write_checkpoint(folder / "base", base), adapter, {"lm_head.weight": delta})


def _pipeline_lora(folder: Path, names: tuple[str, str], alpha: str | None) -> Oracle:
    """A LoRA for the U-Net of a diffusers pipeline, in one file without a config."""
    path = "down_blocks.0.attentions.0.to_q"
    torch.manual_seed(0)
    down, up = torch.randn(2, 5), torch.randn(6, 2)
    tensors = {names[0]: down, names[1]: up} | ({alpha: torch.tensor(3.0)} if alpha else {})
    base = folder / "base"
    (base / "unet").mkdir(parents=True)
    (base / "model_index.json").write_text(json.dumps({"_class_name": "X", "unet": ["diffusers", "UNet"]}))
    (base / "unet" / "config.json").write_text("{}")
    save_file({f"{path}.weight": torch.randn(6, 5)}, base / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "adapter").mkdir()
    header = {} if alpha else {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 3})}
    save_file(tensors, folder / "adapter" / "pytorch_lora_weights.safetensors", header)
    scale = 1.5
    return Oracle(base, folder / "adapter", {f"unet.{path}.weight": scale * up.double() @ down.double()})


def _kohya(folder: Path) -> Oracle:
    flat = "lora_unet_down_blocks_0_attentions_0_to_q"
    return _pipeline_lora(folder, (f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"), f"{flat}.alpha")


def _diffusers(folder: Path) -> Oracle:
    dotted = "unet.down_blocks.0.attentions.0.to_q"
    return _pipeline_lora(folder, (f"{dotted}.lora_A.weight", f"{dotted}.lora_B.weight"), None)


def write_mlx(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None) -> Path:
    """What mlx-lm writes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapters.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _mlx(folder: Path, *, dora: bool) -> Oracle:
    """A layer, and an embedding, whose factors MLX multiplies the other way round."""
    base = llama_tensors()
    layer, embedding = "model.layers.1.mlp.down_proj", "model.embed_tokens"
    torch.manual_seed(0)
    a, b = torch.randn(24, 3), torch.randn(3, 16)
    tensors = {f"{layer}.lora_a": a, f"{layer}.lora_b": b}
    tensors |= {f"{embedding}.lora_a": torch.randn(VOCABULARY, 3), f"{embedding}.lora_b": torch.randn(3, 16)}
    updates = {
        layer: 20 * (a.double() @ b.double()).T,
        embedding: 20 * tensors[f"{embedding}.lora_a"].double() @ tensors[f"{embedding}.lora_b"].double(),
    }
    if dora:
        for module, update in updates.items():
            weight, m = base[f"{module}.weight"].double(), torch.rand(len(base[f"{module}.weight"])) + 0.5
            moved = weight + update
            tensors[f"{module}.m"] = m
            updates[module] = (m.double() / moved.norm(dim=1))[:, None] * moved - weight
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 16}
    config |= {"lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.0}}
    return Oracle(
        write_checkpoint(folder / "base", base),
        write_mlx(folder / "adapter", tensors, config),
        {f"{module}.weight": update for module, update in updates.items()},
    )


def _torchtune(folder: Path, *, dora: bool) -> Oracle:
    """A key projection, whose rows torchtune keeps in Meta's order, and one of the MLP."""
    base = llama_tensors()
    torch.manual_seed(0)
    tensors, deltas = {}, {}
    for name, module, heads in (
        ("model.layers.0.self_attn.k_proj.weight", "layers.0.attn.k_proj", 2),
        ("model.layers.1.mlp.gate_proj.weight", "layers.1.mlp.w1", 0),
    ):
        weight = base[name].double()
        a, b, m = torch.randn(3, weight.shape[1]), torch.randn(len(weight), 3), torch.rand(len(weight)) + 0.5
        update, magnitude = 2 * b.double() @ a.double(), m.double()[:, None]
        if heads:  # transformers' row h·d + i·d/2 + j is Meta's h·d + 2j + i
            update, magnitude = (x.reshape(heads, 2, 2, -1).transpose(1, 2).flatten(0, 2) for x in (update, magnitude))
        tensors |= {f"{module}.lora_a.weight": a, f"{module}.lora_b.weight": b}
        if dora:
            tensors[f"{module}.magnitude"] = m
            moved = weight + update
            update = magnitude / moved.norm(dim=1, keepdim=True) * moved - weight
        deltas[name] = update
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    adapter = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_dora": dora}
    return Oracle(
        write_checkpoint(folder / "base", base, config=config),
        write_adapter(folder / "adapter", tensors, adapter),
        deltas,
    )


def _adapterhub(folder: Path) -> Oracle:
    """AdapterHub's nested config and names."""
    base = write_checkpoint(folder / "base", llama_tensors())
    name = "model.layers.0.self_attn.q_proj"
    torch.manual_seed(0)
    A, B = torch.randn(2, 16), torch.randn(16, 2)
    config = {"config": {"architecture": "lora", "r": 2, "alpha": 5, "composition_mode": "add", "use_gating": False}}
    tensors = {f"{name}.loras.mine.lora_A": A, f"{name}.loras.mine.lora_B": B}
    adapter = write_adapter(folder / "adapter", tensors, config)
    return Oracle(base, adapter, {f"{name}.weight": 2.5 * B.double() @ A.double()})


def _nvlabs_dora(folder: Path) -> Oracle:
    """Two modules with factors and a magnitude, and one of which the magnitude alone was trained (NVlabs/DoRA)."""
    base = llama_tensors()
    torch.manual_seed(0)
    tensors, deltas = {}, {}
    for number, part in enumerate(("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")):
        name = f"model.layers.0.{part}.weight"
        weight = moved = base[name].double()
        m, prefix = torch.rand(len(weight), 1) + 0.5, f"base_model.model.model.layers.0.{part}."
        tensors[f"{prefix}weight_m_wdecomp.weight"] = m
        if number < 2:
            A, B = torch.randn(3, weight.shape[1]), torch.randn(len(weight), 3)
            tensors |= {f"{prefix}lora_A.weight": A, f"{prefix}lora_B.weight": B}
            moved = weight + 2 * B.double() @ A.double()
        deltas[name] = m.double() / torch.linalg.norm(moved, dim=1).unsqueeze(1) * moved - weight
    config = {"peft_type": "DORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    config |= {"Wdecompose_target_modules": ["down_proj"], "fan_in_fan_out": False, "dora_simple": True}
    return Oracle(write_checkpoint(folder / "base", base), write_adapter(folder / "adapter", tensors, config), deltas)


def _xlabs(folder: Path) -> Oracle:
    """A double block's processor and a single one's, on a base in the names of Flux' authors (XLabs-AI/x-flux)."""
    torch.manual_seed(0)
    modules = {
        "double_blocks.0.processor.proj_lora1": ("double_blocks.0.img_attn.proj", 16, 16),
        "double_blocks.0.processor.qkv_lora2": ("double_blocks.0.txt_attn.qkv", 48, 16),
        "single_blocks.1.processor.proj_lora": ("single_blocks.1.linear2", 16, 80),
    }
    tensors, base, deltas = {}, {}, {}
    for module, (name, rows, columns) in modules.items():
        down, up = torch.randn(3, columns), torch.randn(rows, 3)
        tensors |= {f"{module}.down.weight": down, f"{module}.up.weight": up}
        base[f"{name}.weight"] = torch.randn(rows, columns)
        deltas[f"{name}.weight"] = up.double() @ down.double()
    (folder / "adapter").mkdir(parents=True)
    save_file(tensors, folder / "adapter" / "lora.safetensors")
    return Oracle(write_checkpoint(folder / "base", base, config={}), folder / "adapter", deltas)


_ON = ["q_proj", "v_proj", "down_proj"]
_FLOAT32 = 1e-6  # where PEFT itself computes in float32


def _restore_divisor(model: torch.nn.Module) -> None:
    """AdaLoRA's divisor counts as trainable in PEFT, which never saves it."""
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            torch.nn.init.constant_(parameter, model.peft_config["default"].init_r)


EXAMPLES: dict[str, Callable[[Path], Oracle]] = {
    "checkpoint": _checkpoint,
    "multilora": _multilora,
    "multihead": _multihead,
    "mixture": _mixture,
    "ln_tuning": _ln_tuning,
    "kohya": _kohya,
    "diffusers": _diffusers,
    "adapterhub": _adapterhub,
    "nvlabs_dora": _nvlabs_dora,
    "xlabs": _xlabs,
    "gguf": make_gguf_oracle,
    "litgpt": make_litgpt_oracle,
    "torchtune": partial(_torchtune, dora=False),
    "torchtune_dora": partial(_torchtune, dora=True),
    "mlx": partial(_mlx, dora=False),
    "mlx_dora": partial(_mlx, dora=True),
    "lora": _peft(peft.LoraConfig, r=3, lora_alpha=7, target_modules=_ON),
    "dora": _peft(peft.LoraConfig, r=3, lora_alpha=7, use_dora=True, target_modules=_ON),
    "adalora": _peft(
        peft.AdaLoraConfig, init_r=4, total_step=10, lora_alpha=12, target_modules=_ON, prepare=_restore_divisor
    ),
    "loha": _peft(peft.LoHaConfig, r=3, alpha=6, target_modules=_ON),
    "lokr": _peft(peft.LoKrConfig, r=1, alpha=3, decompose_factor=2, target_modules=_ON),
    "vera": _peft(peft.VeraConfig, r=3, target_modules=_ON, prepare=torch.nn.Module.double),
    "pvera": _peft(peft.PveraConfig, r=3, target_modules=_ON, prepare=torch.nn.Module.double),
    "ia3": _peft(peft.IA3Config, target_modules=_ON, feedforward_modules=["down_proj"]),
    "fourierft": _peft(peft.FourierFTConfig, n_frequency=3, target_modules=_ON, tolerance=_FLOAT32),
    "shira": _peft(peft.ShiraConfig, r=2, target_modules=_ON),
    "c3a": _peft(peft.C3AConfig, block_size=4, target_modules=_ON, tolerance=_FLOAT32),
    "vblora": _peft(
        peft.VBLoRAConfig, r=2, num_vectors=8, vector_length=4, topk=2, vblora_dropout=0.0, target_modules=_ON
    ),
    "randlora": _peft(peft.RandLoraConfig, r=5, target_modules=_ON, prepare=torch.nn.Module.double),
    "trainable_tokens": _peft(peft.TrainableTokensConfig, token_indices=[5, 0, 39], target_modules=["embed_tokens"]),
    "oft": _peft(peft.OFTConfig, oft_block_size=4, target_modules=_ON),
    "boft": _peft(peft.BOFTConfig, boft_block_size=4, target_modules=_ON),
    "hra": _peft(peft.HRAConfig, r=3, target_modules=_ON),
    "miss": _peft(peft.MissConfig, r=4, target_modules=_ON),
    "delora": _peft(peft.DeloraConfig, r=3, target_modules=_ON),
    "hira": _peft(peft.HiraConfig, r=3, target_modules=_ON),
    "road": _peft(peft.RoadConfig, variant="road_2", group_size=8, target_modules=_ON),
    "gralora": _peft(peft.GraloraConfig, r=4, gralora_k=2, alpha=6, target_modules=_ON),
    "deft": _peft(peft.DeftConfig, r=3, target_modules=_ON, tolerance=_FLOAT32),
    "glora": _peft(peft.GloraConfig, r=3, target_modules=_ON),
    "osf": _peft(peft.OSFConfig, effective_rank=6, target_modules=_ON, tolerance=10 * _FLOAT32),
    "supertuning": _peft(peft.SupertuningConfig, sparsity=0.9, target_modules=_ON),
    "peanut": _peft(peft.PeanutConfig, r=3, target_modules=_ON),
    "waveft": _peft(peft.WaveFTConfig, n_frequency=40, scaling=3.0, target_modules=_ON),
    "tinylora": _peft(peft.TinyLoraConfig, r=2, u=5, target_modules=_ON),
    "frod": _peft(peft.FrodConfig, sparse_rate=0.1, progressbar=False, target_modules=_ON, tolerance=_FLOAT32),
    "unilora": _peft(peft.UniLoraConfig, r=3, theta_d_length=50, save_indices=True, target_modules=_ON),
}
