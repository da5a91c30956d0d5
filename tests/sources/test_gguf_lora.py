"""LoRA in GGUF: the order of rows, where α and the heads are, experts, types, and what is refused."""

from __future__ import annotations

import shutil

import gguf
import numpy as np
import pytest
import torch
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint
from support.gguf_lora import HEADS, interleaved, make_gguf_oracle, said, write_lora
from support.stored import write_gguf

import spectra
from spectra.errors import SelectionError, SourceError, UnsupportedFormatError

Q, V = "blk.0.attn_q.weight", "blk.0.attn_v.weight"
Q_NAME, V_NAME = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"


def factors(stored=Q, rows=16, rank=2):
    torch.manual_seed(0)
    return {f"{stored}.lora_a": torch.randn(rank, 16), f"{stored}.lora_b": torch.randn(rows, rank)}


def product(tensors, s):
    a, b = (tensor.double() for tensor in tensors.values())
    return s * b @ a


def close(found, expected):
    assert found.status == "ok", found.reason
    assert torch.allclose(found.read().to_dense(), expected, rtol=0, atol=1e-12 * float(expected.norm()))


def base(folder, config):
    return write_checkpoint(folder / "base", llama_tensors(), config=config)


@pytest.mark.parametrize(
    ("arch", "permuted"), [("llama", True), ("granite", True), ("qwen2", False), ("gemma2", False), ("phi3", False)]
)
def test_rows_of_q_are_turned_back_for_the_architectures_whose_rows_llamacpp_turns(arch, permuted, tmp_path):
    tensors = factors()
    update = product(tensors, 3.5)
    if permuted:
        tensors[f"{Q}.lora_b"] = interleaved(tensors[f"{Q}.lora_b"], 4)
    adapter = write_lora(tmp_path / "a.gguf", tensors, arch)
    close(spectra.open_source(adapter, base(tmp_path, {"model_type": "llama", **HEADS}))[Q_NAME], update)


def test_without_the_number_of_heads_q_is_refused_and_v_is_not(tmp_path):
    tensors = factors() | factors(V, rows=8)
    source = spectra.open_source(write_lora(tmp_path / "a.gguf", tensors))
    assert "takes the number of heads" in source[Q_NAME].reason
    assert "pass base= (--base)" in source[Q_NAME].reason
    close(source[V_NAME], product(factors(V, rows=8), 3.5))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, "says neither"),
        ({"model_type": "llama", "num_attention_heads": 3}, "are not 3 heads, as the base says"),
    ],
)
def test_a_base_that_does_not_tell_the_heads_leaves_q_refused(config, words, tmp_path):
    source = spectra.open_source(write_lora(tmp_path / "a.gguf", factors()), base(tmp_path, config))
    assert words in source[Q_NAME].reason


def test_heads_in_the_header_are_ollamas_and_must_be_the_bases(tmp_path):
    tensors = factors()
    update = product(tensors, 3.5)
    tensors[f"{Q}.lora_b"] = interleaved(tensors[f"{Q}.lora_b"], 4)
    adapter = write_lora(tmp_path / "a.gguf", tensors, attention__head_count=4, attention__head_count_kv=2)
    source = spectra.open_source(adapter)
    close(source[Q_NAME], update)
    assert any("Ollama's converter" in warning for warning in source.coverage.warnings)
    other = base(tmp_path, {"model_type": "llama", "num_attention_heads": 8})
    assert "the header says 4 heads" in spectra.open_source(adapter, other)[Q_NAME].reason


def test_the_same_with_a_base_in_gguf(tmp_path):
    oracle = make_gguf_oracle(tmp_path / "o")
    keys = {"attention__head_count": 4, "attention__head_count_kv": 2, "embedding_length": 16}
    header = {key: value for key, value in said("llama", None, **keys).items() if not key.endswith("type")}
    weights = llama_tensors()
    held = {
        "blk.0.attn_q.weight": interleaved(weights["model.layers.0.self_attn.q_proj.weight"], 4),
        "blk.0.attn_k.weight": interleaved(weights["model.layers.0.self_attn.k_proj.weight"], 2),
    }
    whole = write_gguf(tmp_path / "base.gguf", held, header)
    source = spectra.open_source(oracle.adapter, whole)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        close(source[name], oracle.deltas[name])
        assert torch.equal(source[name].base.read(), weights[name].double())


@pytest.mark.parametrize(("alpha", "words"), [(None, "has no adapter.lora.alpha"), (0.0, "has adapter.lora.alpha = 0")])
def test_a_file_without_alpha_needs_a_scale(alpha, words, tmp_path):
    adapter = write_lora(tmp_path / "a.gguf", factors(V, rows=8), alpha=alpha)
    with pytest.raises(SourceError, match=rf"{words}.*pass scale= \(--scale\)"):
        spectra.open_source(adapter)
    close(spectra.open_source(adapter, scale=0.25)[V_NAME], product(factors(V, rows=8), 0.25))


def test_a_scale_beside_an_alpha_is_ignored_and_said(tmp_path):
    source = spectra.open_source(write_lora(tmp_path / "a.gguf", factors(V, rows=8)), scale=9.0)
    close(source[V_NAME], product(factors(V, rows=8), 3.5))
    assert any("scale was ignored" in warning for warning in source.coverage.warnings)


def test_an_alpha_that_is_no_number_is_an_error(tmp_path):
    with pytest.raises(SourceError, match=r"adapter\.lora\.alpha = nan in the header is not a finite number"):
        spectra.open_source(write_lora(tmp_path / "a.gguf", factors(), alpha=float("nan")))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("adapter.type", ("control_vector", gguf.GGUFValueType.STRING), "an adapter of type 'control_vector'"),
        ("adapter.alora.invocation_tokens", ([1, 2], gguf.GGUFValueType.ARRAY), "an activated LoRA"),
    ],
)
def test_other_adapters_in_gguf_are_refused_by_name(key, value, words, tmp_path):
    file = write_gguf(tmp_path / "a.gguf", factors(), said("llama", 7.0) | {key: value})
    with pytest.raises(UnsupportedFormatError, match=words):
        spectra.open_source(file)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("qwen3moe", "model.layers.1.mlp.experts.{}.gate_proj.weight"),
        ("llama", "model.layers.1.block_sparse_moe.experts.{}.w1.weight"),
    ],
)
def test_experts_lie_in_stacks(arch, name, tmp_path):
    a, b = torch.randn(3, 2, 16), torch.randn(3, 24, 2)
    tensors = {"blk.1.ffn_gate_exps.weight.lora_a": a, "blk.1.ffn_gate_exps.weight.lora_b": b}
    source = spectra.open_source(write_lora(tmp_path / "a.gguf", tensors, arch))
    assert {delta.name for delta in source} == {name.format(expert) for expert in range(3)}
    for expert in range(3):
        close(source[name.format(expert)], 3.5 * b[expert].double() @ a[expert].double())


def test_a_stack_of_an_unknown_architecture_is_refused_and_its_matrices_keep_their_names(tmp_path):
    tensors = {"blk.1.ffn_gate_exps.weight.lora_a": torch.ones(3, 2, 16)}
    tensors |= {"blk.1.ffn_gate_exps.weight.lora_b": torch.ones(3, 24, 2)} | factors()
    source = spectra.open_source(write_lora(tmp_path / "a.gguf", tensors, "bitnet"))
    assert "what they are is not known" in source["blk.1.ffn_gate_exps.weight"].reason
    close(source[Q], product(factors(), 3.5))
    assert any("'bitnet' is not in the table" in warning for warning in source.coverage.warnings)


def test_phis_fused_projections_are_reported_in_their_parts(tmp_path):
    tensors = factors("blk.0.ffn_up.weight", rows=48)
    weights = {"model.layers.0.mlp.gate_up_proj.weight": torch.randn(48, 16)}
    folder = write_checkpoint(tmp_path / "base", weights, config={"model_type": "phi3"})
    source = spectra.open_source(write_lora(tmp_path / "a.gguf", tensors, "phi3"), folder)
    update = product(tensors, 3.5)
    close(source["model.layers.0.mlp.gate_up_proj.weight[gate]"], update[:24])
    close(source["model.layers.0.mlp.gate_up_proj.weight[up]"], update[24:])


def test_halves_codes_and_a_single_row_of_one_axis_are_read(tmp_path):
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in factors(V, rows=8).items()}
    close(spectra.open_source(write_lora(tmp_path / "half.gguf", halves))[V_NAME], product(halves, 3.5))
    row = {f"{V}.lora_a": torch.randn(16), f"{V}.lora_b": torch.randn(8, 1)}
    update = 7 * row[f"{V}.lora_b"].double() @ row[f"{V}.lora_a"].double()[None]
    close(spectra.open_source(write_lora(tmp_path / "row.gguf", row))[V_NAME], update)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(tmp_path / "codes.gguf"), "llama")
    writer.add_string("general.type", "adapter")
    writer.add_float32("adapter.lora.alpha", 64.0)
    decoded = []
    for letter, shape in (("a", (32, 64)), ("b", (8, 32))):
        codes = gguf.quants.quantize(torch.randn(shape).numpy(), kind)
        writer.add_tensor(f"{V}.lora_{letter}", codes, raw_dtype=kind)
        decoded.append(gguf.quants.dequantize(codes, kind).astype(np.float64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    close(spectra.open_source(tmp_path / "codes.gguf")[V_NAME], torch.from_numpy(2 * decoded[1] @ decoded[0]))


@pytest.mark.parametrize("name", [f"{V}.lora_c", "blk.0.attn_v.magnitude", f"{V}.lora_b.scale"])
def test_a_tensor_that_no_rule_knows_takes_the_number_of_its_module(name, tmp_path):
    source = spectra.open_source(write_lora(tmp_path / "a.gguf", factors(V, rows=8) | {name: torch.ones(2, 2)}))
    assert source[V_NAME].status == "unsupported"
    assert "is no part of" in source[V_NAME].reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{V}.lora_b": None}, "lora_b of blk.0.attn_v.weight is missing"),
        ({f"{V}.lora_b": torch.ones(8, 3)}, "cannot be multiplied"),
        ({f"{V}.lora_b": torch.ones(2, 8, 2)}, "cannot be multiplied"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused(change, words, tmp_path):
    tensors = {name: tensor for name, tensor in (factors(V, rows=8) | change).items() if tensor is not None}
    assert words in spectra.open_source(write_lora(tmp_path / "a.gguf", tensors))[V_NAME].reason


def test_a_norm_that_mergekit_put_beside_the_factors_is_listed(tmp_path):
    tensors = factors(V, rows=8) | {"blk.0.attn_norm.weight": torch.ones(16)}
    source = spectra.open_source(write_lora(tmp_path / "a.gguf", tensors))
    assert source.coverage.skipped == {"blk.0.attn_norm.weight": "a vector, not a matrix"}
    close(source[V_NAME], product(factors(V, rows=8), 3.5))


def test_the_header_counts_and_not_pefts_config_in_whose_folder_the_converter_writes(tmp_path):
    peft = write_adapter(tmp_path / "a", {"x.lora_A.weight": torch.ones(2, 2)}, {"peft_type": "LORA", "lora_alpha": 99})
    file = shutil.move(write_lora(tmp_path / "a.gguf", factors(V, rows=8)), peft / "a-F32-LoRA.gguf")
    close(spectra.open_source(file)[V_NAME], product(factors(V, rows=8), 3.5))


def test_it_is_no_base(tmp_path):
    adapter = write_lora(tmp_path / "a.gguf", factors())
    folder = base(tmp_path, {"model_type": "llama"})
    with pytest.raises(SelectionError, match="is an adapter, not a base model"):
        spectra.open_source(folder, adapter)


def test_a_blob_of_ollamas_store_has_no_suffix(tmp_path):
    blob = write_lora(tmp_path / "a.gguf", factors(V, rows=8)).rename(tmp_path / "sha256-0a1b2c")
    close(spectra.open_source(blob)[V_NAME], product(factors(V, rows=8), 3.5))
    (tmp_path / "sha256-3d4e5f").write_bytes(b"{}")
    with pytest.raises(SourceError, match="is not a weights file"):
        spectra.open_source(tmp_path / "sha256-3d4e5f")


def test_a_refused_matrix_keeps_its_shape(tmp_path):
    assert spectra.open_source(write_lora(tmp_path / "a.gguf", factors()))[Q_NAME].shape == (16, 16)
