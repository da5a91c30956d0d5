"""Meta's consolidated files: joined, refused where they are a part, and compared with transformers' names and rows."""

from __future__ import annotations

import json

import pytest
import torch
from support.checkpoints import write_checkpoint

import spectra
from spectra.errors import SourceError
from spectra.models.opening import open_model

DIM, HEADS, KV, FFN, VOCAB = 16, 4, 2, 24, 32
ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
PARAMS = {"dim": DIM, "n_layers": 1, "n_heads": HEADS, "n_kv_heads": KV, "vocab_size": VOCAB, "norm_eps": 1e-5}


def whole(seed):
    generator = torch.Generator().manual_seed(seed)
    kv = KV * DIM // HEADS
    shapes = {
        "tok_embeddings.weight": (VOCAB, DIM),
        "output.weight": (VOCAB, DIM),
        "layers.0.attention.wq.weight": (DIM, DIM),
        "layers.0.attention.wk.weight": (kv, DIM),
        "layers.0.attention.wv.weight": (kv, DIM),
        "layers.0.attention.wo.weight": (DIM, DIM),
        "layers.0.feed_forward.w1.weight": (FFN, DIM),
        "layers.0.feed_forward.w2.weight": (DIM, FFN),
        "layers.0.feed_forward.w3.weight": (FFN, DIM),
        "norm.weight": (DIM,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_parts(folder, tensors, count=2):
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(PARAMS))
    for part in range(count):
        held = {}
        for name, tensor in tensors.items():
            axis = 0 if name.split(".")[-2] in ROWS else 1
            held[name] = tensor if tensor.ndim == 1 else tensor.chunk(count, axis)[part].clone()
        torch.save(held, folder / f"consolidated.{part:02}.pth")
    return folder


def as_transformers(tensors):
    """Written out on its own: names, and the rows of q and k from (heads, d/2, 2) to (heads, 2, d/2)."""

    def rows(weight, heads):
        return weight.view(heads, -1, 2, DIM).transpose(1, 2).reshape(weight.shape)

    names = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj"}
    names |= {"w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
    found = {f"model.layers.0.{new}.weight": tensors[_stored(old)] for old, new in names.items()}
    found["model.layers.0.self_attn.q_proj.weight"] = rows(tensors[_stored("wq")], HEADS)
    found["model.layers.0.self_attn.k_proj.weight"] = rows(tensors[_stored("wk")], KV)
    found |= {"model.embed_tokens.weight": tensors["tok_embeddings.weight"], "lm_head.weight": tensors["output.weight"]}
    return found | {"model.norm.weight": tensors["norm.weight"]}


def _stored(part):
    return f"layers.0.{'attention' if part.startswith('w') and part[1] in 'qkvo' else 'feed_forward'}.{part}.weight"


def test_parts_are_joined_along_the_right_axis(tmp_path):
    base, tuned = whole(1), whole(2)
    folders = [write_parts(tmp_path / name, tensors) for name, tensors in (("base", base), ("tuned", tuned))]
    source = spectra.open_source(folders[1], folders[0])
    assert {delta.name for delta in source} == {name for name, tensor in base.items() if tensor.ndim == 2}
    for delta in source:
        expected = tuned[delta.name].double() - base[delta.name].double()
        assert torch.equal(delta.read().to_dense(), expected), delta.name


def test_one_part_alone_is_refused(tmp_path):
    folder = write_parts(tmp_path / "base", whole(1))
    with pytest.raises(SourceError, match="one of the 2 parts of a tensor-parallel model"):
        open_model(folder / "consolidated.00.pth")
    (folder / "consolidated.01.pth").unlink()
    for path in (folder, folder / "consolidated.00.pth"):
        with pytest.raises(SourceError, match="is one of 2 parts of a model"):
            open_model(path)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("side", ["tuned", "base"])
def test_the_other_side_may_be_transformers(tmp_path, count, side):
    base, tuned = whole(1), whole(2)
    config = {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": KV, "hidden_size": DIM}
    meta = write_parts(tmp_path / "meta", tuned if side == "tuned" else base, count)
    other = write_checkpoint(tmp_path / "hf", as_transformers(base if side == "tuned" else tuned), config=config)
    source = spectra.open_source(*((meta, other) if side == "tuned" else (other, meta)))
    expected = {name: as_transformers(tuned)[name].double() - tensor for name, tensor in as_transformers(base).items()}
    assert {delta.name for delta in source} == {name for name, tensor in expected.items() if tensor.ndim == 2}
    for delta in source:
        assert torch.equal(delta.read().to_dense(), expected[delta.name]), delta.name


def test_the_same_model_in_both_layouts_is_unchanged(tmp_path):
    meta = write_parts(tmp_path / "meta", whole(1))
    other = write_checkpoint(tmp_path / "hf", as_transformers(whole(1)))
    assert {found.status for found in spectra.decompose(spectra.open_source(meta, other))} == {"unchanged"}
