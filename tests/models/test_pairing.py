"""Which tuned weight is which base weight: prefixes and wrappers that a save adds, and what is refused."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import llama_tensors, nudged, write_checkpoint

import spectra
from spectra.errors import SourceError
from spectra.models import pairing
from spectra.models.pairing import align, unwrap

LLAMA = llama_tensors()
ENCODER = {
    f"encoder.layer.{layer}.attention.self.{part}.weight": torch.randn(8, 8)
    for layer in range(2)
    for part in ("query", "key", "value")
} | {"embeddings.word_embeddings.weight": torch.randn(12, 8)}


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def compared(folder, tuned, base, tuned_config=None, base_config=None):
    config = {"model_type": "llama", "tie_word_embeddings": False}
    return spectra.open_source(
        write_checkpoint(folder / "t", tuned, config=tuned_config or config),
        write_checkpoint(folder / "b", base, config=base_config or config),
    )


def check(source, tuned_of, base):
    """Every matrix of the base was compared with the tuned tensor that `tuned_of` says."""
    expected = {name: tuned_of(name).double() - base[name].double() for name in base if base[name].ndim == 2}
    assert {delta.name for delta in source} == set(expected)
    for delta in source:
        assert torch.equal(delta.read().to_dense(), expected[delta.name]), delta.name


@pytest.mark.parametrize(
    "wrapper",
    ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "_forward_module.", "base_model.model."],
)
@pytest.mark.parametrize("side", ["tuned", "base", "both"])
def test_wrappers_are_dropped_on_either_side(tmp_path, wrapper, side):
    tuned = nudged(LLAMA)
    ours = prefixed(wrapper, tuned) if side != "base" else tuned
    theirs = prefixed(wrapper, LLAMA) if side != "tuned" else LLAMA
    source = compared(tmp_path, ours, theirs)
    check(source, lambda name: tuned[name if name in tuned else name.removeprefix(wrapper)], theirs)


def test_wrappers_inside_the_names(tmp_path):
    tuned = nudged(LLAMA)
    names = {
        name: name.replace("layers.", "_fsdp_wrapped_module.layers.").replace(
            ".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."
        )
        for name in tuned
    }
    source = compared(tmp_path, {names[name]: tensor for name, tensor in tuned.items()}, LLAMA)
    check(source, lambda name: tuned[name], LLAMA)


@pytest.mark.parametrize("prefix", ["bert.", "roberta.", "model.", "transformer.encoder.", "0.auto_model."])
def test_a_task_model_meets_the_bare_encoder(tmp_path, prefix):
    tuned = nudged(ENCODER)
    task = prefixed(prefix, tuned) | {"classifier.weight": torch.randn(3, 8)}
    config = {"model_type": "bert"}
    if prefix[0].isdigit():  # an index is no prefix that a save adds
        with pytest.raises(SourceError, match=r"is base= \(--base\) the model that was tuned"):
            compared(tmp_path, task, ENCODER, config, config)
        return
    source = compared(tmp_path / "down", task, ENCODER, config, config)
    check(source, lambda name: tuned[name], ENCODER)
    assert set(source.coverage.tuned_only) == {"classifier.weight"}
    assert f"dropped the prefix {prefix!r} from the tuned names" in source.coverage.warnings
    back = compared(tmp_path / "up", tuned, task, config, config)
    assert set(back.coverage.base_only) == {"classifier.weight"}
    assert {delta.name for delta in back} == set(task) - {"classifier.weight"}


def test_a_bare_stack_with_a_head_beside_it_keeps_the_head(tmp_path):
    """A save of `model.model` and `lm_head` side by side: the prefix is added where the base has it."""
    tuned = nudged(LLAMA)
    bare = {name.removeprefix("model."): tensor for name, tensor in tuned.items()}
    source = compared(tmp_path, bare, LLAMA)
    check(source, lambda name: tuned[name], LLAMA)
    assert not source.coverage.tuned_only


@pytest.mark.parametrize(
    ("tuned_layout", "base_layout", "tuned_type", "base_type"),
    [
        ("language_model.{}", "{}", "llava", "llama"),
        ("{}", "language_model.{}", "llama", "llava"),
        ("nested", "{}", "llava", "llama"),
        ("{}", "nested", "llama", "llava"),
        ("nested", "language_model.{}", "llava", "llava"),
        ("language_model.{}", "nested", "gemma3", "gemma3"),
        ("nested", "{}", "qwen2_vl", "qwen2_vl"),
    ],
)
def test_a_language_model_inside_a_vision_language_model(tmp_path, tuned_layout, base_layout, tuned_type, base_type):
    """transformers 4 wrote language_model.model.…, 5 writes model.language_model.…; Qwen2-VL once wrote model.…"""

    def named(layout, name):
        if layout == "nested":
            return name.replace("model.", "model.language_model.", 1)
        return layout.format(name)

    vision = {"vision_tower.layers.0.mlp.fc1.weight": torch.randn(5, 4)}
    tuned, base = nudged(LLAMA), LLAMA
    ours = {named(tuned_layout, name): tensor for name, tensor in tuned.items()}
    theirs = {named(base_layout, name): tensor for name, tensor in base.items()}
    if tuned_type == "llava":
        ours |= vision
    source = compared(tmp_path, ours, theirs, {"model_type": tuned_type}, {"model_type": base_type})
    expected = {
        named(base_layout, name): tuned[name].double() - base[name].double() for name in base if base[name].ndim == 2
    }
    assert {delta.name for delta in source} == set(expected)
    for delta in source:
        assert torch.equal(delta.read().to_dense(), expected[delta.name])
    assert set(source.coverage.tuned_only) == (set(vision) if tuned_type == "llava" else set())


def test_the_tower_and_projector_move_with_the_versions(tmp_path):
    old = {"vision_tower.a.weight": torch.eye(3), "multi_modal_projector.b.weight": torch.eye(4)} | prefixed(
        "language_model.", LLAMA
    )
    new = {f"model.{name}" if name[0] in "vm" else name: 2 * tensor for name, tensor in old.items()}
    new = {
        name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head"): t
        for name, t in new.items()
    }
    config = {"model_type": "llava"}
    source = compared(tmp_path, new, old, config, config)
    check(source, lambda name: 2 * old[name], old)


def test_neox_calls_its_head_by_two_names(tmp_path):
    base = {"gpt_neox.embed_in.weight": torch.randn(6, 4), "embed_out.weight": torch.randn(6, 4)}
    tuned = {"gpt_neox.embed_in.weight": torch.randn(6, 4), "lm_head.weight": torch.randn(6, 4)}
    config = {"model_type": "gpt_neox"}
    source = compared(tmp_path, tuned, base, config, config)
    delta = tuned["lm_head.weight"].double() - base["embed_out.weight"].double()
    assert torch.equal(source["embed_out.weight"].read().to_dense(), delta)


def test_two_encoders_of_equal_shape_are_ambiguous():
    base = {f"{tower}.layer.{i}.weight": (4, 4) for tower in ("question_encoder", "ctx_encoder") for i in range(3)}
    tuned = {f"layer.{i}.weight": (4, 4) for i in range(3)}
    with pytest.raises(SourceError, match="fit the base in 2 ways"):
        align(tuned, base)
    with pytest.raises(SourceError, match="fit the base in 2 ways"):
        align(base, tuned)


def test_equal_names_win_over_any_prefix():
    base = {f"{tower}.layer.{i}.weight": (4, 4) for tower in ("encoder", "decoder") for i in range(3)}
    tuned = {f"encoder.layer.{i}.weight": (4, 4) for i in range(3)}
    names, rule = align(tuned, base)
    assert rule == ""
    assert names == {name: name for name in tuned}


def test_a_prefix_that_would_make_two_names_one_is_not_dropped():
    tuned = {"bert.pooler.weight": (4, 4), "pooler.weight": (4, 4), "bert.layer.0.weight": (4, 4)}
    base = {"pooler.weight": (4, 4), "layer.0.weight": (4, 4)}
    names, rule = align(tuned, base)
    assert rule == ""
    assert names["pooler.weight"] == "pooler.weight"
    assert names["bert.layer.0.weight"] == "bert.layer.0.weight"


@pytest.mark.parametrize(
    "place",
    ["text_encoders.clip_l.transformer.", "conditioner.embedders.0.transformer.", "cond_stage_model.transformer."],
)
def test_a_text_encoder_meets_its_place_in_a_single_file(place):
    """ComfyUI's names, SDXL's, and those of Stable Diffusion 1."""
    encoder = {f"text_model.encoder.layers.{i}.{part}.weight": (4, 4 + i) for i in range(3) for part in ("q", "k")}
    whole = {place + name: shape for name, shape in encoder.items()} | {"model.diffusion_model.x.weight": (9, 9)}
    names, rule = align(encoder, whole)
    assert names == {name: place + name for name in encoder}
    assert place in rule
    back, _ = align(whole, encoder)
    assert {back[place + name] for name in encoder} == set(encoder)


def test_a_model_with_both_wrapped_and_bare_names_is_taken_as_it_is():
    both = {"module.a.weight": (2, 3), "a.weight": (2, 3)}
    assert align(both, both) == ({name: name for name in both}, "")


def test_never_by_part_of_a_name():
    tuned = {"layers.1.q_proj.weight": (4, 4), "layers.11.q_proj.weight": (4, 4)}
    base = {"layers.11.q_proj.weight": (4, 4), "layers.111.q_proj.weight": (4, 4)}
    names, _ = align(tuned, base)
    assert {old: new for old, new in names.items() if new in base} == {
        "layers.11.q_proj.weight": "layers.11.q_proj.weight"
    }


@pytest.mark.parametrize(
    ("wrapped", "bare"),
    [
        ("module.module.a.weight", "a.weight"),
        ("_orig_mod.module.a._orig_mod.b.weight", "a.b.weight"),
        ("my_module.a.weight", "my_module.a.weight"),
        ("a.module.b.weight", "a.module.b.weight"),
    ],
)
def test_unwrap(wrapped, bare):
    assert unwrap(wrapped) == bare


def test_names_that_all_fit_as_they_are_are_not_tried_with_prefixes(monkeypatch):
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (4, 4) for i in range(3)}
    monkeypatch.setattr(pairing, "_leading_paths", None)
    assert align(shapes, shapes | {"lm_head.weight": (4, 4)}) == ({name: name for name in shapes}, "")
    with pytest.raises(TypeError):
        align(shapes | {"lm_head.weight": (4, 5)}, shapes | {"lm_head.weight": (4, 4)})


def test_one_look_for_wrappers_finds_what_looking_at_each_name_does():
    names = ["layers.0.weight", "module.layers.1.weight", "a._orig_mod.b", "submodule.c", "x.base_model.model.y"]
    for some in (names[:1], names[1:], names, ["submodule.c"]):
        assert pairing.unwrapped(some) == {name: unwrap(name) for name in some}
