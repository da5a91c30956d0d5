"""What trainers leave behind: refused under its name, with the tool that makes weights of it."""

from __future__ import annotations

import io
import tarfile

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint

import spectra
from spectra.errors import SourceError
from spectra.files.folder import open_folder

DEEPSPEED = r"DeepSpeed training state.*zero_to_fp32\.py"
MEGATRON = r"Megatron-LM training state.*AutoBridge\.export_ckpt.*tools/checkpoint/convert\.py"
NEMO = r"NeMo archive.*convert_<model>_nemo_to_hf\.py"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mp_rank_00_model_states.pt", DEEPSPEED),
        ("zero_pp_rank_3_mp_rank_00_model_states.pt", DEEPSPEED),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", DEEPSPEED),
        ("layer_01-model_00-model_states.pt", DEEPSPEED),
        ("layer_2_expert_0_mp_rank_00_model_states.pt", DEEPSPEED),
        ("expp_rank_0_mp_rank_00_optim_states.pt", DEEPSPEED),
        ("mp_rank_00/model_optim_rng.pt", MEGATRON),
        ("mp_rank_01_003/model_optim_rng.pt", MEGATRON),
        ("mp_rank_01_003_000/model_rng.pt", MEGATRON),
        ("llama.nemo", NEMO),
    ],
)
def test_a_training_state_is_named_with_its_tool(tmp_path, name, message):
    """The file, the folder that it is in, and what the base is, too; all other files of the folder are no weights."""
    file = tmp_path / "state" / name
    file.parent.mkdir(parents=True)
    torch.save({"module": llama_tensors(), "args": {}, "optimizer": {}}, file)
    base = write_checkpoint(tmp_path / "base", llama_tensors())
    for path in {file, file.parent, tmp_path / "state"}:
        with pytest.raises(SourceError, match=message) as caught:
            spectra.open_source(path, base)
        assert str(path) in str(caught.value)
        with pytest.raises(SourceError, match=message):
            spectra.open_source(base, path)


def test_a_nemo_tar_is_not_opened(tmp_path):
    with tarfile.open(tmp_path / "x.nemo", "w") as archive:
        archive.addfile(tarfile.TarInfo("model_weights.ckpt"), io.BytesIO())
    with pytest.raises(SourceError, match=NEMO):
        open_folder(tmp_path)


def test_a_training_state_beside_weights_is_passed_over(tmp_path):
    folder = write_checkpoint(tmp_path / "x", llama_tensors())
    (folder / "global_step5").mkdir()
    for name in ("zero_to_fp32.py", "latest", "mp_rank_00_model_states.pt"):
        (folder / name).write_text("x")
    assert open_folder(folder).warnings == ()


def test_the_size_0_that_zero_3_leaves_is_named(tmp_path):
    """Each tensor is refused with the reason and the tool; what was gathered has its number."""
    base = llama_tensors(layers=1)
    kept = "model.layers.0.self_attn.q_proj.weight"
    tuned = {name: tensor + 1 if name == kept else torch.zeros(0) for name, tensor in base.items()}
    folder = write_checkpoint(tmp_path / "tuned", tuned)
    source = spectra.open_source(folder, write_checkpoint(tmp_path / "base", base))
    status = {delta.name: delta.status for delta in source}
    assert status == {name: "ok" if name == kept else "unreadable" for name, t in base.items() if t.ndim == 2}
    for delta in source:
        if delta.name != kept:
            assert "size 0" in delta.reason
            assert "ZeRO-3" in delta.reason
            assert "zero_to_fp32.py" in delta.reason
    assert any("ZeRO-3" in warning for warning in source.coverage.warnings)


def test_an_adapter_that_zero_3_emptied(tmp_path):
    q, v = (f"base_model.model.layers.0.self_attn.{part}_proj" for part in "qv")
    tensors = {f"{module}.lora_{side}.weight": torch.zeros(0) for module in (q, v) for side in "AB"}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    everything = write_adapter(tmp_path / "a", tensors, config)
    source = spectra.open_source(everything)
    assert source.kind == "lora"
    assert {delta.status for delta in source} == {"unreadable"}
    assert all("ZeRO-3" in delta.reason for delta in source)
    tensors |= {f"{v}.lora_A.weight": torch.randn(2, 8), f"{v}.lora_B.weight": torch.randn(8, 2)}
    half = {delta.name: delta.status for delta in spectra.open_source(write_adapter(tmp_path / "b", tensors, config))}
    assert half == {"layers.0.self_attn.q_proj.weight": "unreadable", "layers.0.self_attn.v_proj.weight": "ok"}


def test_an_empty_buffer_is_no_sign_of_zero_3(tmp_path):
    save_file(
        {"a.weight": torch.eye(3), "b.cache": torch.zeros(0), "c.weight": torch.zeros(0, 4)}, tmp_path / "m.safetensors"
    )
    found = open_folder(tmp_path)
    assert found.broken == {}
    assert found.warnings == ()
