"""Meta's names, row order and tensor-parallel parts against transformers' own conversion, written out here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.checkpoints import write_checkpoint

from spectra.errors import SourceError
from spectra.files.folder import open_folder
from spectra.files.headers import read_header
from spectra.files.storage import Place
from spectra.files.tensors import TensorRef
from spectra.models.meta_names import (
    Joined,
    as_transformers,
    how_joined,
    in_meta_order,
    in_transformers_order,
    is_meta,
    joined,
    transformers_config,
    transformers_name,
)

PARAMS = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 32, "norm_eps": 1e-5}
SHAPES = {
    "attention.wq": (16, 16),
    "attention.wk": (8, 16),
    "attention.wv": (8, 16),
    "attention.wo": (16, 16),
    "feed_forward.w1": (24, 16),
    "feed_forward.w2": (16, 24),
    "feed_forward.w3": (24, 16),
    "attention_norm": (16,),
    "ffn_norm": (16,),
}


def meta_model(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"tok_embeddings.weight": (32, 16), "norm.weight": (16,), "output.weight": (32, 16)}
    shapes |= {f"layers.{layer}.{name}.weight": shape for layer in range(2) for name, shape in SHAPES.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def permute(weight, heads):
    """What the published conversion of LLaMA does to wq and wk."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def converted(tensors):
    """The published conversion: transformers' name → tensor."""
    found = {
        "model.embed_tokens.weight": tensors["tok_embeddings.weight"],
        "model.norm.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["output.weight"],
    }
    for layer in range(2):
        own, new = f"layers.{layer}.", f"model.layers.{layer}."
        found |= {
            f"{new}self_attn.q_proj.weight": permute(tensors[f"{own}attention.wq.weight"], 4),
            f"{new}self_attn.k_proj.weight": permute(tensors[f"{own}attention.wk.weight"], 2),
            f"{new}self_attn.v_proj.weight": tensors[f"{own}attention.wv.weight"],
            f"{new}self_attn.o_proj.weight": tensors[f"{own}attention.wo.weight"],
            f"{new}mlp.gate_proj.weight": tensors[f"{own}feed_forward.w1.weight"],
            f"{new}mlp.down_proj.weight": tensors[f"{own}feed_forward.w2.weight"],
            f"{new}mlp.up_proj.weight": tensors[f"{own}feed_forward.w3.weight"],
            f"{new}input_layernorm.weight": tensors[f"{own}attention_norm.weight"],
            f"{new}post_attention_layernorm.weight": tensors[f"{own}ffn_norm.weight"],
        }
    return found


def parts_of(tensors, count, embedding_axis):
    """The parts that Meta's own model-parallel code makes of a model."""

    def cut(name, tensor, part):
        if tensor.ndim == 1:
            return tensor
        columns = name.endswith(("wo.weight", "w2.weight")) or ("tok_emb" in name and embedding_axis == 1)
        return tensor.chunk(count, 1 if columns else 0)[part].clone()

    return [{name: cut(name, tensor, part) for name, tensor in tensors.items()} for part in range(count)]


def meta_folder(path, tensors, params=PARAMS):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    folder = open_folder(path)
    return type(folder)(folder.path, folder.tensors, config=dict(params))


def test_a_whole_model_is_what_the_conversion_makes_of_it(tmp_path):
    tensors = meta_model()
    folder = meta_folder(tmp_path / "meta", tensors)
    assert is_meta(folder)
    found = as_transformers(folder)
    expected = converted(tensors)
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name].read(), tensor) for name, tensor in expected.items())
    assert not is_meta(open_folder(write_checkpoint(tmp_path / "transformers", expected)))


def test_the_config_in_transformers_words():
    assert transformers_config(PARAMS) == {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,
    }


def test_names_that_are_not_metas_are_left(tmp_path):
    assert transformers_name("rope.freqs") is None
    assert transformers_name("layers.0.attention.wq.bias") is None
    folder = meta_folder(tmp_path / "meta", meta_model() | {"rope.freqs": torch.ones(2)})
    assert "rope.freqs" in as_transformers(folder).tensors


def test_without_heads_or_with_experts_it_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"no params\.json beside it that says n_heads"):
        as_transformers(meta_folder(tmp_path / "a", meta_model(), {}))
    with pytest.raises(SourceError, match="mixture of experts"):
        as_transformers(meta_folder(tmp_path / "b", meta_model(), PARAMS | {"moe": {"num_experts": 8}}))
    with pytest.raises(SourceError, match="16 rows, which are not 3 heads"):
        as_transformers(meta_folder(tmp_path / "c", meta_model(), PARAMS | {"n_heads": 3}))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_the_two_orders_of_rows(heads, half, columns):
    weight = torch.arange(heads * half * 2 * columns).reshape(-1, columns)
    ref = TensorRef("", "wq", "I64", tuple(weight.shape), "", (0, 0))
    assert torch.equal(in_transformers_order(ref, heads).view(weight), permute(weight, heads))
    back = in_meta_order(in_transformers_order(ref, heads), heads)
    assert torch.equal(back.view(weight), weight)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("left_out", [(), ("vocab_size",)])
def test_parts_are_joined_to_the_whole(tmp_path, count, embedding_axis, left_out):
    tensors = meta_model()
    params = {key: value for key, value in PARAMS.items() if key not in left_out}
    refs = []
    for number, part in enumerate(parts_of(tensors, count, embedding_axis)):
        torch.save(part, tmp_path / f"consolidated.{number:02}.pth")
        refs.append(read_header(Place.of(tmp_path / f"consolidated.{number:02}.pth")).tensors)
    found, refused = joined(params, refs)
    assert not refused
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].nbytes == tensor.numel() * 4
        assert torch.equal(found[name].read(), tensor), name
        if tensor.ndim == 2:
            assert torch.equal(found[name].rows(1, 5).T.read(), tensor[1:5].T), name


def test_one_part_alone_is_refused(tmp_path):
    torch.save(parts_of(meta_model(), 2, 1)[0], tmp_path / "consolidated.00.pth")
    refs = read_header(Place.of(tmp_path / "consolidated.00.pth")).tensors
    said = r"is one of 2 parts of a model, as layers.0.attention.wq.weight \[8, 16\] and params.json say, and 1 came"
    with pytest.raises(SourceError, match=said):
        joined(PARAMS, [refs])


def test_key_heads_that_several_parts_share_are_refused():
    with pytest.raises(SourceError, match="some parts are copies"):
        how_joined(PARAMS, "layers.0.attention.wk.weight", [(4, 16)] * 4)


@pytest.mark.parametrize(
    ("name", "shapes", "said"),
    [
        ("layers.0.attention.wq.weight", [(8, 16), (4, 16)], "are not of one model"),
        ("layers.0.lora.weight", [(8, 16), (8, 16)], "is not known"),
        ("tok_embeddings.weight", [(32, 5), (32, 5)], "is not known"),
        ("layers.0.attention.wo.weight", [(8, 16), (8, 16)], "params.json says 16 × 16"),
    ],
)
def test_parts_that_do_not_fit_are_refused(name, shapes, said):
    with pytest.raises(SourceError, match=said):
        how_joined(PARAMS, name, shapes)


def test_vectors_are_copies_and_a_missing_part_is_named(tmp_path):
    assert how_joined(PARAMS, "rope.freqs", [(2,), (2,)]) == Joined(None, (2,))
    whole = parts_of(meta_model(), 2, 0)
    del whole[1]["norm.weight"]
    refs = []
    for number, part in enumerate(whole):
        torch.save(part, tmp_path / f"{number}.pth")
        refs.append(read_header(Place.of(tmp_path / f"{number}.pth")).tensors)
    assert "norm.weight is in 1 of the 2 files only" in joined(PARAMS, refs)[1]["norm.weight"]


def test_references_that_do_not_fit_are_not_joined():
    first = TensorRef("a", "w", "F32", (2, 3), "torch", (0, 0))
    with pytest.raises(SourceError, match="do not fit together"):
        TensorRef.joined([first, TensorRef("b", "w", "F32", (2, 4), "torch", (0, 0))], 0)
    with pytest.raises(SourceError, match="do not fit together"):
        TensorRef.joined([first, TensorRef("b", "w", "F16", (2, 3), "torch", (0, 0))], 0)


def test_a_part_that_changed_is_noticed(tmp_path):
    for number, part in enumerate(parts_of(meta_model(), 2, 0)):
        torch.save(part, tmp_path / f"{number}.pth")
    refs = [read_header(Place.of(tmp_path / f"{number}.pth")).tensors for number in range(2)]
    found, _ = joined(PARAMS, refs)
    torch.save({"x": torch.ones(1)}, tmp_path / "1.pth")
    with pytest.raises(SourceError, match="changed after it was opened"):
        found["layers.0.attention.wq.weight"].read()
