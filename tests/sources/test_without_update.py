"""Adapters whose files determine no ΔW are refused by name and with the reason, from folders that PEFT itself saved."""

from __future__ import annotations

import peft
import pytest
import torch
from support.checkpoints import write_adapter
from support.peft_oracle import make_oracle, save_model, tiny_model

import spectra
from spectra.errors import UnsupportedFormatError
from spectra.files.folder import open_folder
from spectra.sources import recognised

CAUSAL = {"task_type": "CAUSAL_LM"}
SAVED = {
    "PROMPT_TUNING": ("llama", peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL), "a soft prompt"),
    "P_TUNING": ("llama", peft.PromptEncoderConfig(num_virtual_tokens=3, **CAUSAL), "P-tuning"),
    "PREFIX_TUNING": ("llama", peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL), "a prefix of keys and values"),
    "MULTITASK_PROMPT_TUNING": (
        "llama",
        peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, **CAUSAL),
        "soft prompts of several tasks",
    ),
    "CPT": (
        "llama",
        peft.CPTConfig(cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1], **CAUSAL),
        "CPT",
    ),
    "ADAPTION_PROMPT": (
        "llama",
        peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, **CAUSAL),
        "adaption prompts",
    ),
    "CARTRIDGE": ("llama", peft.CartridgeConfig(num_virtual_tokens=3, **CAUSAL), "a cartridge"),
    "LILY": ("llama", peft.LilyConfig(r=2, stride_A=1, num_B=2, target_modules=["q_proj"]), "Lily: a router"),
    "POLY": (
        "llama",
        peft.PolyConfig(r=2, n_tasks=2, n_skills=2, target_modules=["q_proj"]),
        "Poly: each input's task",
    ),
    "PSOFT": ("llama", peft.PsoftConfig(r=2, target_modules=["q_proj"]), "PSOFT: it turns singular vectors"),
    "BEFT": ("bert", peft.BeftConfig(target_modules=["query"]), "BEFT: it changes biases only"),
}


@pytest.mark.parametrize("declared", SAVED)
def test_what_peft_saved_is_refused_by_name(declared, tmp_path):
    kind, config, reason = SAVED[declared]
    peft.get_peft_model(tiny_model(kind).float(), config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFormatError, match=reason):
        spectra.open_source(tmp_path)


@pytest.mark.parametrize("declared", ["PROMPT_TUNING", "ADAPTION_PROMPT", "LILY", "POLY", "BEFT", "PSOFT"])
def test_the_tensors_names_are_enough(declared, tmp_path):
    kind, config, reason = SAVED[declared]
    peft.get_peft_model(tiny_model(kind).float(), config).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UnsupportedFormatError, match=reason):
        spectra.open_source(tmp_path)


def test_x_lora(tmp_path):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], **CAUSAL)
    one = make_oracle(tmp_path / "one", "llama", lora, dtype=torch.float32)
    two = make_oracle(tmp_path / "two", "llama", lora, seed=1, dtype=torch.float32)
    base = tiny_model("llama").float()
    base.config.use_cache = False
    adapters = {"0": str(one.adapter), "1": str(two.adapter)}
    config = peft.XLoraConfig(hidden_size=16, xlora_depth=1, adapters=adapters, **CAUSAL)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "x")
    with pytest.raises(UnsupportedFormatError, match="X-LoRA: a classifier mixes other adapters"):
        spectra.open_source(tmp_path / "x")


def test_an_activated_lora(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[3, 4], **CAUSAL)
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFormatError, match="activated LoRA"):
        spectra.open_source(tmp_path)


def test_a_shadow_network(tmp_path):
    write_adapter(tmp_path, {"base_model.model.shadow_down.0.weight": torch.ones(2, 2)}, {"peft_type": "SHADOW"})
    with pytest.raises(UnsupportedFormatError, match="a shadow network beside the model"):
        spectra.open_source(tmp_path)


@pytest.mark.parametrize("config", [{"peft_type": "ADAMSS"}, None])
def test_adamss_whose_rows_are_not_in_the_file(tmp_path, config):
    # PEFT needs scikit-learn to make one; these are the names that it saves.
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    names = ("adamss_A.0", "adamss_B.0", "adamss_newB")
    write_adapter(tmp_path, {f"{module}.{name}": torch.ones(2, 2) for name in names}, config)
    with pytest.raises(UnsupportedFormatError, match="k-means over a random SVD"):
        spectra.open_source(tmp_path)


def test_no_reason_is_given_for_what_has_an_update(tmp_path):
    oracle = make_oracle(tmp_path, "llama", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(spectra.open_source(oracle.adapter)) == 2
    folder = save_model(tmp_path / "again", tiny_model("bert"))
    assert recognised.without_update(open_folder(folder)) is None
