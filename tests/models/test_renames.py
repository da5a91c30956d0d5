"""Names of files and names in memory: transformers and PEFT write both, and each weight is found under either."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_model

import spectra
from spectra.models import experts
from spectra.models.renames import current

SWIN = {"depths": [1, 1], "num_heads": [2, 2]}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
EMU3 = {
    "vocabulary_map": {"<image>": 3, "<|visual token 000000|>": 4},
    "vq_config": {"channel_multiplier": [1, 1], "base_channels": 32, "num_res_blocks": 1, "attn_resolutions": [4]},
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 16],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}
KINDS = {
    "llava": ("LlavaForConditionalGeneration", {}),
    "llava_next": ("LlavaNextForConditionalGeneration", {}),
    "llava_next_video": ("LlavaNextVideoForConditionalGeneration", {}),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", {}),
    "vipllava": ("VipLlavaForConditionalGeneration", {}),
    "video_llava": ("VideoLlavaForConditionalGeneration", {}),
    "mllama": ("MllamaForConditionalGeneration", {}),
    "aria": ("AriaForConditionalGeneration", {}),
    "emu3": ("Emu3ForConditionalGeneration", EMU3),
    "fuyu": ("FuyuForCausalLM", {}),
    "got_ocr2": ("GotOcr2ForConditionalGeneration", {}),
    "idefics2": ("Idefics2ForConditionalGeneration", {}),
    "idefics3": ("Idefics3ForConditionalGeneration", {}),
    "smolvlm": ("SmolVLMForConditionalGeneration", {}),
    "internvl": ("InternVLForConditionalGeneration", {}),
    "mistral3": ("Mistral3ForConditionalGeneration", {}),
    "gemma3": ("Gemma3ForConditionalGeneration", {}),
    "shieldgemma2": ("ShieldGemma2ForImageClassification", {}),
    "paligemma": ("PaliGemmaForConditionalGeneration", {}),
    "aya_vision": ("AyaVisionForConditionalGeneration", {}),
    "cohere2_vision": ("Cohere2VisionForConditionalGeneration", {}),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {}),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", {}),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", {}),
    "qwen2_5_omni_thinker": ("Qwen2_5OmniThinkerForConditionalGeneration", {}),
    "paddleocr_vl": ("PaddleOCRVLForConditionalGeneration", {}),
    "qwen2_audio": ("Qwen2AudioForConditionalGeneration", {}),
    "voxtral": ("VoxtralForConditionalGeneration", {}),
    "granite_speech": ("GraniteSpeechForConditionalGeneration", {}),
    "vit": ("ViTForImageClassification", {}),
    "deit": ("DeiTForImageClassification", {}),
    "vit_mae": ("ViTMAEForPreTraining", {}),
    "beit": ("BeitForImageClassification", {"use_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", {}),
    "dinov3_vit": ("DINOv3ViTModel", {}),
    "swin": ("SwinForImageClassification", SWIN),
    "segformer": ("SegformerForSemanticSegmentation", SEGFORMER),
    "detr": ("DetrForObjectDetection", {"use_timm_backbone": False, "backbone": None, "backbone_config": RESNET}),
    "nemotron_h": ("NemotronHForCausalLM", {"layers_block_type": ["mamba", "attention"]}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "clip_vision_model": ("CLIPVisionModel", {}),
    "siglip_vision_model": ("SiglipVisionModel", {}),
    "clip_text_model": ("CLIPTextModel", {}),
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """A model, the folder that transformers wrote of it, its config there, and its tensors there."""
    cls, options = KINDS[request.param]
    model = tiny_model(cls, request.param, **options)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return model, folder, config, load_file(folder / "model.safetensors")


def test_a_files_names_become_the_names_in_memory(saved):
    model, _, config, stored = saved
    memory = model.state_dict()
    single = [name for name in stored if experts.single(config, current(config, name))]
    for name in set(stored) - set(single):
        assert torch.equal(memory[current(config, name)], stored[name]), name


def test_names_in_memory_are_kept(saved):
    model, _, config, _ = saved
    assert {name: current(config, name) for name in model.state_dict()} == {n: n for n in model.state_dict()}


OLD_TOWERS = ("llava", "llava_onevision", "video_llava", "gemma3", "paligemma", "aya_vision", "cohere2_vision")


@pytest.mark.parametrize("kind", OLD_TOWERS)
def test_the_hubs_encoders_inside_a_vision_model(kind, tmp_path):
    """Files of before 5.x: transformers itself loads them, and says which weight is which."""
    cls, options = KINDS[kind]
    model = tiny_model(cls, kind, **options)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    stored = load_file(tmp_path / "model.safetensors")
    older = {re.sub(r"(?<=_tower\.)", "vision_model.", name): tensor for name, tensor in stored.items()}
    assert older.keys() != stored.keys()
    save_file(older, tmp_path / "model.safetensors", {"format": "pt"})
    memory = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(memory[current(config, name)], tensor) for name, tensor in older.items())


def in_memory(folder, model, config, seed):
    """A folder with the model's tensors, nudged, under the names in memory; heads that are tied left out."""
    generator = torch.Generator().manual_seed(seed)
    tied = set(model.all_tied_weights_keys)
    tensors = {
        name: (tensor + (0.01 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def test_a_full_pair_under_both_sets_of_names(saved, tmp_path):
    model, folder, config, stored = saved
    tuned = in_memory(tmp_path / "tuned", model, config, seed=1)
    source = spectra.open_source(tmp_path / "tuned", folder)
    assert not source.coverage.base_only
    assert not source.coverage.tuned_only
    assert not [line for line in source.coverage.warnings if "prefix" in line]
    whole = [delta for delta in source if delta.name in stored and delta.status == "ok"]
    assert len(whole) > len([name for name, tensor in stored.items() if tensor.ndim == 2]) / 2
    for delta in whole:
        expected = tuned[current(config, delta.name)].double() - stored[delta.name].double()
        assert torch.equal(delta.read().to_dense(), expected.reshape(delta.shape)), delta.name


def linear_layers(model):
    """Every linear layer in the blocks of the model; PEFT refuses Mamba's `out_proj`."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and re.search(r"\.\d+\.", name) and not name.endswith("mixer.out_proj")
    ]


def test_a_peft_adapter_under_the_names_in_memory(saved, tmp_path):
    peft = pytest.importorskip("peft")
    model, folder, config, stored = saved
    modules = linear_layers(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    try:
        model.save_pretrained(tmp_path)
    finally:
        model.unload()
    alone = spectra.open_source(tmp_path)
    assert {delta.name for delta in alone} == {f"{module}.weight" for module in modules}
    source = spectra.open_source(tmp_path, folder, split=False)
    assert not source.coverage.tuned_only
    assert all(delta.status == "ok" for delta in source)
    key_of = {current(config, name): name for name in stored}
    assert {delta.name for delta in source} == {key_of[f"{module}.weight"] for module in modules}
