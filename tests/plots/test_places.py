"""Rows and columns of pictures over depth, in the words of each family of models."""

from __future__ import annotations

import pytest

from spectra.plots.places import OUTSIDE, Place, ordered_places, ordered_rows, place_of, row_of, stack_labels

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FAMILIES = {
    "BERT": (
        ["encoder.layer.{}.attention.self.query", "encoder.layer.{}.attention.self.key",
         "encoder.layer.{}.attention.output.dense", "encoder.layer.{}.intermediate.dense",
         "encoder.layer.{}.output.dense"],
        ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
    ),
    "GPT-2": (["h.{}.attn.c_attn.weight[q]", "h.{}.attn.c_proj", "h.{}.mlp.c_fc", "h.{}.mlp.c_proj"],
              ["q_proj", "o_proj", "up_proj", "down_proj"]),
    "LLaMA": (["model.layers.{}.self_attn.v_proj", "model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"],
              ["v_proj", "gate_proj", "up_proj"]),
    "Mixtral": (
        ["model.layers.{}.self_attn.q_proj", "model.layers.{}.block_sparse_moe.gate",
         "model.layers.{}.block_sparse_moe.experts.5.w1", "model.layers.{}.block_sparse_moe.experts.5.w3",
         "model.layers.{}.block_sparse_moe.experts.5.w2", "model.layers.{}.mlp.shared_expert.up_proj"],
        ["q_proj", "router", "gate_proj, experts", "up_proj, experts", "down_proj, experts", "up_proj, shared expert"],
    ),
    "T5 decoder": (
        ["decoder.block.{}.layer.0.SelfAttention.q", "decoder.block.{}.layer.1.EncDecAttention.q",
         "decoder.block.{}.layer.2.DenseReluDense.wo"],
        ["q_proj", "cross q_proj", "down_proj"],
    ),
    "ViT": (["blocks.{}.attn.qkv", "blocks.{}.attn.proj", "blocks.{}.mlp.fc1"], ["qkv_proj", "o_proj", "up_proj"]),
    "DiT": (["transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.attn.add_q_proj",
             "transformer_blocks.{}.ff.net.0.proj", "transformer_blocks.{}.ff.net.2",
             "transformer_blocks.{}.ff_context.net.0.proj"],
            ["q_proj", "add_q_proj", "up_proj", "down_proj", "context up_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_roles_stand_in_the_order_of_the_computation(family):
    patterns, rows = FAMILIES[family]
    names = [(text if "weight" in text else f"{text}.weight").format(layer) for layer in (3, 11) for text in patterns]
    assert [row_of(name) for name in names[: len(rows)]] == rows
    assert ordered_rows(reversed(names)) == rows
    assert [place.index for place in ordered_places(reversed(names))] == [(3,), (11,)]


def test_an_encoder_comes_before_its_decoder_and_a_unet_goes_down_and_up():
    t5 = [f"{stack}.block.{i}.layer.0.SelfAttention.q.weight" for stack in ("decoder", "encoder") for i in (1, 0)]
    assert [(place.stack, place.label) for place in ordered_places(t5)] == [
        ("encoder.block", "0"), ("encoder.block", "1"), ("decoder.block", "0"), ("decoder.block", "1"),
    ]  # fmt: skip
    unet = [
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_q.weight",
        "down_blocks.0.attentions.1.transformer_blocks.1.attn2.to_q.weight",
        "down_blocks.0.resnets.1.conv1.weight",
        "conv_in.weight",
    ]
    places = ordered_places(unet)
    assert [place.label for place in places] == ["0.1", "0.1.1", "0", "1.0", ""]
    assert list(stack_labels(places).values()) == ["down", "mid", "up", "outside"]
    assert ordered_rows(unet) == ["q_proj", "cross q_proj", "conv1", "conv_in"]


def test_a_sampler_ends_its_block():
    names = [f"{way}_blocks.{block}.{module}.conv.weight" for way in ("down", "up") for block in (0, 1)
             for module in (f"{way}samplers.0", "resnets.0", "resnets.1")]  # fmt: skip
    kohya = [f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}" for name in names]
    labels = ["0.0", "0.1", "0.{}", "1.0", "1.1", "1.{}"]
    for found in (names, kohya):
        wanted = [label.format(way) for way in ("down", "up") for label in labels]
        assert [place.label for place in ordered_places(found)] == wanted


def test_names_with_underscores_for_dots_are_read_alike():
    for kohya, dotted in (
        ("lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn2_to_out_0",
         "unet.down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0.weight"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
         "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"),
        ("lora_te1_text_model_encoder_layers_11_self_attn_q_proj",
         "te1.text_model_encoder_layers.11.self_attn.q_proj.weight"),
    ):  # fmt: skip
        assert (place_of(kohya), row_of(kohya)) == (place_of(dotted), row_of(dotted))


@pytest.mark.parametrize("name", ["lm_head.weight", "weight", "classifier.2.weight", "", "experts.3.w1.weight", "7"])
def test_what_is_in_no_layer_is_outside(name):
    assert place_of(name) == OUTSIDE


def test_one_stack_needs_no_name_and_equal_words_are_left_out():
    assert stack_labels([Place("model.layers", (0,)), Place("model.layers", (1,))]) == {"model.layers": ""}
    vision = [Place("model.vision_tower.layers", (0,)), Place("model.language_model.layers", (0,))]
    assert list(stack_labels(vision).values()) == ["vision_tower", "language_model"]
