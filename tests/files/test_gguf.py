"""GGUF: names, shapes, the permutation of q and k, and quantised types, against transformers and the gguf package."""

from __future__ import annotations

import json
import pickle
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from support.checkpoints import write_checkpoint

import spectra
from spectra.errors import MissingExtraError, SourceError
from spectra.files import ggml, readers
from spectra.files.folder import open_folder

HEADS, GROUPS, HIDDEN, FFN, VOCABULARY, LAYERS = 4, 2, 64, 96, 10, 2
WIDTH = HIDDEN // HEADS
PREFIX = "model.layers.{}."
SHAPES = {
    "self_attn.q_proj": ("attn_q", (HIDDEN, HIDDEN)),
    "self_attn.k_proj": ("attn_k", (GROUPS * WIDTH, HIDDEN)),
    "self_attn.v_proj": ("attn_v", (GROUPS * WIDTH, HIDDEN)),
    "self_attn.o_proj": ("attn_output", (HIDDEN, HIDDEN)),
    "mlp.gate_proj": ("ffn_gate", (FFN, HIDDEN)),
    "mlp.up_proj": ("ffn_up", (FFN, HIDDEN)),
    "mlp.down_proj": ("ffn_down", (HIDDEN, FFN)),
    "input_layernorm": ("attn_norm", (HIDDEN,)),
    "post_attention_layernorm": ("ffn_norm", (HIDDEN,)),
}
TOP = {
    "model.embed_tokens.weight": ("token_embd.weight", (VOCABULARY, HIDDEN)),
    "model.norm.weight": ("output_norm.weight", (HIDDEN,)),
    "lm_head.weight": ("output.weight", (VOCABULARY, HIDDEN)),
}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: shape for name, (_, shape) in TOP.items()}
    for layer in range(LAYERS):
        shapes |= {f"{PREFIX.format(layer)}{name}.weight": shape for name, (_, shape) in SHAPES.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def interleaved(weight, heads):
    """Row by row: llama.cpp puts row (half, position) of a head at 2·position + half."""
    out, width = torch.empty_like(weight), len(weight) // heads
    for head in range(heads):
        for half in range(2):
            for position in range(width // 2):
                out[head * width + 2 * position + half] = weight[head * width + half * (width // 2) + position]
    return out


def llamacpp_names(state, permuted=True):
    found = {}
    for name, tensor in state.items():
        if name in TOP:
            found[TOP[name][0]] = tensor
            continue
        layer, inner = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        if permuted and inner.endswith(("q_proj", "k_proj")):
            tensor = interleaved(tensor, HEADS if inner.endswith("q_proj") else GROUPS)
        found[f"blk.{layer}.{SHAPES[inner][0]}.weight"] = tensor
    return found


def write_gguf(path, state, arch="llama", types=None, **numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_context_length(64)
    writer.add_feed_forward_length(FFN)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_head_count(numbers.get("heads", HEADS))
    writer.add_head_count_kv(GROUPS)
    writer.add_token_list(["<unk>"] * 7)
    writer.add_array("some.floats", [0.5, 1.5])
    if "experts" in numbers:
        writer.add_expert_count(numbers["experts"])
    for name, tensor in state.items():
        kind = (types or {}).get(name, gguf.GGMLQuantizationType.F32)
        data = tensor.numpy()
        if kind == gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, data.astype(np.float16))
        elif kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check(source, tuned, base):
    matrices = {name for name in base if base[name].ndim == 2}
    assert {delta.name for delta in source} == matrices
    for name in matrices:
        expected = tuned[name].double() - base[name].double()
        assert torch.equal(source[name].read().to_dense(), expected), name


@pytest.mark.parametrize("in_gguf", ["both", "tuned", "base"])
@pytest.mark.parametrize(("arch", "permuted"), [("llama", True), ("qwen2", False), ("gemma", False)])
def test_weights_come_back_in_transformers_names_and_row_order(tmp_path, in_gguf, arch, permuted):
    base, tuned = tensors(0), tensors(1)
    folders = {}
    for side, state in (("tuned", tuned), ("base", base)):
        if in_gguf in (side, "both"):
            folders[side] = write_gguf(tmp_path / f"{side}.gguf", llamacpp_names(state, permuted), arch)
        else:
            folders[side] = write_checkpoint(
                tmp_path / side, state, config={"model_type": arch, "tie_word_embeddings": False}
            )
    source = spectra.open_source(folders["tuned"], folders["base"])
    check(source, tuned, base)
    assert source.coverage.warnings == ()
    assert source["model.layers.1.self_attn.v_proj.weight"].role == "v_proj"


def test_the_reader_of_transformers_agrees(tmp_path):
    """Their loader is independent of this one and of our own writing of the permutation."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    state = tensors(3)
    path = write_gguf(tmp_path / "x.gguf", llamacpp_names(state))
    processor = LlamaTensorProcessor(config={"num_attention_heads": HEADS, "num_key_value_heads": GROUPS})
    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(str(path)).tensors}
    ours = open_folder(path).tensors
    for layer in range(LAYERS):
        for inner in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
            name = f"blk.{layer}.{SHAPES[inner][0]}.weight"
            theirs = processor.process(stored[name], name).weights
            assert np.array_equal(ours[f"{PREFIX.format(layer)}{inner}.weight"].read().numpy(), theirs)


TYPES = ["Q8_0", "Q4_0", "Q5_1", "BF16", "F16"]


@pytest.mark.parametrize("kind", TYPES)
def test_quantised_types_are_decoded_as_the_package_does(tmp_path, kind):
    base, tuned = tensors(0), tensors(1)
    qtype = gguf.GGMLQuantizationType[kind]
    stored = llamacpp_names(tuned)
    names = [name for name, tensor in stored.items() if tensor.ndim == 2]
    path = write_gguf(tmp_path / "t.gguf", stored, types=dict.fromkeys(names, qtype))
    source = spectra.open_source(
        path, write_checkpoint(tmp_path / "b", base, config={"model_type": "llama", "tie_word_embeddings": False})
    )
    for delta in source:
        plain = tuned[delta.name]
        rows = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(plain.numpy(), qtype), qtype)).double()
        assert torch.equal(delta.read().to_dense(), rows - base[delta.name].double()), delta.name
    said = [warning for warning in source.coverage.warnings if "quantised" in warning]
    assert bool(said) == (kind not in ("BF16", "F16"))
    packed = pickle.dumps(source["lm_head.weight"])
    assert len(packed) < 3000
    assert torch.equal(pickle.loads(packed).read().to_dense(), source["lm_head.weight"].read().to_dense())


def test_listing_decodes_nothing_and_reads_no_data(tmp_path, monkeypatch):
    stored = llamacpp_names(tensors(1))
    names = [name for name, tensor in stored.items() if tensor.ndim == 2]
    path = write_gguf(tmp_path / "t.gguf", stored, types=dict.fromkeys(names, gguf.GGMLQuantizationType.Q8_0))
    monkeypatch.setitem(readers.READERS, "gguf", lambda ref: pytest.fail("read while listing"))
    monkeypatch.setattr(gguf.quants, "dequantize", lambda *_: pytest.fail("decoded while listing"))
    source = spectra.open_source(path, path)
    assert len(source) == sum(tensor.ndim == 2 for tensor in tensors().values())


def test_a_file_without_a_head_is_tied(tmp_path):
    base, tuned = tensors(0), tensors(1)
    for state in (base, tuned):
        del state["lm_head.weight"]
    source = spectra.open_source(
        write_gguf(tmp_path / "t.gguf", llamacpp_names(tuned)), write_gguf(tmp_path / "b.gguf", llamacpp_names(base))
    )
    check(source, tuned, base)
    assert "tied" in source["model.embed_tokens.weight"].note


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_experts_of_a_stack_are_apart_and_read_alone(tmp_path, kind):
    experts = {part: torch.randn(3, 8, 32) for part in ("gate", "up")}
    state = {f"blk.0.ffn_{part}_exps.weight": stack for part, stack in experts.items()}
    state["blk.0.ffn_gate_inp.weight"] = torch.randn(3, 32)
    qtype = gguf.GGMLQuantizationType[kind]
    stacks = [name for name in state if "exps" in name]
    path = write_gguf(tmp_path / "t.gguf", state, types=dict.fromkeys(stacks, qtype), experts=3)
    base = {
        f"model.layers.0.block_sparse_moe.experts.{index}.{part}.weight": torch.randn(8, 32)
        for index in range(3)
        for part in ("w1", "w3")
    } | {"model.layers.0.block_sparse_moe.gate.weight": torch.randn(3, 32)}
    source = spectra.open_source(path, write_checkpoint(tmp_path / "b", base, config={"model_type": "mixtral"}))
    assert {delta.name for delta in source} == set(base)
    decoded = {
        part: stack
        if kind == "F32"
        else torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(stack.numpy(), qtype), qtype))
        for part, stack in experts.items()
    }
    for index in range(3):
        for part, ours in (("gate", "w1"), ("up", "w3")):
            name = f"model.layers.0.block_sparse_moe.experts.{index}.{ours}.weight"
            expected = decoded[part][index].double() - base[name].double()
            assert torch.equal(source[name].read().to_dense(), expected)
            assert source[name].recipe.tuned.stored == (8, 32)


def test_the_parts_of_a_split_file_are_one_model(tmp_path):
    base, tuned = tensors(0), tensors(1)
    for side, state in (("b", base), ("t", tuned)):
        stored = list(llamacpp_names(state).items())
        for index, part in enumerate((stored[:7], stored[7:])):
            write_gguf(tmp_path / side / f"m-0000{index + 1}-of-00002.gguf", dict(part))
    check(spectra.open_source(tmp_path / "t", tmp_path / "b"), tuned, base)


def test_several_quantisations_in_a_folder_are_not_chosen_between(tmp_path):
    for name in ("m.Q4_0.gguf", "m.Q8_0.gguf"):
        write_gguf(tmp_path / name, llamacpp_names(tensors()))
    with pytest.raises(SourceError, match=r"m\.Q4_0\.gguf, m\.Q8_0\.gguf; name one"):
        open_folder(tmp_path)


def test_an_architecture_that_is_not_in_the_table_keeps_its_own_names_and_says_so(tmp_path):
    base, tuned = {"blk.0.ssm_in.weight": torch.eye(4)}, {"blk.0.ssm_in.weight": 2 * torch.eye(4)}
    source = spectra.open_source(
        write_gguf(tmp_path / "t.gguf", tuned, "mamba"), write_gguf(tmp_path / "b.gguf", base, "mamba")
    )
    assert torch.equal(source["blk.0.ssm_in.weight"].read().to_dense(), torch.eye(4).double())
    assert any("architecture 'mamba' is not in the table" in warning for warning in source.coverage.warnings)


def test_without_a_head_count_the_permutation_is_not_guessed(tmp_path):
    path = write_gguf(tmp_path / "t.gguf", llamacpp_names(tensors()), heads=0)
    source = spectra.open_source(path, path)
    assert source["model.layers.0.self_attn.q_proj.weight"].status == "unreadable"
    assert "head count" in source["model.layers.0.self_attn.q_proj.weight"].reason
    assert source["model.layers.0.self_attn.v_proj.weight"].status == "ok"


def test_without_the_package_the_install_command_is_given(tmp_path, monkeypatch):
    plain = write_gguf(tmp_path / "plain.gguf", llamacpp_names(tensors()))
    quantised = write_gguf(
        tmp_path / "q.gguf",
        {"output.weight": torch.randn(4, 32)},
        types={"output.weight": gguf.GGMLQuantizationType.Q8_0},
    )
    ggml.block_sizes.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert len(open_folder(plain).tensors) == len(tensors())
    with pytest.raises(MissingExtraError, match=r"pip install 'weight-spectra\[gguf\]'"):
        open_folder(quantised)


def raw(path, tensor_count=1, value_count=0, body=b"", version=3, magic=b"GGUF"):
    path.write_bytes(magic + struct.pack("<IQQ", version, tensor_count, value_count) + body)
    return path


def entry(name=b"a", shape=(2, 2), kind=0, offset=0):
    return (
        struct.pack("<Q", len(name))
        + name
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


HOSTILE = {
    "wrong magic": {"magic": b"GGML"},
    "pointer": {"magic": b"version https://git-lfs"},
    "version": {"version": 9},
    "big endian": {"version": 3 << 24},
    "more tensors than bytes": {"tensor_count": 2**60},
    "more values than bytes": {"value_count": 2**60},
    "name longer than the file": {"body": struct.pack("<Q", 2**62)},
    "too many axes": {"body": entry(shape=(1,) * 9)},
    "no axes": {"body": entry(shape=())},
    "twice": {"tensor_count": 2, "body": entry() * 2 + bytes(64)},
    "unknown metadata type": {"value_count": 1, "body": struct.pack("<Q", 1) + b"k" + struct.pack("<I", 77)},
    "endless array": {"value_count": 1, "body": struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**60)},
    "nested arrays": {
        "value_count": 1,
        "body": struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 99,
    },
    "alignment": {
        "value_count": 1,
        "body": struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 0) + entry() + bytes(64),
    },
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_one_message_that_names_the_file(tmp_path, case):
    path = raw(tmp_path / "x.gguf", **HOSTILE[case])
    with pytest.raises(SourceError, match=r"x\.gguf") as caught:
        open_folder(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (entry(shape=(2**40, 2**40)) + bytes(64), "truncated"),
        (entry(offset=2**40) + bytes(64), "truncated"),
        (entry(kind=999) + bytes(64), "not known here"),
        (entry(shape=(33, 2), kind=8) + bytes(640), "not known here"),
        (entry(shape=(2**63, 0, 3)) + bytes(64), ""),
    ],
)
def test_a_tensor_that_cannot_be_there_is_broken(tmp_path, body, reason):
    found = open_folder(raw(tmp_path / "x.gguf", body=body))
    if reason:
        assert reason in found.broken["a"]
        assert not found.tensors
    else:
        assert found.tensors["a"].numel == 0


def test_a_cut_file_loses_its_end_only(tmp_path):
    path = write_gguf(tmp_path / "t.gguf", llamacpp_names(tensors()))
    whole = open_folder(path)
    path.write_bytes(path.read_bytes()[:-5000])
    found = open_folder(path)
    assert 0 < len(found.broken) < 4
    assert set(found.tensors) | set(found.broken) == set(whole.tensors)
    assert all("truncated" in why for why in found.broken.values())


def test_the_config_is_what_the_metadata_say(tmp_path):
    found = open_folder(write_gguf(tmp_path / "t.gguf", llamacpp_names(tensors())))
    assert json.loads(json.dumps(found.config)) == {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "hidden_size": HIDDEN,
    }
