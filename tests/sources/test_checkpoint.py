"""Full checkpoints: ΔW against the float64 difference of what was stored, in every layout that people have."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file, save_model
from support.checkpoints import VOCABULARY, llama_tensors, nudged, write_checkpoint

import spectra
from spectra.errors import BaseRequiredError, SourceError

BASE = llama_tensors()
TUNED = nudged(BASE)
MATRICES = {name for name, tensor in BASE.items() if tensor.ndim == 2}
TIED = {"model_type": "llama", "tie_word_embeddings": True}
UNTIED = {"model_type": "llama", "tie_word_embeddings": False}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def difference(tuned, base):
    return {name: tuned[name].double() - base[name].double() for name in base if base[name].ndim >= 2}


def assert_equal(source, expected):
    """Exactly these matrices, bit for bit: float64 holds every difference of stored values."""
    got = {delta.name: delta for delta in source}
    assert set(got) == set(expected)
    for name, delta in got.items():
        assert tuple(expected[name].shape) == delta.shape
        assert torch.equal(delta.read().to_dense(), expected[name]), name


def write_bin(folder, content, name="pytorch_model.bin", config=None):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / name)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


LAYOUTS = {
    "one safetensors": lambda place, tensors: write_checkpoint(place, tensors),
    "shards and index": lambda place, tensors: write_checkpoint(place, tensors, shards=3),
    "one file by path": lambda place, tensors: write_checkpoint(place, tensors) / "model.safetensors",
    "bin": lambda place, tensors: write_bin(place, tensors),
    "pt by path": lambda place, tensors: write_bin(place, tensors, "weights.pt") / "weights.pt",
    "trainer's wrapping": lambda place, tensors: write_bin(place, {"epoch": 3, "model_state_dict": tensors}, "last.pt"),
    "lightning": lambda place, tensors: write_bin(
        place, {"state_dict": {f"model.{name}": t for name, t in tensors.items()}, "hyper_parameters": {"lr": 0.1}}
    ),
    "old torch file": lambda place, tensors: old_torch(place, tensors),
}


def old_torch(place, tensors):
    write_bin(place, {})
    torch.save(tensors, place / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return place


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_stored_difference(layout, tmp_path):
    base = write_checkpoint(tmp_path / "base", BASE, config=UNTIED)
    source = spectra.open_source(LAYOUTS[layout](tmp_path / "tuned", TUNED), base)
    assert source.kind == "checkpoint"
    assert_equal(source, difference(TUNED, BASE))
    assert not source.coverage.base_only
    assert not source.coverage.tuned_only
    assert source.coverage.skipped["model.norm.weight"] == "a vector, not a matrix"


def test_a_saved_parameter_that_requires_a_gradient_is_read(tmp_path):
    base = write_checkpoint(tmp_path / "base", {"a.weight": torch.eye(3)})
    tuned = write_bin(tmp_path / "tuned", {"a.weight": torch.nn.Parameter(2 * torch.eye(3))})
    assert torch.equal(spectra.open_source(tuned, base).deltas[0].read().to_dense(), torch.eye(3).double())


def test_the_snapshot_of_a_hub_cache_is_links_to_blobs(tmp_path):
    folders = []
    for name, tensors in (("base", BASE), ("tuned", TUNED)):
        plain = write_checkpoint(tmp_path / "plain" / name, tensors, shards=2)
        repo = tmp_path / f"models--org--{name}"
        snapshot = repo / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir()
        for index, file in enumerate(plain.iterdir()):
            (repo / "blobs" / str(index)).write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(f"../../blobs/{index}")
        folders.append(snapshot)
    assert_equal(spectra.open_source(folders[1], folders[0]), difference(TUNED, BASE))


@pytest.mark.parametrize("tuned_type", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("base_type", [torch.bfloat16, torch.float32])
def test_types_are_raised_before_the_subtraction(tmp_path, tuned_type, base_type):
    tuned, base = nudged(llama_tensors(dtype=tuned_type)), llama_tensors(dtype=base_type)
    folders = write_checkpoint(tmp_path / "t", tuned), write_checkpoint(tmp_path / "b", base, config=UNTIED)
    assert_equal(spectra.open_source(*folders), difference(tuned, base))


def test_nan_is_a_status_and_the_others_are_done(tmp_path):
    tuned = dict(TUNED) | {HEAD: TUNED[HEAD].clone()}
    tuned[HEAD][0, 0] = float("nan")
    source = spectra.open_source(
        write_checkpoint(tmp_path / "t", tuned), write_checkpoint(tmp_path / "b", BASE, config=UNTIED)
    )
    found = {spectrum.name: spectrum.status for spectrum in spectra.decompose(source)}
    assert found.pop(HEAD) == "nonfinite"
    assert set(found.values()) == {"ok"}


def test_deltas_are_small_picklable_recipes(tmp_path):
    source = spectra.open_source(write_checkpoint(tmp_path / "t", TUNED), write_checkpoint(tmp_path / "b", BASE))
    for delta in source:
        packed = pickle.dumps(delta)
        assert len(packed) < 2000
        assert torch.equal(pickle.loads(packed).read().to_dense(), delta.read().to_dense())
        assert not delta.factored


def test_without_a_base_the_error_says_so(tmp_path):
    with pytest.raises(BaseRequiredError, match=r"pass base= \(--base\)"):
        spectra.open_source(write_checkpoint(tmp_path / "t", TUNED))


def test_options_that_mean_nothing_are_ignored_aloud(tmp_path):
    folders = write_checkpoint(tmp_path / "t", TUNED), write_checkpoint(tmp_path / "b", BASE)
    said = " ".join(spectra.open_source(*folders, scale=2.0, heads="each").coverage.warnings)
    assert "scale was ignored" in said
    assert "heads='each' was ignored" in said


def test_what_one_side_lacks_is_listed(tmp_path):
    tuned = {name: tensor for name, tensor in TUNED.items() if "layers.1.mlp" not in name}
    tuned["classifier.weight"] = torch.ones(2, 16)
    source = spectra.open_source(
        write_checkpoint(tmp_path / "t", tuned), write_checkpoint(tmp_path / "b", BASE, config=UNTIED)
    )
    assert set(source.coverage.base_only) == {name for name in BASE if "layers.1.mlp" in name}
    assert set(source.coverage.tuned_only) == {"classifier.weight"}
    listed = {delta.name for delta in source} | set(source.coverage.skipped) | set(source.coverage.base_only)
    assert listed == set(BASE)


def test_two_models_without_a_common_name_are_refused(tmp_path):
    other = {f"x.{index}.y.kernel": torch.ones(2, 2) for index in range(3)}
    with pytest.raises(SourceError, match=r"is base= \(--base\) the model that was tuned"):
        spectra.open_source(write_checkpoint(tmp_path / "t", other), write_checkpoint(tmp_path / "b", BASE))


# -- vocabulary and tied heads


@pytest.mark.parametrize("rows", [VOCABULARY + 5, VOCABULARY - 7])
def test_a_resized_vocabulary_compares_the_rows_that_both_have(tmp_path, rows):
    tuned = dict(TUNED)
    for name in (HEAD, EMBEDDING):
        tuned[name] = torch.randn(rows, 16)
        tuned[name][:VOCABULARY] = TUNED[name][:rows]
    source = spectra.open_source(
        write_checkpoint(tmp_path / "t", tuned, config=UNTIED), write_checkpoint(tmp_path / "b", BASE, config=UNTIED)
    )
    common = min(rows, VOCABULARY)
    expected = difference(TUNED, BASE)
    for name in (HEAD, EMBEDDING):
        expected[name] = expected[name][:common]
        assert f"first {common} rows" in source[name].note
        assert name in source.coverage.shape_mismatch
    assert_equal(source, expected)


def test_another_difference_in_shape_is_refused(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    tuned = dict(TUNED) | {name: torch.ones(30, 16)}
    source = spectra.open_source(write_checkpoint(tmp_path / "t", tuned), write_checkpoint(tmp_path / "b", BASE))
    assert source[name].status == "shape_mismatch"
    assert source.coverage.shape_mismatch[name] == "tuned is [30, 16], base is [24, 16]"


def without_head(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def test_tied_on_both_sides_is_reported_once_and_says_what_for(tmp_path):
    base, tuned = without_head(BASE), without_head(TUNED)
    source = spectra.open_source(
        write_checkpoint(tmp_path / "t", tuned, config=TIED), write_checkpoint(tmp_path / "b", base, config=TIED)
    )
    assert_equal(source, difference(tuned, base))
    assert source[EMBEDDING].note == "also stands for the output head (tied)"


def test_an_untied_head_is_compared_with_the_embedding_of_a_tied_base(tmp_path):
    base = without_head(BASE)
    source = spectra.open_source(
        write_checkpoint(tmp_path / "t", TUNED, config=UNTIED), write_checkpoint(tmp_path / "b", base, config=TIED)
    )
    expected = difference(TUNED, base) | {HEAD: TUNED[HEAD].double() - BASE[EMBEDDING].double()}
    assert_equal(source, expected)
    assert "base model's head is tied to model.embed_tokens.weight" in source[HEAD].note


def test_a_tied_tuned_model_compares_its_embedding_with_the_head_of_the_base(tmp_path):
    tuned = without_head(TUNED)
    source = spectra.open_source(
        write_checkpoint(tmp_path / "t", tuned, config=TIED), write_checkpoint(tmp_path / "b", BASE, config=UNTIED)
    )
    assert torch.equal(source[HEAD].read().to_dense(), TUNED[EMBEDDING].double() - BASE[HEAD].double())
    assert "tuned model's head is tied" in source[HEAD].note


@pytest.mark.parametrize(
    ("config", "compared"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, True),  # transformers 4 left a true flag out
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, False),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, False),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "tie_word_embeddings": True}}, True),
    ],
)
def test_a_base_without_a_head_is_tied_only_where_its_config_says_so(tmp_path, config, compared):
    base = without_head(BASE)
    source = spectra.open_source(
        write_checkpoint(tmp_path / "t", TUNED, config=UNTIED), write_checkpoint(tmp_path / "b", base, config=config)
    )
    assert (HEAD in {delta.name for delta in source}) == compared
    assert (HEAD in source.coverage.tuned_only) != compared


def test_heads_that_are_one_storage_in_a_bin_file_are_reported_once(tmp_path):
    shared = dict(TUNED) | {HEAD: TUNED[EMBEDDING]}
    base = dict(BASE) | {HEAD: BASE[EMBEDDING]}
    source = spectra.open_source(write_bin(tmp_path / "t", shared), write_bin(tmp_path / "b", base))
    assert HEAD not in {delta.name for delta in source}
    assert source.coverage.skipped[HEAD] == f"the same tensor as {EMBEDDING}, and reported as that"
    assert source[EMBEDDING].note == f"also stands for {HEAD} (tied)"


def test_one_storage_on_one_side_only_is_a_head_of_its_own(tmp_path):
    base = dict(BASE) | {HEAD: BASE[EMBEDDING]}
    source = spectra.open_source(write_checkpoint(tmp_path / "t", TUNED), write_bin(tmp_path / "b", base))
    assert_equal(source, difference(TUNED, base))
    assert source[HEAD].note == f"in the base model it is the same tensor as {EMBEDDING}"
    assert source[EMBEDDING].note == ""


def test_one_storage_beside_a_file_that_leaves_the_head_out(tmp_path):
    shared = dict(TUNED) | {HEAD: TUNED[EMBEDDING]}
    base = without_head(BASE)
    for index, (tuned, other) in enumerate(((shared, base), (base, shared))):
        write = (write_bin, write_checkpoint) if index == 0 else (write_checkpoint, write_bin)
        source = spectra.open_source(
            write[0](tmp_path / f"t{index}", tuned), write[1](tmp_path / f"b{index}", other, config=TIED)
        )
        assert HEAD in source.coverage.skipped
        assert HEAD not in source.coverage.tuned_only
        assert source[EMBEDDING].note == f"also stands for {HEAD} (tied)"


def test_heads_that_the_config_calls_tied_and_the_file_keeps_apart_are_both_reported(tmp_path):
    """`modules_to_save=["lm_head"]` merges into this: the flag is stale, and the head did change."""
    source = spectra.open_source(
        write_checkpoint(tmp_path / "t", TUNED, config=TIED), write_checkpoint(tmp_path / "b", BASE, config=TIED)
    )
    assert_equal(source, difference(TUNED, BASE))


def test_the_name_that_save_model_leaves_out_is_known_from_its_metadata(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(6, 4)
            self.lm_head = torch.nn.Linear(4, 6, bias=False)
            self.lm_head.weight = self.embed_tokens.weight

    model = Model()
    (tmp_path / "b").mkdir()
    save_model(model, str(tmp_path / "b" / "model.safetensors"))
    tuned = {"embed_tokens.weight": torch.ones(6, 4), "lm_head.weight": torch.zeros(6, 4)}
    source = spectra.open_source(write_checkpoint(tmp_path / "t", tuned), tmp_path / "b")
    assert_equal(source, {name: tensor.double() - model.lm_head.weight.detach() for name, tensor in tuned.items()})
    assert [bool(delta.note) for delta in source].count(True) == 1


def test_metadata_cannot_declare_a_stored_tensor_a_copy(tmp_path):
    folders = []
    for name, tensors in (("t", TUNED), ("b", BASE)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={HEAD: EMBEDDING, "format": "pt"})
        folders.append(tmp_path / name)
    assert_equal(spectra.open_source(*folders), difference(TUNED, BASE))


# -- what is not a matrix, and what is not known to be one


def test_convolutions_are_out_by_in_times_kernel(tmp_path):
    base = {
        "conv1.weight": torch.randn(6, 4, 3),
        "mixer.conv1d.weight": torch.randn(8, 1, 4),
        "features.0.weight": torch.randn(6, 3, 2, 2),
        "patch_embed.proj.weight": torch.randn(6, 3, 2, 2, 2),
    }
    tuned = nudged(base)
    source = spectra.open_source(write_checkpoint(tmp_path / "t", tuned), write_checkpoint(tmp_path / "b", base))
    assert_equal(source, {name: delta.reshape(delta.shape[0], -1) for name, delta in difference(tuned, base).items()})


def test_axes_of_unknown_meaning_are_refused_by_name(tmp_path):
    base = {
        "a.weight": torch.eye(2),
        "mlp.experts.gate_up_proj": torch.ones(3, 4, 5),
        "mystery.weight": torch.ones(3, 4, 5),
        "rel_pos": torch.ones(2, 3, 4, 5),
        "conv.weight_v": torch.ones(3, 4, 5),
    }
    config = {"model_type": "brand_new"}
    folders = (write_checkpoint(tmp_path / name, base, config=config) for name in "tb")
    source = spectra.open_source(*folders)
    statuses = {delta.name: delta.status for delta in source}
    assert statuses.pop("a.weight") == "ok"
    assert set(statuses.values()) == {"unsupported"}
    assert "not known for this architecture" in source["mystery.weight"].reason
    assert set(source.coverage.unsupported) == set(statuses)


def test_vectors_biases_buffers_and_empty_tensors_are_listed_with_a_reason(tmp_path):
    base = {
        "a.weight": torch.eye(2),
        "cls_token": torch.ones(1, 1, 8),
        "layer_scale": torch.ones(1, 8, 1, 1),
        "experts.gate_up_proj_bias": torch.ones(3, 8),
        "attn.bias": torch.ones(1, 1, 4, 4),
        "position_ids": torch.arange(6).reshape(1, 6),
        "empty.weight": torch.ones(0, 4),
        "vit.embeddings.position_embeddings": torch.ones(1, 5, 8),
    }
    source = spectra.open_source(*(write_checkpoint(tmp_path / name, base) for name in "tb"))
    assert {delta.name: delta.shape for delta in source} == {
        "a.weight": (2, 2),
        "vit.embeddings.position_embeddings": (5, 8),
    }
    reasons = source.coverage.skipped
    assert reasons["cls_token"] == reasons["layer_scale"] == "a vector, not a matrix"
    assert reasons["experts.gate_up_proj_bias"] == reasons["attn.bias"] == "biases, not a matrix"
    assert "buffer of I64" in reasons["position_ids"]
    assert reasons["empty.weight"] == "empty"


def test_a_vector_against_a_matrix_is_a_difference_in_shape(tmp_path):
    base = {"a.weight": torch.eye(2), "b.weight": torch.eye(4)}
    tuned = {"a.weight": torch.eye(2), "b.weight": torch.ones(4)}
    source = spectra.open_source(write_checkpoint(tmp_path / "t", tuned), write_checkpoint(tmp_path / "b", base))
    assert source["b.weight"].status == "shape_mismatch"


def test_integers_are_not_weights(tmp_path):
    base = {"a.weight": torch.eye(2), "b.weight": torch.ones(4, 4, dtype=torch.int8)}
    source = spectra.open_source(*(write_checkpoint(tmp_path / name, base) for name in "tb"))
    assert source["b.weight"].status == "unsupported"
    assert "stored as I8" in source["b.weight"].reason


def test_weights_in_float64_in_a_torch_file_are_the_same_each_time_they_are_read(tmp_path):
    base, tuned = {"w.weight": torch.randn(4, 4, dtype=torch.float64)}, {"w.weight": torch.randn(4, 4).double()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        torch.save(tensors, tmp_path / f"{name}.pt")
    (delta,) = spectra.open_source(tmp_path / "tuned.pt", tmp_path / "base.pt")
    for _ in range(2):
        assert torch.equal(delta.read().to_dense(), tuned["w.weight"] - base["w.weight"])
    assert torch.equal(delta.base.read(), base["w.weight"])


def test_models_in_memory_are_as_they_were_after_they_are_read():
    base, tuned = (torch.nn.Linear(4, 3, bias=False).double() for _ in range(2))
    before, change = base.weight.detach().clone(), (tuned.weight - base.weight).detach()
    (delta,) = spectra.open_source(tuned, base)
    for _ in range(2):
        assert torch.equal(delta.read().to_dense(), change)
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("fused", ["tuned", "base"])
def test_what_is_fused_on_one_side_only_is_not_lost_in_silence(fused, tmp_path):
    apart = llama_tensors()
    attention = "model.layers.0.self_attn."
    joined = {name: tensor for name, tensor in apart.items() if not name.startswith(attention) or "o_proj" in name}
    joined[f"{attention}qkv_proj.weight"] = torch.cat([apart[f"{attention}{part}_proj.weight"] for part in "qkv"])
    tuned, base = (joined, apart) if fused == "tuned" else (apart, joined)
    tuned |= {"score.weight": torch.randn(2, 16)}  # a new head beside the base's: no row
    source = spectra.open_source(write_checkpoint(tmp_path / "t", tuned), write_checkpoint(tmp_path / "b", base))
    lacking = {delta.name: delta.reason for delta in source if delta.status == "unsupported"}
    assert set(lacking) == {name for name in tuned if name.startswith(attention) and name not in base}
    others = "k_proj, q_proj, v_proj" if fused == "tuned" else "qkv_proj"
    assert {why.partition(":")[0] for why in lacking.values()} == {f"not in the base, which has {others} there"}
    assert source.coverage.tuned_only["score.weight"] == "not in the base"
