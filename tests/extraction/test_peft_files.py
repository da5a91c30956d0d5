"""Adapters that PEFT loads: merging one adds the truncated ΔW to every weight, in each architecture's own layout."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.extracted import assert_close, make_pair, truncated
from support.peft_oracle import Convolutions
from support.peft_oracle import tiny_model as plain
from support.tiny_models import tiny_model

import spectra
from spectra.errors import SelectionError

MOE = {"num_local_experts": 3, "num_experts": 3, "n_routed_experts": 4, "tie_word_embeddings": False}
MODELS = {
    "llama": lambda: plain("llama").float(),
    "gpt2": lambda: plain("gpt2").float(),  # Conv1D, a fused projection, a tied head
    "bert": lambda: plain("bert").float(),
    "opt": lambda: plain("opt").float(),
    "gpt_neox": lambda: plain("gpt_neox").float(),  # interleaved heads, and a head that was renamed
    "phi3": lambda: tiny_model("Phi3ForCausalLM", "phi3"),
    "t5": lambda: tiny_model("T5ForConditionalGeneration", "t5"),
    "mixtral": lambda: tiny_model("MixtralForCausalLM", "mixtral", **MOE),
    "qwen3_moe": lambda: tiny_model("Qwen3MoeForCausalLM", "qwen3_moe", **MOE),
    "gpt_oss": lambda: tiny_model("GptOssForCausalLM", "gpt_oss", **MOE),
}


def matrices(pair):
    """Names in memory of what a LoRA should reach: matrices and stacks of them, not stacked biases."""
    return {
        name for name in pair.before if pair.before[name].ndim >= 2 and not name.endswith("bias") and pair.moved(name)
    }


@pytest.mark.parametrize("kind", MODELS)
def test_merging_adds_the_truncated_update_to_every_matrix(kind, tmp_path):
    pair = make_pair(tmp_path, MODELS[kind])
    table = spectra.extract(spectra.open_source(pair.tuned, pair.base), tmp_path / "out", rank=3)
    merged = pair.merged(tmp_path / "out")
    assert set(merged) == matrices(pair)
    for name, delta in merged.items():
        assert_close(delta, truncated(pair.update(name), 3))
    left = set(table.attrs["not_carried"])
    assert not set(table["name"]) & left
    assert len(left) == sum(pair.moved(name) for name in pair.before if name not in merged)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_every_module_has_its_own_rank(kind, tmp_path):
    pair = make_pair(tmp_path, MODELS[kind])
    source = spectra.open_source(pair.tuned, pair.base, split=False)
    table = spectra.extract(source, tmp_path / "out", parameters=4000)
    assert table["parameters"].sum() <= 4000
    assert len(set(table["rank"])) > 2
    merged = pair.merged(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == config["rank_pattern"]
    for row in table.itertuples():
        name = row.name.replace("block_sparse_moe", "mlp")
        if not row.rank:
            assert name not in merged
            continue
        update = pair.update(name)
        assert_close(merged[name], truncated(update, row.rank))
        measured = (merged[name] - update).norm() / update.norm()
        assert float(measured) == pytest.approx(row.relative_error, abs=2e-6)


def test_convolutions_keep_their_kernels(tmp_path):
    class Small(Convolutions):
        def __init__(self):
            super().__init__()
            del self.grouped  # PEFT merges none with groups
            self.conv = self.one
            del self.one
            self.float()

    pair = make_pair(tmp_path, Small)
    spectra.extract(spectra.open_source(pair.tuned, pair.base), tmp_path / "out", rank=2)
    merged = pair.merged(tmp_path / "out")
    assert set(merged) == {"two.weight", "conv.weight", "point.weight", "linear.weight"}
    for name, delta in merged.items():
        update = pair.update(name)
        assert_close(delta.flatten(1), truncated(update.flatten(1), 2))


def test_a_fused_projection_is_one_lora_whether_it_was_split_or_not(tmp_path):
    pair = make_pair(tmp_path, MODELS["gpt2"])
    tables = [
        spectra.extract(spectra.open_source(pair.tuned, pair.base, split=split), tmp_path / str(split), rank=3)
        for split in (True, False)
    ]
    assert tables[0]["name"].tolist() == tables[1]["name"].tolist()
    assert tables[0]["relative_error"].to_numpy() == pytest.approx(tables[1]["relative_error"].to_numpy(), abs=1e-9)


def test_one_part_of_a_fused_projection_changes_its_own_rows_only(tmp_path):
    pair = make_pair(tmp_path, MODELS["gpt2"])
    source = spectra.open_source(pair.tuned, pair.base).select("v_proj")
    spectra.extract(source, tmp_path / "out", rank=4)
    merged = pair.merged(tmp_path / "out")
    assert set(merged) == {f"transformer.h.{layer}.attn.c_attn.weight" for layer in range(2)}
    for name, delta in merged.items():
        expected = torch.zeros_like(delta)
        expected[:, 32:] = truncated(pair.update(name)[:, 32:], 4)
        assert_close(delta, expected)


def test_a_bare_checkpoint_of_a_model_with_a_head_gets_the_names_that_it_has_in_memory(tmp_path):
    def bare():
        model = transformers.GPT2Model(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
        model.config.architectures = ["GPT2LMHeadModel"]  # as the hub's gpt2 says beside such names
        return model

    pair = make_pair(tmp_path, bare)
    for folder in (pair.base, pair.tuned):
        config = json.loads((folder / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
        (folder / "config.json").write_text(json.dumps(config))
    spectra.extract(spectra.open_source(pair.tuned, pair.base), tmp_path / "out", rank=2)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "transformer.h.0.attn.c_attn" in config["target_modules"]


def test_what_was_resized_is_carried_as_far_as_both_have_it(tmp_path):
    base = tmp_path / "base"
    small, large = MODELS["llama"](), MODELS["llama"]()
    small.save_pretrained(base)
    large.resize_token_embeddings(44)
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    large.save_pretrained(tmp_path / "tuned")
    table = spectra.extract(spectra.open_source(tmp_path / "tuned", base), tmp_path / "out", rank=3)
    assert "44" in table.attrs["not_carried"]["model.embed_tokens.weight"]
    assert "model.embed_tokens.weight" in set(table["name"])
    pair_before = small.state_dict()["model.embed_tokens.weight"].detach().double()
    import peft

    merged = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "out"
    ).merge_and_unload()
    got = merged.state_dict()["model.embed_tokens.weight"].detach().double() - pair_before
    update = large.state_dict()["model.embed_tokens.weight"].detach().double()[:40] - pair_before
    assert_close(got, truncated(update, 3))


def test_a_tied_head_follows_the_embedding_once_merged_and_the_row_says_so(tmp_path):
    pair = make_pair(tmp_path, MODELS["gpt2"])
    table = spectra.extract(spectra.open_source(pair.tuned, pair.base), tmp_path / "out", rank=3)
    merged = pair.merged(tmp_path / "out")
    assert torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])
    notes = table.set_index("name").note
    assert "once the adapter is merged" in notes["transformer.wte.weight"]
    assert notes["transformer.wpe.weight"] == ""


def test_experts_alone_where_one_of_them_did_not_change(tmp_path):
    pair = make_pair(tmp_path, MODELS["mixtral"])
    before, after = (load_file(folder / "model.safetensors") for folder in (pair.base, pair.tuned))
    same = {name: tensor for name, tensor in before.items() if "experts.1." in name}
    save_file(after | same, pair.tuned / "model.safetensors", {"format": "pt"})
    source = spectra.open_source(pair.tuned, pair.base).select("re:experts")
    table = spectra.extract(source, tmp_path / "out", rank=3)
    assert set(table["parameters"] / table["rank"]) == {3 * (16 + 2 * 24), 3 * (16 + 24)}
    merged = pair.merged(tmp_path / "out")
    assert len(merged) == len(table) == 4
    for name, delta in merged.items():
        update = pair.update(name)
        update[1] = 0
        assert_close(delta, truncated(update, 3))


def test_replicated_layers_keep_what_their_numbers_mean(tmp_path):
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]])
    torch.manual_seed(0)
    adapted = peft.get_peft_model(plain("llama").float(), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    source = spectra.open_source(tmp_path / "adapter")
    spectra.extract(source, tmp_path / "out", rank=3)
    again = peft.PeftModel.from_pretrained(plain("llama").float(), tmp_path / "out")
    found = {name: module for name, module in again.named_modules() if name.endswith("q_proj")}
    assert len(found) == len(source) == 4
    for name, module in found.items():
        delta = source[f"{name.removeprefix('base_model.model.')}.weight"].read().to_dense()
        assert torch.allclose(module.get_delta_weight("default").double(), delta, atol=1e-4)
    other = tmp_path / "adapter" / "adapter_config.json"
    sources = [source]
    other.write_text(json.dumps(json.loads(other.read_text()) | {"layer_replication": [[0, 1], [0, 1]]}))
    shutil.copytree(tmp_path / "adapter", tmp_path / "other")
    other.write_text(json.dumps(json.loads(other.read_text()) | {"layer_replication": [[0, 2], [0, 2]]}))
    sources.append(spectra.open_source(tmp_path / "other"))
    with pytest.raises(SelectionError, match="different layer_replication"):
        spectra.extract(sources, tmp_path / "both", rank=3)
