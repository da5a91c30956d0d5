"""What is read of a folder: one format, its configs, nothing outside it; what is broken costs itself only."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import llama_tensors, nudged, write_adapter, write_checkpoint

import spectra
from spectra.errors import NotFoundError, SourceError
from spectra.files.folder import open_folder

TENSORS = {"a.weight": torch.eye(3), "b.weight": torch.ones(2, 3)}
INDEX = "model.safetensors.index.json"


def one(folder, name, tensors=TENSORS):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder


def sharded(folder, weight_map, files=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for name, tensors in (files or {}).items():
        save_file(tensors, folder / name)
    return folder


# -- which files


@pytest.mark.parametrize(
    ("present", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["pytorch_model.bin", "consolidated.00.pth"], "pytorch_model.bin"),
        (
            ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
            "diffusion_pytorch_model.safetensors",
        ),
        (["net.safetensors", "net.fp16.safetensors"], "net.safetensors"),
        (["weights.safetensors", "weights.pt"], "weights.safetensors"),
        (["model.safetensors", "tf_model.h5", "flax_model.msgpack"], "model.safetensors"),
        (
            ["model.safetensors", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
            "model.safetensors",
        ),
    ],
)
def test_of_several_formats_one_is_taken_and_the_others_are_said(tmp_path, present, taken):
    for name in present:
        one(tmp_path, name, TENSORS if name == taken else {"other.weight": torch.eye(2)})
    found = open_folder(tmp_path)
    assert set(found.tensors) == set(TENSORS)
    (warning,) = found.warnings
    assert f"took {taken}" in warning
    for name in present:
        if name != taken:
            assert name.replace("00001-of-00002", "*-of-*").replace("00002-of-00002", "*-of-*") in warning


def test_training_state_is_no_weights_and_needs_no_word(tmp_path):
    one(tmp_path, "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth", "scaler.pt", "optimizer.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(os.system))
    for name in ("tokenizer.json", "trainer_state.json", "events.out.tfevents.1", "README.md"):
        (tmp_path / name).write_text("{}")
    found = open_folder(tmp_path)
    assert set(found.tensors) == set(TENSORS)
    assert found.warnings == ()


def test_numbered_shards_without_an_index_are_one_model(tmp_path):
    one(tmp_path, "model-00001-of-00002.safetensors", {"a.weight": torch.eye(3)})
    one(tmp_path, "model-00002-of-00002.safetensors", {"b.weight": torch.eye(2)})
    found = open_folder(tmp_path)
    assert set(found.tensors) == set(TENSORS)
    assert found.warnings == ()


def test_two_models_in_one_folder_are_not_chosen_between(tmp_path):
    one(tmp_path, "first.safetensors")
    one(tmp_path, "second.safetensors")
    with pytest.raises(SourceError, match=r"first\.safetensors, second\.safetensors; name one"):
        open_folder(tmp_path)
    assert set(open_folder(tmp_path / "first.safetensors").tensors) == set(TENSORS)


def test_an_adapter_beside_full_weights_is_taken_and_the_weights_by_name(tmp_path):
    write_checkpoint(tmp_path, TENSORS)
    write_adapter(tmp_path, {"base_model.model.a.lora_A.weight": torch.ones(1, 3)}, {"peft_type": "LORA", "r": 1})
    found = open_folder(tmp_path)
    assert found.is_adapter
    assert "left out model.safetensors" in found.warnings[0]
    full = open_folder(tmp_path / "model.safetensors")
    assert not full.is_adapter
    assert set(full.tensors) == set(TENSORS)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no weights"),
        (["checkpoint-500/model.safetensors"], "checkpoint-500: did you mean one of them"),
        (["pytorch_model_fsdp_0/__0_0.distcp", "__0_0.distcp"], "accelerate merge-weights"),
        (["mp_rank_00_model_states.pt.zero", "zero_to_fp32.py"], "`python zero_to_fp32.py . OUTPUT`"),
        (["tf_model.h5"], "other frameworks"),
        (["optimizer.pt", "rng_state.pth"], "holds no weights"),
    ],
)
def test_a_folder_without_weights_says_what_to_do(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(NotFoundError, match=message):
        open_folder(tmp_path)


def test_a_file_of_another_kind_lists_the_kinds_that_are_read(tmp_path):
    (tmp_path / "model.txt").write_text("x")
    with pytest.raises(SourceError, match="known suffixes are"):
        open_folder(tmp_path / "model.txt")


@pytest.mark.parametrize("content", ["{nonsense", "[1]", "3", '{"a":' * 100_000, "\udcff"])
def test_a_config_that_is_no_object_is_one_message(tmp_path, content):
    one(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(SourceError, match=r"config\.json") as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)


# -- shards and their index


def test_a_missing_shard_costs_its_own_tensors(tmp_path):
    base, tuned = llama_tensors(), nudged(llama_tensors())
    write_checkpoint(tmp_path / "b", base, shards=3)
    write_checkpoint(tmp_path / "t", tuned, shards=3)
    lost = tmp_path / "t" / "model-00002-of-00003.safetensors"
    names = set(open_folder(lost).tensors)
    lost.unlink()
    source = spectra.open_source(tmp_path / "t", tmp_path / "b")
    bad = {delta.name: delta for delta in source if delta.status != "ok"}
    assert set(bad) == {name for name in names if base[name].ndim == 2}
    assert all(
        delta.status == "unreadable" and "model-00002-of-00003.safetensors is missing" in delta.reason
        for delta in bad.values()
    )
    assert len(source) > len(bad)


@pytest.mark.parametrize("damage", ["cut", "pointer", "empty", "pickle"])
def test_a_broken_shard_costs_its_own_tensors_and_is_named(tmp_path, damage):
    base, tuned = llama_tensors(), nudged(llama_tensors())
    write_checkpoint(tmp_path / "b", base, shards=3)
    write_checkpoint(tmp_path / "t", tuned, shards=3)
    shard = tmp_path / "t" / "model-00001-of-00003.safetensors"
    names = set(open_folder(shard).tensors)
    content = shard.read_bytes()
    shard.write_bytes(
        {
            "cut": content[:40],
            "pointer": b"version https://git-lfs.github.com/spec/v1\n",
            "empty": b"",
            "pickle": pickle.dumps(os.system) + bytes(40),
        }[damage]
    )
    source = spectra.open_source(tmp_path / "t", tmp_path / "b")
    bad = {delta.name: delta for delta in source if delta.status == "unreadable"}
    assert set(bad) == {name for name in names if base[name].ndim == 2}
    assert all(str(shard) in delta.reason for delta in bad.values())
    assert any(str(shard) in warning for warning in source.coverage.warnings)


def test_a_file_that_is_cut_off_loses_its_end_only(tmp_path):
    base, tuned = llama_tensors(), nudged(llama_tensors())
    write_checkpoint(tmp_path / "b", base)
    file = write_checkpoint(tmp_path / "t", tuned) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    found = {
        spectrum.name: spectrum for spectrum in spectra.decompose(spectra.open_source(tmp_path / "t", tmp_path / "b"))
    }
    assert {spectrum.status for spectrum in found.values()} == {"ok", "unreadable"}
    assert all("truncated" in spectrum.reason for spectrum in found.values() if spectrum.status == "unreadable")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "x\0y"])
def test_an_index_that_points_outside_reads_nothing(tmp_path, shard):
    one(tmp_path, "outside.safetensors")
    folder = sharded(tmp_path / "model", {"a.weight": "in.safetensors", "b.weight": shard}, {"in.safetensors": TENSORS})
    with pytest.raises(SourceError, match="points outside its folder"):
        open_folder(folder)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": None}])
def test_an_index_without_a_map(tmp_path, content):
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(SourceError, match="no weight_map"):
        open_folder(tmp_path)


def test_an_index_whose_shards_are_all_missing(tmp_path):
    with pytest.raises(NotFoundError, match="names 2 shards and none of them is there"):
        open_folder(sharded(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}))


def test_an_index_that_is_left_over_from_shards_gives_way_to_the_file_that_is_there(tmp_path):
    one(sharded(tmp_path, {"a.weight": "x.safetensors"}), "model.safetensors")
    found = open_folder(tmp_path)
    assert set(found.tensors) == set(TENSORS)
    assert any(f"{INDEX} was left out: none of its shards" in warning for warning in found.warnings)


def test_a_tensor_that_its_shard_does_not_hold(tmp_path):
    found = open_folder(
        sharded(tmp_path, {"a.weight": "x.safetensors", "c.weight": "x.safetensors"}, {"x.safetensors": TENSORS})
    )
    assert set(found.tensors) == set(TENSORS)
    assert list(found.broken) == ["c.weight"]
    assert "the index says that x.safetensors holds c.weight, and it does not" in found.broken["c.weight"]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_tensor_in_another_shard_than_the_index_says_is_broken(tmp_path, suffix):
    """Whose index is it, if the shards lie? The tensor has no number, and the others have theirs."""
    moved = {"a.weight": f"y.{suffix}", "b.weight": f"x.{suffix}", "c.weight": f"y.{suffix}"}
    name = INDEX if suffix == "safetensors" else "pytorch_model.bin.index.json"
    (tmp_path / name).write_text(json.dumps({"weight_map": moved}))
    one(tmp_path, f"x.{suffix}", TENSORS)
    one(tmp_path, f"y.{suffix}", {"c.weight": torch.eye(2)})
    found = open_folder(tmp_path)
    assert set(found.tensors) == {"b.weight", "c.weight"}
    assert list(found.broken) == ["a.weight"]
    for words in (f"the index says that y.{suffix} holds a.weight", f"x.{suffix} does", "again"):
        assert words in found.broken["a.weight"]
    base = write_checkpoint(tmp_path / "base", TENSORS | {"c.weight": torch.eye(2)})
    status = {spectrum.name: spectrum.status for spectrum in spectra.decompose(spectra.open_source(tmp_path, base))}
    assert status == {"a.weight": "unreadable", "b.weight": "unchanged", "c.weight": "unchanged"}


def test_an_index_may_name_shards_in_folders_and_with_a_dot(tmp_path):
    one(tmp_path / "parts", "x.safetensors", {"a.weight": torch.eye(3)})
    folder = sharded(
        tmp_path, {"a.weight": "parts/x.safetensors", "b.weight": "./y.safetensors"},
        {"y.safetensors": {"b.weight": torch.eye(2)}},
    )  # fmt: skip
    found = open_folder(folder)
    assert set(found.tensors) == {"a.weight", "b.weight"}
    assert found.broken == {}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_numbered_shards_of_which_one_is_missing_are_refused_without_an_index(tmp_path, suffix):
    for number in (1, 3):
        one(tmp_path, f"model-0000{number}-of-00003.{suffix}", {f"{number}.weight": torch.eye(3)})
    with pytest.raises(NotFoundError, match=r"2 of 3 shards: number 2 of model-\*-of-\*"):
        open_folder(tmp_path)
    assert set(open_folder(tmp_path / f"model-00001-of-00003.{suffix}").tensors) == {"1.weight"}


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    files = {"x.safetensors": {"a.weight": torch.eye(2)}, "y.safetensors": {"a.weight": torch.eye(2)}}
    folder = sharded(tmp_path, {"a.weight": "x.safetensors", "b.weight": "y.safetensors"}, files)
    with pytest.raises(SourceError, match=r"a\.weight is in both .*x\.safetensors and .*y\.safetensors"):
        open_folder(folder)


# -- links


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
def test_a_link_that_leaves_the_folder_is_not_followed(tmp_path, name):
    outside = one(tmp_path / "outside", "model.safetensors")
    (outside / "config.json").write_text("{}")
    (outside / INDEX).write_text(json.dumps({"weight_map": {"a.weight": "model.safetensors"}}))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).symlink_to(outside / name)
    if name == "config.json":
        one(folder, "model.safetensors")
    with pytest.raises(SourceError, match="a link that leaves its folder"):
        open_folder(folder)


def test_links_within_the_folder_and_to_the_folder_are_followed(tmp_path):
    folder = one(tmp_path / "model", "data.bin.safetensors")
    (folder / "model.safetensors").symlink_to("data.bin.safetensors")
    (tmp_path / "link").symlink_to(folder)
    assert set(open_folder(tmp_path / "link").tensors) == set(TENSORS)


# -- pipelines


def pipeline(folder, tensors):
    """A diffusers pipeline: a U-Net, a sharded transformer, a text encoder, and parts without weights."""
    for component in ("unet", "transformer", "text_encoder"):
        named = {name: tensor for name, tensor in tensors.items() if name.startswith(component)}
        named = {name.partition(".")[2]: tensor for name, tensor in named.items()}
        place = write_checkpoint(
            folder / component, named, shards=2 if component == "transformer" else 1, config={"model_type": component}
        )
        if component == "unet":
            (place / "model.safetensors").rename(place / "diffusion_pytorch_model.safetensors")
    for component in ("tokenizer", "scheduler"):
        (folder / component).mkdir()
        (folder / component / f"{component}_config.json").write_text("{}")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "transformer": ["diffusers", "T"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


PARTS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": torch.randn(4, 4),
    "unet.conv_in.weight": torch.randn(4, 2, 3, 3),
    "transformer.blocks.0.to_k.weight": torch.randn(4, 4),
    "transformer.blocks.1.to_v.weight": torch.randn(4, 4),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight": torch.randn(4, 4),
}


def test_a_pipeline_names_the_component_first(tmp_path):
    tuned = nudged(PARTS)
    source = spectra.open_source(pipeline(tmp_path / "t", tuned), pipeline(tmp_path / "b", PARTS))
    assert {delta.name for delta in source} == set(PARTS)
    for delta in source:
        expected = tuned[delta.name].double() - PARTS[delta.name].double()
        assert torch.equal(delta.read().to_dense(), expected.reshape(len(expected), -1))
    assert source.coverage.warnings == ()
    assert open_folder(tmp_path / "t").config_of("text_encoder.x") == {"model_type": "text_encoder"}


def test_one_component_meets_the_pipeline(tmp_path):
    tuned = nudged(PARTS)
    source = spectra.open_source(pipeline(tmp_path / "t", tuned) / "unet", pipeline(tmp_path / "b", PARTS))
    assert {delta.name for delta in source} == {name for name in PARTS if name.startswith("unet.")}


def test_a_broken_component_costs_itself_only(tmp_path):
    folder = pipeline(tmp_path / "t", PARTS)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    found = open_folder(folder)
    assert {name.partition(".")[0] for name in found.tensors} == {"transformer", "text_encoder"}
    assert any("unet was left out" in warning for warning in found.warnings)


@pytest.mark.parametrize("side", ["both", "tuned", "base"])
def test_components_beside_each_other_are_a_pipeline_without_its_index(tmp_path, side):
    tuned = nudged(PARTS)
    folders = {name: pipeline(tmp_path / name, tensors) for name, tensors in (("tuned", tuned), ("base", PARTS))}
    for name, folder in folders.items():
        if side in (name, "both"):
            (folder / "model_index.json").unlink()
            (folder / "optimizer.bin").write_bytes(b"of the training")
    source = spectra.open_source(folders["tuned"], folders["base"])
    assert {delta.name for delta in source} == set(PARTS)
    for delta in source:
        expected = tuned[delta.name].double() - PARTS[delta.name].double()
        assert torch.equal(delta.read().to_dense(), expected.reshape(len(expected), -1))
    assert source.coverage.warnings == ()


def test_one_component_alone_is_a_pipeline_too(tmp_path):
    """A trainer that saves its U-Net only, beside its own state."""
    folder = pipeline(tmp_path / "t", nudged(PARTS))
    for name in ("transformer", "text_encoder"):
        shutil.rmtree(folder / name)
    (folder / "model_index.json").unlink()
    source = spectra.open_source(folder, pipeline(tmp_path / "b", PARTS))
    assert {delta.name for delta in source} == {name for name in PARTS if name.startswith("unet.")}


def test_weights_of_the_folder_itself_come_before_those_of_components(tmp_path):
    folder = one(pipeline(tmp_path, PARTS), "model.safetensors")
    (folder / "model_index.json").unlink()
    assert set(open_folder(folder).tensors) == set(TENSORS)


@pytest.mark.parametrize("index", [True, False])
def test_a_component_whose_weights_did_not_come_is_said(tmp_path, index):
    folder = pipeline(tmp_path, PARTS)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    if not index:
        (folder / "model_index.json").unlink()
    (warning,) = open_folder(folder).warnings
    assert "unet was left out" in warning
    assert "holds no weights" in warning


@pytest.mark.parametrize("index", [True, False])
def test_adapters_of_components_are_named(tmp_path, index):
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    for name in ("unet", "text_encoder"):
        write_adapter(tmp_path / name, {"base_model.model.a.lora_A.weight": torch.ones(1, 3)}, config)
    if index:
        (tmp_path / "model_index.json").write_text(json.dumps({name: ["x", "Y"] for name in ("unet", "text_encoder")}))
    with pytest.raises(SourceError, match=r"(unet|text_encoder) and in (text_encoder|unet) is an adapter; name one"):
        open_folder(tmp_path)


@pytest.mark.parametrize("component", ["..", "../outside", ".", ""])
def test_a_pipeline_cannot_name_a_folder_outside(tmp_path, component):
    one(tmp_path / "outside", "model.safetensors")
    one(tmp_path, "model.safetensors")
    folder = pipeline(tmp_path / "t", PARTS)
    (folder / "model_index.json").write_text(json.dumps({component: ["x", "Y"]}))
    with pytest.raises(NotFoundError, match="without readable weights"):
        open_folder(folder)


def test_the_components_of_a_cached_pipeline_are_links_to_blobs(tmp_path):
    plain = pipeline(tmp_path / "plain", PARTS)
    repo = tmp_path / "models--org--sd"
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "blobs").mkdir(parents=True)
    for index, file in enumerate(sorted(item for item in plain.rglob("*") if item.is_file())):
        (repo / "blobs" / str(index)).write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(repo / "blobs" / str(index))
    assert set(open_folder(snapshot).tensors) == set(PARTS)
    assert set(open_folder(snapshot / "unet").tensors) == {
        n.removeprefix("unet.") for n in PARTS if n.startswith("unet.")
    }


# -- pickles


def test_code_in_a_pickle_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    for name in ("pytorch_model.bin", "old.pt"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        torch.save(
            {"a.weight": torch.eye(2), "x": Evil()}, folder / name, _use_new_zipfile_serialization="old" not in name
        )
        with pytest.raises(SourceError, match="code of a file is never run") as caught:
            open_folder(folder)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"epoch": 3}, "holds no tensors"),
        ({"optimizer": {"state": {}}}, "holds no tensors"),
    ],
)
def test_a_bin_file_without_a_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match=message):
        open_folder(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "pointer", "disks"])
def test_a_damaged_bin_file_is_one_message(tmp_path, damage):
    file = one(tmp_path, "pytorch_model.bin", {"a.weight": torch.randn(100, 100)}) / "pytorch_model.bin"
    content = file.read_bytes()
    disks = content.index(b"PK\x06\x07") + 16  # of the ZIP64 locator
    file.write_bytes(
        {
            "disks": content[:disks] + b"\x09" + content[disks + 1 :],
            "cut": content[: len(content) // 2],
            "noise": bytes(range(256)) * 4,
            "empty": b"",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        }[damage]
    )
    with pytest.raises(SourceError, match=r"pytorch_model\.bin") as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_tensors_that_are_no_plain_arrays_are_broken_and_the_others_are_read(tmp_path):
    tensors = {
        "a.weight": torch.eye(3),
        "sparse.weight": torch.eye(3).to_sparse(),
        "meta.weight": torch.empty(3, 3, device="meta"),
        "huge.weight": torch.ones(1).expand(10**6, 10**6),
    }
    found = open_folder(one(tmp_path, "pytorch_model.bin", tensors))
    assert set(found.tensors) == {"a.weight"}
    assert set(found.broken) == {"sparse.weight", "meta.weight", "huge.weight"}
    assert "fewer entries" in found.broken["huge.weight"]


def test_the_model_in_a_training_state_of_composer(tmp_path):
    """composer/core/state.py: `state` holds the model, the optimizers and more."""
    state = {"model": TENSORS, "optimizers": {"Adam": {"state": {0: {"exp_avg": torch.ones(3)}}}}, "run_name": "x"}
    torch.save({"state": state, "metadata": {"epoch": 1}}, tmp_path / "ep1-ba7-rank0.pt")
    opened = open_folder(tmp_path)
    assert {name: ref.shape for name, ref in opened.tensors.items()} == {"a.weight": (3, 3), "b.weight": (2, 3)}
    assert torch.equal(opened.tensors["b.weight"].read(), TENSORS["b.weight"])


def test_a_second_model_in_a_training_state_is_said(tmp_path):
    weights = {"layer.weight": torch.randn(4, 4)}
    others = {"epoch": 3, "optimizer": {"state": {}}, "extra": {"steps": torch.zeros(2)}}
    torch.save({"ema": {"layer.weight": torch.zeros(4, 4)}, "model": weights} | others, tmp_path / "both.pt")
    torch.save({"model": weights} | others, tmp_path / "one.pt")
    both, one = (open_folder(tmp_path / name) for name in ("both.pt", "one.pt"))
    assert torch.equal(both.tensors["layer.weight"].read(), weights["layer.weight"])
    (said,) = both.warnings
    assert "took 'model' and left out 'ema', which has weights of the same names" in said
    assert not one.warnings


def test_the_state_of_an_optimizer_is_no_model(tmp_path):
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, tmp_path / "model.pt")
    with pytest.raises(SourceError, match="holds no tensors"):
        open_folder(tmp_path)


def test_control_characters_in_names_are_escaped_in_messages(tmp_path):
    """A name from a file cannot clear the terminal or forge a line."""
    name = "a\x1b[2J\nwarning: forged"
    ref = open_folder(one(tmp_path, "model.safetensors", {name: torch.eye(2)})).tensors[name]
    with pytest.raises(SourceError) as caught:
        ref.rows(1, 9)
    assert r"a\x1b[2J\nwarning: forged" in str(caught.value)
    assert str(caught.value).isprintable()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
