"""torchtune's full weights against transformers' names and rows: its own conversion, written out here."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint

import spectra
from spectra.errors import SourceError
from spectra.models.opening import open_model

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
NAMES = {
    "self_attn.q_proj.weight": "attn.q_proj.weight",
    "self_attn.k_proj.weight": "attn.k_proj.weight",
    "self_attn.v_proj.weight": "attn.v_proj.weight",
    "self_attn.o_proj.weight": "attn.output_proj.weight",
    "mlp.gate_proj.weight": "mlp.w1.weight",
    "mlp.up_proj.weight": "mlp.w3.weight",
    "mlp.down_proj.weight": "mlp.w2.weight",
    "input_layernorm.weight": "sa_norm.scale",
    "post_attention_layernorm.weight": "mlp_norm.scale",
}
TOP = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "output.weight",
}


def permuted(weight, heads):
    """`hf_to_tune`: (heads, 2, d/2) to (heads, d/2, 2)."""
    return weight.view(heads, 2, len(weight) // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def as_torchtune(tensors, *, reorder=True):
    found = {}
    for name, tensor in tensors.items():
        if name in TOP:
            found[TOP[name]] = tensor
            continue
        layer, inner = name.removeprefix("model.layers.").split(".", 1)
        if reorder and inner.startswith(("self_attn.q_proj", "self_attn.k_proj")):
            tensor = permuted(tensor, 4 if ".q_" in inner else 2)
        found[f"layers.{layer}.{NAMES[inner]}"] = tensor
    return found


def write_torchtune(folder, tensors):
    folder.mkdir()
    torch.save(tensors, folder / "model-00001-of-00001.pt")
    return folder


def check(source, tuned, base):
    matrices = {name for name in base if base[name].ndim == 2}
    assert {delta.name for delta in source} == matrices
    for name in matrices:
        assert torch.equal(source[name].read().to_dense(), tuned[name].double() - base[name].double()), name


@pytest.mark.parametrize("side", ["tuned", "base"])
@pytest.mark.parametrize(("kind", "reorder"), [("llama", True), ("gemma", True), ("qwen2", False), ("qwen3", False)])
def test_a_pair_of_which_one_is_torchtunes(kind, reorder, side, tmp_path):
    base, tuned = llama_tensors(seed=0), llama_tensors(seed=1)
    config = {"model_type": kind, **HEADS}
    folders = {}
    for name, tensors in (("base", base), ("tuned", tuned)):
        own = as_torchtune(tensors, reorder=reorder)
        folders[name] = (
            write_torchtune(tmp_path / name, own)
            if name == side
            else write_checkpoint(tmp_path / name, tensors, config=config)
        )
    source = spectra.open_source(folders["tuned"], folders["base"])
    check(source, tuned, base)
    assert not source.coverage.tuned_only
    assert not source.coverage.base_only


def test_two_of_torchtunes_are_compared_as_they_are(tmp_path):
    base, tuned = as_torchtune(llama_tensors(seed=0)), as_torchtune(llama_tensors(seed=1))
    source = spectra.open_source(write_torchtune(tmp_path / "tuned", tuned), write_torchtune(tmp_path / "base", base))
    check(source, tuned, base)


def test_phi3s_parts_are_fused_as_transformers_has_them(tmp_path):
    base, tuned = llama_tensors(layers=1, seed=0), llama_tensors(layers=1, seed=1)

    def fused(tensors):
        stem = "model.layers.0."
        q, k, v, gate, up = (
            tensors[f"{stem}{part}_proj.weight"]
            for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
        )
        rest = {
            name: tensor
            for name, tensor in tensors.items()
            if not any(f"{p}_proj" in name for p in (*"qkv", "gate", "up"))
        }
        return rest | {
            f"{stem}self_attn.qkv_proj.weight": torch.cat([q, k, v]),
            f"{stem}mlp.gate_up_proj.weight": torch.cat([gate, up]),
        }

    folder = write_torchtune(tmp_path / "tuned", as_torchtune(tuned, reorder=False))
    other = write_checkpoint(tmp_path / "base", fused(base), config={"model_type": "phi3", **HEADS})
    check(spectra.open_source(folder, other, split=False), fused(tuned), fused(base))


def test_gemma2s_four_norms_are_told_apart(tmp_path):
    tensors = {f"layers.0.{name}.scale": torch.ones(16) for name in ("sa_norm", "sa_scale", "mlp_norm", "mlp_scale")}
    tensors |= {"layers.0.attn.q_proj.weight": torch.randn(16, 16), "norm.rms_norm.scale": torch.ones(16)}
    names = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    base = {f"model.layers.0.{name}.weight": torch.ones(16) for name in names}
    base |= {"model.layers.0.self_attn.q_proj.weight": torch.randn(16, 16), "model.norm.weight": torch.ones(16)}
    other = write_checkpoint(tmp_path / "base", base, config={"model_type": "gemma2", **HEADS})
    source = spectra.open_source(write_torchtune(tmp_path / "tuned", tensors), other)
    assert not source.coverage.tuned_only
    assert not source.coverage.base_only


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "olmo", **HEADS}, "not known for model_type 'olmo'"),
        ({"model_type": "llama"}, "does not say how many heads"),
        ({"model_type": "llama", "num_attention_heads": 3}, "are not 3 heads"),
    ],
)
def test_rows_whose_order_is_not_known_are_refused_and_the_rest_is_compared(config, words, tmp_path):
    base = write_checkpoint(tmp_path / "base", llama_tensors(seed=0), config=config)
    source = spectra.open_source(write_torchtune(tmp_path / "tuned", as_torchtune(llama_tensors(seed=1))), base)
    assert words in source["model.layers.0.self_attn.q_proj.weight"].reason
    assert source["model.layers.0.mlp.up_proj.weight"].status == "ok"


def test_a_peft_adapter_on_torchtunes_base_takes_a_config_beside_one_of_them(tmp_path):
    prefix = "base_model.model.model.layers.1.self_attn.v_proj"
    tensors = {f"{prefix}.lora_A.weight": torch.randn(2, 16), f"{prefix}.lora_B.weight": torch.randn(8, 2)}
    adapter = write_adapter(tmp_path / "a", tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    weights = llama_tensors()
    (found,) = spectra.open_source(adapter, write_torchtune(tmp_path / "base", as_torchtune(weights)))
    assert torch.equal(found.base.read(), weights["model.layers.1.self_attn.v_proj.weight"].double())


def test_what_only_looks_alike_is_left_alone(tmp_path):
    """Another model's modules of these names, against a base with a prefix before them."""
    tuned = write_checkpoint(tmp_path / "tuned", {"layers.0.attn.q_proj.weight": torch.randn(4, 4)}, config={})
    base = write_checkpoint(tmp_path / "base", {"encoder.layers.0.attn.q_proj.weight": torch.randn(4, 4)}, config={})
    (found,) = spectra.open_source(tuned, base)
    assert found.status == "ok"
    assert open_model(tuned).tensors.keys() == {"layers.0.attn.q_proj.weight"}


def test_nothing_in_common_is_an_error(tmp_path):
    tuned = write_torchtune(tmp_path / "tuned", as_torchtune(llama_tensors()))
    base = write_checkpoint(tmp_path / "base", {"bert.encoder.x.weight": torch.randn(4, 4)}, config={})
    with pytest.raises(SourceError, match="no weight of the tuned model is in the base"):
        spectra.open_source(tuned, base)
