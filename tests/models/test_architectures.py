"""Fused projections: the parts are what the model's own forward uses as queries, keys, values, gate and up.

The oracle runs tiny random transformers models on single tokens, where a rotary embedding is the
identity, and catches what reaches the attention. The base is zero, so that a part of ΔW is a part of W.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.checkpoints import write_checkpoint
from support.peft_oracle import save_model
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

import spectra
from spectra.models import architectures
from spectra.naming import role_of

caught: list[tuple[torch.Tensor, ...]] = []


def spy(module, query, key, value, attention_mask, **options):
    caught.append((query, key, value))
    repeats = query.shape[1] // value.shape[1]
    return value.repeat_interleave(repeats, 1).transpose(1, 2).contiguous(), None


AttentionInterface.register("spy", spy)
SMALL = {
    "vocab_size": 11,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": 11, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 16}
FALCON = SMALL | {"num_attention_heads": 6, "alibi": False}
MODELS = {
    "gpt2": ("GPT2LMHeadModel", GPT, "c_attn", "attention"),
    "openai-gpt": ("OpenAIGPTLMHeadModel", GPT, "c_attn", "_attn"),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL, "query_key_value", "attention"),
    "bloom": (
        "BloomForCausalLM",
        {"vocab_size": 11, "hidden_size": 24, "n_layer": 1, "n_head": 4},
        "query_key_value",
        "_reshape",
    ),
    "persimmon": (
        "PersimmonForCausalLM",
        SMALL | {"hidden_size": 32, "qk_layernorm": False},
        "query_key_value",
        "_split_heads",
    ),
    "falcon 7b": ("FalconForCausalLM", FALCON | {"multi_query": True}, "query_key_value", "_split_heads"),
    "falcon 1b": ("FalconForCausalLM", FALCON | {"multi_query": False}, "query_key_value", "_split_heads"),
    "falcon 40b": (
        "FalconForCausalLM",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        "query_key_value",
        "_split_heads",
    ),
    "phi3": ("Phi3ForCausalLM", SMALL | {"num_key_value_heads": 2}, "qkv_proj", "attention"),
    "bigcode mqa": ("GPTBigCodeForCausalLM", GPT | {"multi_query": True}, "c_attn", "attention"),
    "bigcode mha": ("GPTBigCodeForCausalLM", GPT | {"multi_query": False}, "c_attn", "attention"),
    "codegen": (
        "CodeGenForCausalLM",
        GPT | {"n_embd": 32, "n_head": 8, "rotary_dim": 4, "n_ctx": 16},
        "qkv_proj",
        "_attn",
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        SMALL | {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 1},
        "Wqkv",
        "attention",
    ),
}


def build(name, options):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**options)).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.zeros_like(parameter) if key.endswith("bias") else torch.randn_like(parameter))
    return model


def deltas_of(folder, model):
    """The parts of tuned − 0, by module."""
    tuned = save_model(folder / "tuned", model)
    config = json.loads(json.dumps(model.config.to_dict(), default=str))
    (tuned / "config.json").write_text(json.dumps(config))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(tuned / "model.safetensors").items()}
    write_checkpoint(folder / "base", zeros, config=config)
    return spectra.open_source(tuned, folder / "base")


def watch(model, fused, where):
    """Hidden states that enter the fused projection, and q, k, v as (tokens, entries), for single tokens."""
    inputs = []
    (module,) = [module for name, module in model.named_modules() if name.endswith(fused)]
    module.register_forward_hook(lambda _, args, out: inputs.append(args[0].reshape(-1)))
    caught.clear()
    if where == "attention":
        model.set_attn_implementation("spy")
    else:
        (owner,) = [item for item in model.modules() if fused in dict(item.named_children())]
        original = getattr(owner, where)

        def wrapped(*args, **options):
            out = original(*args, **options)
            caught.append(args[:3] if where == "_attn" else out)
            return out

        setattr(owner, where, wrapped)
    with torch.no_grad():
        for token in range(3, 9):
            model(torch.tensor([[token]]))
    return torch.stack(inputs), [torch.stack([each[i].reshape(-1) for each in caught]) for i in range(3)]


@pytest.mark.parametrize("case", MODELS)
def test_parts_are_what_the_attention_gets(case, tmp_path):
    name, options, fused, where = MODELS[case]
    model = build(name, options)
    source = deltas_of(tmp_path, model)
    hidden, expected = watch(model, fused, where)
    parts = {delta.name[-2]: delta for delta in source if f"{fused}.weight[" in delta.name}
    assert set(parts) == {"q", "k", "v"}
    for part, activations in zip("qkv", expected, strict=True):
        got = hidden @ parts[part].read().to_dense().T
        if case == "falcon 40b" and part != "q":  # the model repeats keys and values for its query heads
            activations = activations.reshape(len(hidden), 2, 3, 4)[:, :, 0].reshape(len(hidden), -1)
        assert got.shape == activations.shape
        tolerance = 1e-7 if case == "modernbert" else 1e-14  # ModernBERT rotates queries and keys in float32
        assert torch.allclose(got, activations, rtol=0, atol=tolerance * float(activations.norm())), part
        assert parts[part].role == f"{part}_proj"


def fused_tensor(model, fused):
    (found,) = [(name, module) for name, module in model.named_modules() if name.endswith(fused)]
    weight = found[1].weight.detach()
    return f"{found[0]}.weight", weight.T if isinstance(found[1], Conv1D) else weight


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "falcon 40b", "codegen"])
def test_parts_together_are_the_whole_and_split_false_keeps_it(case, tmp_path):
    name, options, fused, _ = MODELS[case]
    model = build(name, options)
    parts = [delta for delta in deltas_of(tmp_path, model) if f"{fused}.weight[" in delta.name]
    stored, weight = fused_tensor(model, fused)
    whole = spectra.open_source(tmp_path / "tuned", tmp_path / "base", split=False)
    assert torch.equal(whole[stored].read().to_dense(), weight)
    rows = torch.cat([part.read().to_dense() for part in parts])
    assert torch.equal(rows.unique(dim=0), weight.unique(dim=0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Phi3ForCausalLM", SMALL | {"num_key_value_heads": 2}),
        ("GlmForCausalLM", SMALL | {"num_key_value_heads": 2, "head_dim": 8}),
        ("Glm4ForCausalLM", SMALL | {"num_key_value_heads": 2, "head_dim": 8}),
        ("ModernBertForMaskedLM", MODELS["modernbert"][1]),
    ],
)
def test_gate_and_up_are_what_the_mlp_multiplies(name, options, tmp_path):
    model = build(name, options)
    source = deltas_of(tmp_path, model)
    (mlp,) = [module for key, module in model.named_modules() if key.endswith(".mlp")]
    fused, last = (mlp.Wi, mlp.Wo) if hasattr(mlp, "Wi") else (mlp.gate_up_proj, mlp.down_proj)
    seen = {}
    fused.register_forward_hook(lambda _, args, out: seen.update(x=args[0].reshape(-1)))
    last.register_forward_hook(lambda _, args, out: seen.update(product=args[0].reshape(-1)))
    with torch.no_grad():
        model(torch.tensor([[5]]))
    halves = {role_of(delta.name): delta for delta in source if delta.name.endswith(("[gate]", "[up]"))}
    gate, up = (halves[role].read().to_dense() @ seen["x"] for role in ("gate_proj", "up_proj"))
    activation = mlp.act if hasattr(mlp, "act") else mlp.activation_fn
    assert torch.allclose(activation(gate) * up, seen["product"], rtol=1e-10)


def cuts(config, name, rows):
    """The rows that each part takes, by cutting the row numbers themselves."""
    import numpy as np

    class Rows:
        def __init__(self, array):
            self.array, self.shape = array, array.shape

        def rows(self, start, stop):
            return Rows(self.array[start:stop])

        def reshape(self, *shape):
            return Rows(self.array.reshape(shape))

        def permute(self, *axes):
            return Rows(self.array.transpose(axes))

    found = architectures.parts(config, name, rows)
    return {part: cut(Rows(np.arange(rows))).array.tolist() for part, cut in found.items()}


def by_blocks(order, heads, width):
    """Row numbers per part where blocks of `width` rows come in this order, `heads` times over."""
    found: dict[str, list[int]] = {}
    for index, part in enumerate(order * heads):
        found.setdefault(part, []).extend(range(index * width, (index + 1) * width))
    return found


FORMULAS = {  # the layouts of models whose code is not in transformers, written out
    "qwen v1": ({"model_type": "qwen"}, "transformer.h.0.attn.c_attn.weight", 48, by_blocks("qkv", 1, 16)),
    "baichuan": ({"model_type": "baichuan"}, "model.layers.0.self_attn.W_pack.weight", 48, by_blocks("qkv", 1, 16)),
    "internlm2": (
        {"model_type": "internlm2", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24},
        "model.layers.0.attention.wqkv.weight",
        40,
        by_blocks("qqqkv", 2, 4),
    ),
    "chatglm 2": (
        {
            "model_type": "chatglm",
            "num_attention_heads": 4,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "kv_channels": 6,
            "hidden_size": 24,
        },
        "transformer.encoder.layers.0.self_attention.query_key_value.weight",
        48,
        by_blocks("qqqqkkvv", 1, 6),
    ),
    "chatglm 1": (
        {"model_type": "chatglm", "num_attention_heads": 4, "hidden_size": 24},
        "transformer.layers.0.attention.query_key_value.weight",
        72,
        by_blocks("qkv", 4, 6),
    ),
    "mpt": (
        {"model_type": "mpt", "n_heads": 4, "d_model": 24, "attn_config": {}},
        "transformer.blocks.0.attn.Wqkv.weight",
        72,
        by_blocks("qkv", 1, 24),
    ),
    "mpt grouped": (
        {"model_type": "mpt", "n_heads": 4, "d_model": 24, "attn_config": {"kv_n_heads": 2}},
        "transformer.blocks.0.attn.Wqkv.weight",
        48,
        by_blocks("qqqqkkvv", 1, 6),
    ),
    "dbrx": (
        {"model_type": "dbrx", "n_heads": 4, "d_model": 24, "attn_config": {"kv_n_heads": 2}},
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight",
        48,
        by_blocks("qqqqkkvv", 1, 6),
    ),
    "qwen2-vl": (
        {"model_type": "qwen2_vl", "vision_config": {}},
        "visual.blocks.0.attn.qkv.weight",
        48,
        by_blocks("qkv", 1, 16),
    ),
    "gpt2 cross attention": (
        {"model_type": "gpt2"},
        "transformer.h.0.crossattention.c_attn.weight",
        48,
        by_blocks("kv", 1, 24),
    ),
    "inside a vision-language model": (
        {
            "model_type": "llava",
            "text_config": {
                "model_type": "phi3",
                "num_attention_heads": 4,
                "hidden_size": 24,
                "num_key_value_heads": 2,
            },
        },
        "language_model.model.layers.0.self_attn.qkv_proj.weight",
        48,
        by_blocks("qqqqkkvv", 1, 6),
    ),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_layouts_written_out(case):
    config, name, rows, expected = FORMULAS[case]
    assert cuts(config, name, rows) == expected


NEOX = {"model_type": "gpt_neox", "num_attention_heads": 4, "hidden_size": 24}
QKV = "gpt_neox.layers.0.attention.query_key_value.weight"


@pytest.mark.parametrize(
    ("config", "name", "rows"),
    [
        ({}, QKV, 72),
        ({"model_type": "brand_new", "num_attention_heads": 4}, QKV, 72),
        ({"model_type": "gpt_neox"}, QKV, 72),  # how many heads?
        (NEOX | {"num_attention_heads": "4"}, QKV, 72),
        (NEOX | {"num_attention_heads": -4}, QKV, 72),
        (NEOX | {"hidden_size": 48}, QKV, 72),  # the config is another model's
        (NEOX | {"num_attention_heads": 5}, QKV, 72),
        (NEOX, "gpt_neox.layers.0.attention.dense.weight", 72),
        (
            {"model_type": "mpt", "n_heads": 4, "d_model": 24, "attn_config": {}},
            "transformer.blocks.0.attn.Wqkv.weight",
            36,
        ),
        ({"model_type": "chatglm", "num_attention_heads": 4}, "transformer.layers.0.mlp.dense_h_to_4h.weight", 96),
        ({"model_type": "gpt2"}, "transformer.h.0.attn.c_attn.weight", 47),
        ({"model_type": ["gpt2"]}, "transformer.h.0.attn.c_attn.weight", 48),
    ],
)
def test_nothing_is_cut_on_a_guess(config, name, rows):
    assert architectures.parts(config, name, rows) == {}


def test_a_config_nested_without_end_ends():
    config: dict = {"model_type": "gpt2"}
    for _ in range(50_000):
        config = {"model_type": "x", "text_config": config}
    assert architectures.parts(config, "h.0.attn.c_attn.weight", 48) == {}


def test_only_conv1d_is_transposed(tmp_path):
    model = build("GPT2LMHeadModel", GPT | {"add_cross_attention": True})
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    config = {"model_type": "gpt2"}
    assert {name for name, _ in model.named_parameters() if architectures.is_conv1d(config, name)} == conv1d
    assert any("crossattention" in name for name in conv1d)
    bigcode = {"model_type": "gpt_bigcode"}
    assert not architectures.is_conv1d(bigcode, "transformer.h.0.attn.c_attn.weight")
