"""PEFT's own merges, of every kind of adapter and in every type, are what a merge should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.examples import EXAMPLES
from support.merges import Merge, peft_merge
from support.peft_oracle import Convolutions, save_model, tiny_model

import spectra

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ON = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=ON),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=ON),
    "patterns": lambda: peft.LoraConfig(
        r=4, target_modules=ON, rank_pattern={"v_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 3}
    ),
    "embeddings": lambda: peft.LoraConfig(r=4, target_modules=[*ON, "embed_tokens", "lm_head"]),
    "saved whole": lambda: peft.LoraConfig(r=4, target_modules=ON, modules_to_save=["lm_head", "norm"]),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=ON),
    "pissa": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=ON, init_lora_weights="pissa"),
    "tokens": lambda: peft.LoraConfig(r=4, target_modules=ON, trainable_token_indices=[1, 5]),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=6, target_modules=ON),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=3, decompose_factor=2, target_modules=ON),
    "ia3": lambda: peft.IA3Config(target_modules=ON, feedforward_modules=["down_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=ON),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=ON),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=ON),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=ON),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=30, target_modules=ON),
    "shira": lambda: peft.ShiraConfig(r=2, target_modules=ON),
    "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=ON),
    "vblora": lambda: peft.VBLoRAConfig(
        r=2, num_vectors=8, vector_length=4, topk=2, vblora_dropout=0.0, target_modules=ON
    ),
    "randlora": lambda: peft.RandLoraConfig(r=5, target_modules=ON),
    "miss": lambda: peft.MissConfig(r=4, target_modules=ON),
    "delora": lambda: peft.DeloraConfig(r=3, target_modules=ON),
    "hira": lambda: peft.HiraConfig(r=3, target_modules=ON),
    "road": lambda: peft.RoadConfig(variant="road_2", group_size=8, target_modules=ON),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, alpha=6, target_modules=ON),
    "deft": lambda: peft.DeftConfig(r=3, target_modules=ON),
    "glora": lambda: peft.GloraConfig(r=3, target_modules=ON),
    "osf": lambda: peft.OSFConfig(effective_rank=6, target_modules=ON),
    "supertuning": lambda: peft.SupertuningConfig(sparsity=0.9, target_modules=ON),
    "peanut": lambda: peft.PeanutConfig(r=3, target_modules=ON),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=40, scaling=3.0, target_modules=ON),
    "tinylora": lambda: peft.TinyLoraConfig(r=2, u=5, target_modules=ON),
    "frod": lambda: peft.FrodConfig(sparse_rate=0.1, progressbar=False, target_modules=ON),
    "unilora": lambda: peft.UniLoraConfig(r=3, theta_d_length=50, save_indices=True, target_modules=ON),
}
MODES = {
    "float32": {"stored": F32},
    "bfloat16": {"stored": BF16},
    "float16": {"stored": F16},
    "float32 loaded in bfloat16": {"stored": F32, "loaded": BF16},
    "bfloat16 loaded in float32": {"stored": BF16, "loaded": F32},
    "adapter in bfloat16": {"stored": BF16, "autocast": False},
}
# Whose float32 arithmetic is done again: every mode is bit for bit.
REPLAYED = ("lora", "rslora", "patterns", "embeddings", "saved whole", "vera", "shira", "supertuning", "ia3")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_merge_is_what_it_should_be(tmp_path, name, mode):
    merge = peft_merge(tmp_path, CONFIGS[name](), **MODES[mode])
    report = spectra.verify_merge(*merge.paths)
    assert report.ok, list(report)
    assert report.verdict == "exact" or name not in REPLAYED
    assert all(row.replay for row in report)
    assert report.untouched == 16 - len(report)


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("stored", [F32, BF16, F16])
def test_merges_of_which_every_step_is_known_are_exact(tmp_path, name, stored):
    report = spectra.verify_merge(*peft_merge(tmp_path, CONFIGS[name](), stored=stored, size=0.2).paths)
    assert report.counts == {"exact": 6}


def test_the_order_of_operations_is_told(tmp_path):
    def replays(folder: str, **options: object) -> set[str]:
        merge = peft_merge(tmp_path / folder, CONFIGS["lora"](), **options)
        return {row.replay.partition("(")[2] for row in spectra.verify_merge(*merge.paths)}

    assert replays("plain", stored=BF16) == {"PEFT, mergekit)"}
    assert replays("safe", stored=BF16, safe=True) == {"PEFT's safe_merge)"}
    assert replays("loaded", loaded=BF16) == {"PEFT on a model loaded in M's type)"}
    raw = replays("raw", stored=BF16, autocast=False)
    assert raw <= {"PEFT's safe_merge)", "PEFT, 16-bit adapter)"}


@pytest.mark.parametrize("stored", [F32, BF16])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gpt2", peft.LoraConfig(target_modules=["c_attn", "mlp.c_proj", "wte"], fan_in_fan_out=True)),
        ("gpt2", peft.LoraConfig(target_modules=["lm_head", "c_attn"], fan_in_fan_out=True)),
        ("gpt2", peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)),
        ("bert", peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])),
        ("opt", peft.LoraConfig(target_modules=["q_proj", "fc1"])),
        ("gpt_neox", peft.LoraConfig(target_modules=["query_key_value", "dense"])),
        (Convolutions(), peft.LoraConfig(target_modules=["two", "point", "linear"])),
        (Convolutions(), peft.LoraConfig(target_modules=["two", "linear"], use_dora=True)),
    ],
)
def test_any_layout_of_the_base(tmp_path, kind, config, stored):
    report = spectra.verify_merge(*peft_merge(tmp_path, config, kind=kind, stored=stored).paths)
    assert report.ok, list(report)


def test_a_layer_selects_parts_of_what_is_fused(tmp_path):
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    merge = peft_merge(tmp_path, config, kind="gpt2")
    report = spectra.verify_merge(*merge.paths, layers="v_proj")
    assert [row.name for row in report] == [f"transformer.h.{i}.attn.c_attn.weight[v]" for i in (0, 1)]


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_one_tied_weight_has_one_row(tmp_path, target):
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.tie_weights()
    merge = peft_merge(tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj", target]), kind=model)
    report = spectra.verify_merge(*merge.paths)
    assert report.counts == {"exact": 2}
    assert report["model.embed_tokens.weight"].ok


@pytest.mark.parametrize("ensured", [True, False])
def test_a_tied_weight_that_is_saved_under_both_names_is_not_added_twice(tmp_path, ensured):
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    merge = peft_merge(tmp_path, lora, kind=transformers.LlamaForCausalLM(config))
    written = json.loads((merge.adapter / "adapter_config.json").read_text())
    (merge.adapter / "adapter_config.json").write_text(json.dumps(written | {"ensure_weight_tying": ensured}))
    merge.rewrite("merged", lambda tensors: tensors.pop("lm_head.weight", None))
    assert "lm_head.weight" not in merge.weights("base")
    stored = load_file(merge.adapter / "adapter_model.safetensors")
    head, embedding = (f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
    assert torch.equal(stored[head], stored[embedding])
    report = spectra.verify_merge(*merge.paths)
    assert report.counts == {"exact": 2 if ensured else 3}
    source = spectra.open_source(merge.adapter, merge.base)
    assert {delta.name for delta in source} >= {"model.embed_tokens.weight"}
    assert ("lm_head.weight" in {delta.name for delta in source}) == (not ensured)
    assert ("lm_head.weight" in source.coverage.skipped) == ensured
    if not ensured:  # the head was trained apart, and the merged model has one weight for both
        save_file(stored | {head: stored[head] + 0.1}, merge.adapter / "adapter_model.safetensors")
        verdicts = {row.name: row.verdict for row in spectra.verify_merge(*merge.paths)}
        assert verdicts["lm_head.weight"] not in ("exact", "rounded")
        assert verdicts["model.embed_tokens.weight"] == "exact"


def test_sharded_and_renamed_checkpoints(tmp_path):
    merge = peft_merge(tmp_path, CONFIGS["lora"]())

    def wrapped(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"module.{name}"] = tensors.pop(name)

    merge.rewrite("merged", wrapped)
    assert spectra.verify_merge(*merge.paths).counts == {"exact": 6}


def test_rows_of_tokens_that_were_added(tmp_path):
    model = tiny_model("llama").float()
    save_model(tmp_path / "base", model)
    model.resize_token_embeddings(44)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    merge = Merge(tmp_path / "base", *peft_merge(tmp_path / "larger", config, kind=model).paths[1:])
    assert spectra.verify_merge(*merge.paths).counts == {"exact": 6}
    merge.rewrite("merged", lambda tensors: tensors["lm_head.weight"][42].add_(1))
    report = spectra.verify_merge(*merge.paths)
    assert report["lm_head.weight"].verdict == "exact"
    assert report["lm_head.weight[40:44]"].verdict == "different"


@pytest.mark.parametrize("stored", [F32, BF16])
def test_experts(tmp_path, stored):
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    merge = peft_merge(tmp_path, lora, kind=transformers.MixtralForCausalLM(config), stored=stored)
    assert spectra.verify_merge(*merge.paths).counts == {"exact": 1 + 3 * 3}


def test_experts_that_the_file_calls_otherwise(tmp_path):
    config = transformers.GraniteMoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    targets = ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    merge = peft_merge(tmp_path, lora, kind=transformers.GraniteMoeForCausalLM(config))
    assert spectra.verify_merge(*merge.paths).counts == {"exact": 1 + 3 * 3}


@pytest.mark.parametrize("kind", ["multilora", "multihead", "mixture", "kohya", "diffusers"])
def test_what_others_than_peft_merge(tmp_path, kind):
    oracle = EXAMPLES[kind](tmp_path)
    shutil.copytree(oracle.base, tmp_path / "merged")
    (file,) = (tmp_path / "merged").rglob("*.safetensors")
    component = "unet." if file.parent.name == "unet" else ""
    tensors = load_file(file)
    for name, delta in oracle.deltas.items():
        weight = tensors[name.removeprefix(component)]
        weight += delta.to(weight.dtype)
    save_file(tensors, file)
    assert spectra.verify_merge(oracle.base, oracle.adapter, tmp_path / "merged").ok
