"""Coded weights on one side or both of a pair: ΔW is that of the decoded weights, and nothing is left over."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.checkpoints import write_adapter, write_checkpoint
from support.peak import peak_bytes
from support.stored_codes import (
    CONFIGS,
    MODULE,
    decoded_by_library,
    matrices_of,
    stored,
    write_coded,
    write_plain,
)  # fmt: skip

import spectra
from spectra.cli import main
from spectra.engine.costs import needed
from spectra.files.folder import open_folder
from spectra.files.tensors import TensorRef
from spectra.results import fingerprint


def plain(folder):
    return next(iter(open_folder(folder).tensors.values())).read().double()


@pytest.mark.parametrize("side", ["tuned", "base"])
@pytest.mark.parametrize("case", CONFIGS)
def test_the_update_is_the_decoded_difference(case, side, tmp_path):
    coded, other = write_coded(tmp_path / "c", case), write_plain(tmp_path / "p", case)
    tuned, base = (coded, other) if side == "tuned" else (other, coded)
    source = spectra.open_source(tuned, base)
    expected = matrices_of(case, plain(tuned) - plain(base))
    assert {delta.name for delta in source} == set(expected)
    assert not source.coverage.tuned_only | source.coverage.base_only | source.coverage.skipped
    assert ["ΔW is relative to the decoded weights" in warning for warning in source.coverage.warnings] == [True]
    for found in spectra.decompose(source):
        assert found.status == "ok"
        assert torch.equal(source[found.name].read().to_dense(), expected[found.name])
        S = np.linalg.svd(expected[found.name].numpy(), compute_uv=False)
        assert np.abs(found.S - S).max() <= 1e-7 * S[0]
        assert found.noise_edge is None or side == "base"


@pytest.mark.parametrize("scale", [0.01, 2.0**-7])
@pytest.mark.parametrize("side", ["tuned", "base"])
def test_scaled_codes_lie_on_no_grid_of_their_type(side, scale, tmp_path):
    """Matrices that are large enough for the grid of their values to be looked for."""
    torch.manual_seed(0)
    codes = (torch.randn(32, 24) * 40).to(torch.float8_e4m3fn)
    weight, matrix = codes.double() * torch.tensor(scale).double(), torch.randn(32, 24).bfloat16()
    name = f"{MODULE}.weight"
    coded = write_checkpoint(tmp_path / "c", {name: codes, f"{name}_scale_inv": torch.tensor([[scale]])})
    other = write_checkpoint(tmp_path / "p", {name: matrix})
    tuned, base = (coded, other) if side == "tuned" else (other, coded)
    (found,) = spectra.decompose(spectra.open_source(tuned, base))
    delta = (weight - matrix.double()) * (1 if side == "tuned" else -1)
    assert found.status == "ok"
    assert np.allclose(found.S, np.linalg.svd(delta.numpy(), compute_uv=False), rtol=1e-6)
    taken = "tuned on the bf16 grid, base of codes times scales taken as exact"
    unknown = "tuned holds codes times scales, whose rounding is not known"
    assert found.rounding == (unknown if side == "tuned" else taken)


@pytest.mark.parametrize("case", CONFIGS)
def test_both_sides_coded_alike_are_unchanged(case, tmp_path):
    source = spectra.open_source(*(write_coded(tmp_path / side, case) for side in "tb"))
    assert {found.status for found in spectra.decompose(source)} == {"unchanged"}


@pytest.mark.parametrize("case", CONFIGS)
def test_listing_reads_no_weight_and_needs_no_torch(case, tmp_path, monkeypatch):
    folder = write_coded(tmp_path / "c", case)
    with monkeypatch.context() as patch:
        patch.setattr(TensorRef, "read", None)
        listed = CliRunner().invoke(main, ["inspect", str(folder)])
    assert listed.exit_code == 0, listed.output
    assert "ΔW is relative to the decoded weights" in listed.output
    assert next(iter(open_folder(folder).tensors.values())).dtype in listed.output


def test_listing_imports_no_torch(tmp_path):
    folders = [str(write_coded(tmp_path / str(place), case)) for place, case in enumerate(CONFIGS)]
    code = (
        "import sys\nfrom pathlib import Path\nfrom spectra.files.folder import open_folder\n"
        f"for path in {folders}:\n    open_folder(Path(path))\nprint('torch' in sys.modules)"
    )
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert listed.stdout == "False\n"


@pytest.mark.parametrize("case", CONFIGS)
def test_reading_stays_within_the_plan_and_travels_small(case, tmp_path):
    coded, other = write_coded(tmp_path / "c", case), write_plain(tmp_path / "p", case)
    for tuned, base in ((coded, other), (other, coded)):
        for delta in spectra.open_source(tuned, base):
            assert len(pickle.dumps(delta)) < 10_000
            assert torch.equal(pickle.loads(pickle.dumps(delta)).read().to_dense(), delta.read().to_dense())
            assert peak_bytes(lambda delta=delta: delta.read()) <= needed(delta, None)


@pytest.mark.parametrize("case", CONFIGS)
def test_torch_files_hold_codes_as_well(case, tmp_path):
    folder = write_coded(tmp_path, case)
    before = plain(folder)
    torch.save(stored(case), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(plain(folder), before)


def test_companions_in_another_shard_are_found_and_count_as_inputs(tmp_path):
    coded = write_coded(tmp_path / "c", "awq", shards=3)
    source = spectra.open_source(write_plain(tmp_path / "p", "awq"), coded)
    assert torch.equal(source.deltas[0].recipe.base.read(), decoded_by_library("awq"))
    assert len(fingerprint.of_files(source)) == 4


def test_an_adapter_takes_its_base_norm_from_the_decoded_weights(tmp_path):
    A, B = torch.randn(2, 40), torch.randn(12, 2)
    factors = {f"base_model.model.{MODULE}.lora_A.weight": A, f"base_model.model.{MODULE}.lora_B.weight": B}
    adapter = write_adapter(tmp_path / "a", factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    (delta,) = spectra.open_source(adapter, write_coded(tmp_path / "b", "nf4"))
    form = delta.read()
    assert torch.allclose(form.to_dense(), B.double() @ A.double())
    assert form.base_norm == pytest.approx(float(decoded_by_library("nf4").double().norm()), rel=1e-12)


def test_packed_linear_layers_of_an_architecture_that_stores_them_transposed_are_not_turned(tmp_path):
    """transformers and the libraries put Linear layers in the place of GPT-2's Conv1D, so the codes are (out, in)."""
    name = "transformer.h.0.attn.c_proj"
    config = {"model_type": "gpt2"}
    coded = write_checkpoint(
        tmp_path / "c", {key.replace(MODULE, name): part for key, part in stored("nf4").items()}, config=config
    )
    weight = decoded_by_library("nf4").float()
    other = write_checkpoint(tmp_path / "p", {f"{name}.weight": (weight + 1).T.contiguous()}, config=config)
    (delta,) = spectra.open_source(coded, other)
    assert torch.equal(delta.read().to_dense(), weight.double() - (weight + 1).double())


def test_a_lost_part_makes_its_weight_unreadable_under_the_weights_name(tmp_path):
    folder = write_coded(tmp_path / "c", "gptq 4 bits", shards=4)
    (folder / "model-00002-of-00004.safetensors").unlink()
    opened = open_folder(folder)
    assert list(opened.broken) == [f"{MODULE}.weight"]
    assert not opened.tensors
    (delta,) = spectra.open_source(write_plain(tmp_path / "p", "gptq 4 bits"), folder)
    assert (delta.name, delta.status) == (f"{MODULE}.weight", "unreadable")
    assert "is missing" in delta.reason
