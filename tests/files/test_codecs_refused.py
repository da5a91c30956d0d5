"""What does not fit its format is refused under the weight's name, with a reason: never a number, never a traceback."""

from __future__ import annotations

import json

import pytest
import torch
from support.stored_codes import (
    CONFIGS,
    config_of,
    decoded_by_library,
    module_of,
    stored,
    weight_of,
    write_coded,
    write_plain,
)

import spectra
from spectra.errors import SourceError
from spectra.files.folder import open_folder

# What the decoded weight does not depend on.
SPARE = {"weight_format", "input_scale"}


def refused(folder, case):
    """Why the case's weight is refused, or what it reads as; nothing else may be listed but vectors."""
    opened = open_folder(folder)
    others = {name for name in opened.tensors if name != weight_of(case)}
    assert all(len(opened.tensors[name].shape) < 2 for name in others), others
    if weight_of(case) not in opened.tensors:
        assert list(opened.unusable) == [weight_of(case)]
        return opened.unusable[weight_of(case)]
    try:
        return opened.tensors[weight_of(case)].read_real()
    except SourceError as problem:
        return str(problem)


@pytest.mark.parametrize("case", CONFIGS)
def test_every_missing_part_is_a_refusal_that_names_it(case, tmp_path):
    tensors = stored(case)
    for place, name in enumerate(sorted(tensors)):
        if name.rpartition(".")[2] in SPARE:
            continue
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        why = refused(write_coded(tmp_path / str(place), case, tensors=rest), case)
        if name.endswith("g_idx") and not config_of(case)["quantization_config"]["desc_act"]:
            assert torch.equal(
                why, next(iter(open_folder(write_coded(tmp_path / "all", case)).tensors.values())).read()
            )
        else:
            assert isinstance(why, str), name
            assert "not decoded" in why
            assert "not in the file" in why or "quant_state" in why or "no g_idx" in why, why


@pytest.mark.parametrize("case", CONFIGS)
def test_every_part_of_another_shape_or_type_is_a_refusal(case, tmp_path):
    tensors, place = stored(case), 0
    whole = refused(write_coded(tmp_path / "whole", case), case)
    for name, tensor in tensors.items():
        changes = [tensor[None], torch.cat([tensor.flatten(), tensor.flatten()]), tensor.to(torch.int16)]
        changes += [tensor[:0], tensor[1:], tensor[..., :-1]] if tensor.ndim else []
        for changed in changes:
            place += 1
            folder = write_coded(tmp_path / str(place), case, tensors=tensors | {name: changed.contiguous()})
            found = refused(folder, case)
            what = (name, tuple(changed.shape), changed.dtype)
            if not isinstance(found, str) and found.shape == whole.shape:  # the same bytes in another shape
                assert torch.equal(found, whole), what
            elif "int8" not in case:  # which is any matrix with one scale per row
                assert isinstance(found, str), what


CONFIG_FAULTS = {
    "mlx 4 bits": [
        ({}, "bits = None"), ({"quantization": []}, "bits = None"),
        ({"quantization": {"bits": 7, "group_size": 32}}, "bits = 7"),
        ({"quantization": {"bits": 4, "group_size": "32"}}, "group_size = '32'"),
        ({"quantization": {"bits": 4, "group_size": 0}}, "group_size = 0"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "ask for"),
        ({"quantization": {"bits": 8, "group_size": 32}}, "ask for"),
        ({"quantization": {"bits": 3, "group_size": 32}}, "no whole number of groups"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "nvfp4"}}, "mode 'nvfp4'"),
        ({"quantization": {"bits": 4, "group_size": 32, "model.layers.0.mlp.up_proj": False}}, "is not quantised"),
    ],
    "mlx mxfp4": [({"quantization": {"bits": 4, "group_size": 16, "mode": "mxfp4"}}, "ask for")],
    "gptq 4 bits": [
        ({}, "no quantization_config"), ({"quantization_config": 3}, "no quantization_config"),
        ({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}}, "layout 'marlin'"),
        ({"quantization_config": {"quant_method": "auto-round"}}, "'auto-round' is not known"),
        ({"quantization_config": {"quant_method": "awq"}}, "ask for"),
    ],
    "awq": [
        ({}, "no quantization_config"),
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "layout 'gemv'"),
        ({"quantization_config": {"quant_method": "awq", "group_size": 16}}, "2 groups of 16"),
        ({"quantization_config": {"quant_method": "gptq"}}, "ask for"),
    ],
    "compressed int8": [({}, "whose they are")],
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIG_FAULTS)
def test_a_config_that_does_not_settle_the_codes_is_said(case, tmp_path):
    for place, (config, reason) in enumerate(CONFIG_FAULTS[case]):
        found = refused(write_coded(tmp_path / str(place), case, config={"model_type": "llama"} | config), case)
        assert isinstance(found, str)
        assert reason in found, found


STATE_FAULTS = {
    "quant_type": ["int4", None, [], {}], "dtype": ["float64", "int8", 3, None, []],
    "blocksize": [0, 63, "64", 128, None],
    "shape": [[12], [40, 13], [-12, -40], "12", None, [2**40, 2**40], [True, 480]],
    "nested_offset": ["x", None, float("nan"), True], "nested_blocksize": [64, 0, None],
}  # fmt: skip


@pytest.mark.parametrize("key", STATE_FAULTS)
def test_a_quantisation_state_that_contradicts_the_codes_is_said(key, tmp_path):
    case = "nf4 nested" if "nested" in key else "nf4"
    name = f"{weight_of(case)}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(stored(case)[name].tolist()))
    for place, value in enumerate(STATE_FAULTS[key]):
        text = torch.frombuffer(bytearray(json.dumps(state | {key: value}).encode()), dtype=torch.uint8)
        found = refused(write_coded(tmp_path / str(place), case, tensors=stored(case) | {name: text}), case)
        assert isinstance(found, str), value
        assert "not decoded" in found


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 3000, b" " * 70_000])
def test_a_quantisation_state_that_is_none_is_said(text, tmp_path):
    name = f"{weight_of('nf4')}.quant_state.bitsandbytes__nf4"
    state = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    assert isinstance(refused(write_coded(tmp_path, "nf4", tensors=stored("nf4") | {name: state}), "nf4"), str)


@pytest.mark.parametrize(("case", "value"), [("gptq 4 bits in act-order", 4), ("gptq 4 bits", -1)])
def test_groups_that_are_not_there_cost_the_weight_its_number(case, value, tmp_path):
    name = f"{module_of(case)}.g_idx"
    tensors = stored(case)
    tensors[name][7] = value
    source = spectra.open_source(write_coded(tmp_path / "c", case, tensors=tensors), write_plain(tmp_path / "p", case))
    (found,) = spectra.decompose(source)
    assert found.status == "unreadable"
    assert "names groups outside 0 … 3" in found.reason


def test_int8_codes_that_are_tiled_for_a_gpu_are_refused(tmp_path):
    tensors = stored("int8") | {f"{module_of('int8')}.weight_format": torch.tensor(2, dtype=torch.uint8)}
    assert "tiled" in refused(write_coded(tmp_path, "int8", tensors=tensors), "int8")


def test_a_weight_in_codes_and_in_plain_numbers_is_refused(tmp_path):
    tensors = stored("awq") | {weight_of("awq"): torch.randn(24, 64)}
    assert "in plain numbers, too" in str(open_folder(write_coded(tmp_path, "awq", tensors=tensors)).packed)


UNDECODED = {
    "HQQ": {"W_q": torch.ones(4, 4, dtype=torch.uint8), "scale": torch.ones(4, 1), "zero": torch.ones(4, 1)},
    "Marlin": {"B": torch.ones(4, 4).int(), "s": torch.ones(2, 4).half(), "workspace": torch.ones(4).int()},
    "NVFP4": {
        "weight": torch.ones(4, 16, dtype=torch.uint8), "weight_scale": torch.ones(4, 2).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.ones(()), "input_scale": torch.ones(()),
    },
    "quanto": {"weight._data": torch.ones(4, 4, dtype=torch.int8), "weight._scale": torch.ones(4, 1)},
}  # fmt: skip


@pytest.mark.parametrize("title", UNDECODED)
def test_formats_that_are_not_decoded_are_refused_with_all_that_belongs_to_them(title, tmp_path):
    module = module_of("awq")
    tensors = {f"{module}.{part}": tensor for part, tensor in UNDECODED[title].items()}
    opened = open_folder(write_coded(tmp_path, "awq", tensors=tensors, config={"model_type": "llama"}))
    assert not opened.tensors
    assert list(opened.packed) == [f"{module}.weight"]
    assert opened.packed[f"{module}.weight"].startswith(f"{title} codes in ")
    assert "pass the weights in bf16 or fp16" in opened.packed[f"{module}.weight"]


def test_what_autogptq_wrote_beside_the_weights_counts_where_the_config_is_silent(tmp_path):
    case = "gptq 4 bits in act-order"
    folder = write_coded(tmp_path, case, config={"model_type": "llama"})
    assert "no quantization_config in config.json and no quantize_config.json" in refused(folder, case)
    old = {
        "bits": 4,
        "group_size": 16,
        "damp_percent": 0.01,
        "desc_act": True,
        "sym": True,
        "model_file_base_name": None,
    }
    (folder / "quantize_config.json").write_text(json.dumps(old))
    found = refused(folder, case)
    assert not isinstance(found, str), found
    assert torch.equal(found, decoded_by_library(case))
    (folder / "quantize_config.json").write_text(json.dumps(old | {"is_marlin_format": True}))
    assert "the layout 'marlin'" in refused(folder, case)


def test_what_autoawq_wrote_beside_the_weights_counts_as_well(tmp_path):
    folder = write_coded(tmp_path, "awq", config={"model_type": "llama"})
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(old))
    assert torch.equal(refused(folder, "awq"), decoded_by_library("awq"))


def test_a_config_that_speaks_is_not_overruled_by_a_file_beside_it(tmp_path):
    folder = write_coded(tmp_path, "awq")
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    assert torch.equal(refused(folder, "awq"), decoded_by_library("awq"))
