"""Experts: one ΔW per expert, by the base's name, whichever side stacks them."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.checkpoints import nudged, write_checkpoint

import spectra
from spectra.errors import SourceError
from spectra.models import experts

SMALL = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
MODELS = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 3}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {"num_experts": 3, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 6},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": 3, "moe_intermediate_size": 6, "head_dim": 4}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 4,
            "moe_intermediate_size": 6,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 4,
            "q_lora_rank": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 4,
            "qk_nope_head_dim": 4,
        },
    ),
}


def saved_both_ways(folder, kind):
    """A model as transformers writes it (experts apart) and as it keeps it in memory (experts stacked), twice."""
    name, options = MODELS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**SMALL, **options))
    found = {}
    for side in ("base", "tuned"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / side / "apart")
        stacked = folder / side / "stacked"
        stacked.mkdir(parents=True)
        torch.save(model.state_dict(), stacked / "pytorch_model.bin")
        (stacked / "config.json").write_text((folder / side / "apart" / "config.json").read_text())
        found[side] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found[f"{side} apart"] = load_file(folder / side / "apart" / "model.safetensors")
    return found


def experts_in(source):
    return {delta.name: delta for delta in source if ".experts." in delta.name}


@pytest.mark.parametrize("tuned_layout", ["apart", "stacked"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_base_with_experts_apart_names_them(kind, tuned_layout, tmp_path):
    models = saved_both_ways(tmp_path, kind)
    base, tuned = models["base apart"], models["tuned apart"]
    source = spectra.open_source(tmp_path / "tuned" / tuned_layout, tmp_path / "base" / "apart")
    expected = {name: tuned[name].double() - base[name].double() for name in base if base[name].ndim == 2}
    assert {delta.name for delta in source} == set(expected)
    for delta in source:
        assert torch.equal(delta.read().to_dense(), expected[delta.name]), delta.name
    assert not source.coverage.base_only
    assert not source.coverage.tuned_only
    assert {delta.role for delta in experts_in(source).values()} == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("tuned_layout", ["apart", "stacked"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_base_with_stacked_experts_names_stack_index_and_half(kind, tuned_layout, tmp_path):
    models = saved_both_ways(tmp_path, kind)
    expected = {}
    for name in models["base"]:
        delta = models["tuned"][name].double() - models["base"][name].double()
        if name.endswith("gate_up_proj"):
            for index, each in enumerate(delta):
                half = each.shape[0] // 2
                expected |= {f"{name}[{index}][gate]": each[:half], f"{name}[{index}][up]": each[half:]}
        elif name.endswith("experts.down_proj"):
            expected |= {f"{name}[{index}]": each for index, each in enumerate(delta)}
    source = spectra.open_source(tmp_path / "tuned" / tuned_layout, tmp_path / "base" / "stacked")
    got = experts_in(source)
    assert {name for name in got if "shared" not in name} == set(expected)
    for name, matrix in expected.items():
        assert torch.equal(got[name].read().to_dense(), matrix), name
        last = name.rpartition("[")[2][:-1]
        assert got[name].role == ("down_proj" if last.isdigit() else f"{last}_proj")


def test_without_splitting_a_stack_keeps_gate_and_up_together(tmp_path):
    models = saved_both_ways(tmp_path, "mixtral")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stacked = spectra.open_source(tmp_path / "tuned" / "stacked", tmp_path / "base" / "stacked", split=False)
    delta = models["tuned"][name].double() - models["base"][name].double()
    assert torch.equal(stacked[f"{name}[1]"].read().to_dense(), delta[1])
    mixed = spectra.open_source(tmp_path / "tuned" / "apart", tmp_path / "base" / "stacked", split=False)
    assert torch.equal(mixed[f"{name}[1][up]"].read().to_dense(), delta[1, 12:])
    assert any("one side only" in warning for warning in mixed.coverage.warnings)


def hand_made(folder, tensors, config):
    tuned = nudged(tensors)
    return tuned, spectra.open_source(
        write_checkpoint(folder / "t", tuned, config=config), write_checkpoint(folder / "b", tensors, config=config)
    )


def test_transposed_and_interleaved_stacks(tmp_path):
    """gpt-oss and Llama 4 apply x @ W[e]; gpt-oss takes gate and up from even and odd columns."""
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(3, 4, 10),
        "model.layers.0.mlp.experts.down_proj": torch.randn(3, 5, 4),
    }
    name, down = tensors
    for kind in ("gpt_oss", "llama4_text"):
        tuned, source = hand_made(tmp_path / kind, tensors, {"model_type": kind})
        delta = {key: tuned[key].double() - tensors[key].double() for key in tensors}
        gate, up = (delta[name][..., 0::2], delta[name][..., 1::2]) if kind == "gpt_oss" else delta[name].chunk(2, -1)
        for index in range(3):
            assert torch.equal(source[f"{name}[{index}][gate]"].read().to_dense(), gate[index].T)
            assert torch.equal(source[f"{name}[{index}][up]"].read().to_dense(), up[index].T)
            assert torch.equal(source[f"{down}[{index}]"].read().to_dense(), delta[down][index].T)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4"])
def test_what_transformers_multiplies(kind, tmp_path):
    """The same against the model's own code: the output of one expert from our parts."""
    options = SMALL | {"num_local_experts": 2, "head_dim": 4, "intermediate_size": 6}
    if kind == "gpt_oss":
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig as Config
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts
    else:
        from transformers import Llama4TextConfig as Config
        from transformers.models.llama4.modeling_llama4 import Llama4TextExperts as Experts
    torch.manual_seed(0)
    module = Experts(Config(**options)).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.zeros_like(parameter) if "bias" in name else torch.randn_like(parameter))
    prefix = "model.layers.0.mlp.experts."
    tensors = {prefix + name: tensor.clone() for name, tensor in module.state_dict().items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    config = {"model_type": "llama4_text" if kind == "llama4" else kind}
    source = spectra.open_source(
        write_checkpoint(tmp_path / "t", tensors, config=config), write_checkpoint(tmp_path / "b", zeros, config=config)
    )
    gate, up = (source[f"{prefix}gate_up_proj[1][{half}]"].read().to_dense() for half in ("gate", "up"))
    down = source[f"{prefix}down_proj[1]"].read().to_dense()
    x = 0.1 * torch.randn(5, 8, dtype=torch.float64)
    if kind == "gpt_oss":
        expected = module(x, torch.ones(5, 1, dtype=torch.long), torch.ones(5, 1, dtype=torch.float64))
        g, u = (x @ gate.T).clamp(max=7.0), (x @ up.T).clamp(-7.0, 7.0)
        middle = (u + 1) * g * torch.sigmoid(1.702 * g)
    else:
        expected = module(torch.cat([x, x]))[5:]
        middle = (x @ up.T) * torch.nn.functional.silu(x @ gate.T)
    assert torch.allclose(middle @ down.T, expected, rtol=1e-10)


def test_dbrx_stacks_rows_and_transposes_the_last(tmp_path):
    config = {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 3}}
    prefix = "transformer.blocks.0.ffn.experts.mlp."
    tensors = {prefix + part: torch.randn(15, 4) for part in ("w1", "v1", "w2")}
    tuned, source = hand_made(tmp_path, tensors, config)
    for part in ("w1", "v1", "w2"):
        delta = (tuned[prefix + part].double() - tensors[prefix + part].double()).reshape(3, 5, 4)
        for index in range(3):
            expected = delta[index].T if part == "w2" else delta[index]
            assert torch.equal(source[f"{prefix}{part}[{index}]"].read().to_dense(), expected)


def test_granite_under_its_old_and_new_names(tmp_path):
    config = {"model_type": "granitemoe"}
    old = {"model.layers.0.block_sparse_moe.input_linear.weight": torch.randn(2, 12, 4)}
    new = {"model.layers.0.block_sparse_moe.experts.gate_up_proj": torch.randn(2, 12, 4)}
    source = spectra.open_source(
        write_checkpoint(tmp_path / "t", new, config=config), write_checkpoint(tmp_path / "b", old, config=config)
    )
    (before,), (after,) = old.values(), new.values()
    name = "model.layers.0.block_sparse_moe.input_linear.weight[1][up]"
    assert torch.equal(source[name].read().to_dense(), (after.double() - before.double())[1, 6:])


def test_one_expert_is_read_without_the_others(tmp_path):
    tensors = {"model.layers.0.mlp.experts.down_proj": torch.randn(3, 8, 4)}
    _, source = hand_made(tmp_path, tensors, {"model_type": "mixtral"})
    ref = source.deltas[2].recipe.tuned
    whole = load_file(tmp_path / "t" / "model.safetensors")["model.layers.0.mlp.experts.down_proj"]
    assert ref.stored == (8, 4)
    assert torch.equal(ref.read(), whole[2])


def test_a_broken_stack_costs_its_experts_only(tmp_path):
    saved_both_ways(tmp_path, "mixtral")
    state = torch.load(tmp_path / "tuned" / "stacked" / "pytorch_model.bin")
    name = "model.layers.1.mlp.experts.down_proj"
    kept = {key: tensor.clone() for key, tensor in state.items() if key <= name}  # the file has them in this order
    folder = write_checkpoint(tmp_path / "cut", kept, config={"model_type": "mixtral"})
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-4])
    for base in ("apart", "stacked"):
        source = spectra.open_source(folder, tmp_path / "base" / base)
        bad = [delta for delta in source if delta.status != "ok"]
        assert {delta.status for delta in bad} == {"unreadable"}
        assert [delta.name for delta in bad] == (
            [f"model.layers.1.block_sparse_moe.experts.{index}.w2.weight" for index in range(3)]
            if base == "apart"
            else [f"{name}[{index}]" for index in range(3)]
        )
        assert len(source) > len(bad)


def test_both_layouts_in_one_file_are_refused(tmp_path):
    saved_both_ways(tmp_path, "mixtral")
    base = tmp_path / "base" / "apart"
    twice = load_file(base / "model.safetensors")
    twice["model.layers.0.mlp.experts.down_proj"] = torch.ones(3, 8, 12)
    save_file(twice, base / "model.safetensors")
    with pytest.raises(SourceError, match="one weight in two layouts"):
        spectra.open_source(tmp_path / "tuned" / "apart", base)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.block_sparse_moe.input_linear.weight",
        "model.layers.0.block_sparse_moe.output_linear.weight",
        *(f"blocks.0.ffn.experts.mlp.{part}" for part in ("w1", "v1", "w2")),
    ],
)
def test_the_end_of_a_name_rules_out_no_stack(name):
    assert experts._STACKED.fullmatch(name)
    assert experts._stacked(name)
    assert not experts._stacked(f"{name}.bias")
    assert not experts._stacked("model.layers.0.mlp.down_proj")
