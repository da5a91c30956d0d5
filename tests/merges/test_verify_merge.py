"""`verify_merge` against PEFT's own merges, and against what goes wrong with merges."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from click.testing import CliRunner
from support.merges import peft_merge

import spectra
from spectra.cli import main
from spectra.errors import SpectraError
from spectra.merges.report import AS_IT_SHOULD_BE

ON = ["q_proj", "v_proj", "down_proj"]
Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
V0 = "model.layers.0.self_attn.v_proj.weight"
K0 = "model.layers.0.self_attn.k_proj.weight"
LORA = peft.LoraConfig(r=2, lora_alpha=6, target_modules=ON)
CONFIGS = {
    "lora": LORA,
    "rslora": peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=ON),
    "dora": peft.LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules=ON),
    "loha": peft.LoHaConfig(r=2, alpha=6, target_modules=ON),
    "lokr": peft.LoKrConfig(r=1, alpha=3, decompose_factor=2, target_modules=ON),
    "ia3": peft.IA3Config(target_modules=ON, feedforward_modules=["down_proj"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=ON),
    "vera": peft.VeraConfig(r=3, target_modules=ON),
    "hra": peft.HRAConfig(r=2, target_modules=ON),
}


def verdicts(merge):
    report = spectra.verify_merge(*merge.paths)
    return report, {row.name: row.verdict for row in report.matrices}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_pefts_own_merges_are_as_they_should_be(kind, dtype, tmp_path):
    report, found = verdicts(peft_merge(tmp_path, CONFIGS[kind], stored=dtype))
    assert set(found.values()) <= {"exact", "rounded"}, found
    assert report.verdict in AS_IT_SHOULD_BE
    assert len(found) == 6


def test_a_float32_base_merged_in_bfloat16(tmp_path):
    _, found = verdicts(peft_merge(tmp_path, LORA, loaded=torch.bfloat16))
    assert set(found.values()) <= {"exact", "rounded"}


def _steps(merge):
    """ΔW of every matrix that the adapter changes, as merged − base."""
    base, merged = merge.weights("base"), merge.weights("merged")
    return {name: merged[name] - base[name] for name in base if not torch.equal(merged[name], base[name])}


def _break(merge, how):
    steps, base = _steps(merge), merge.weights("base")
    changes = {
        "forgotten": lambda t: t.update({Q0: base[Q0]}),
        "twice": lambda t: t.update({Q0: base[Q0] + 2 * steps[Q0]}),
        "sign": lambda t: t.update({Q0: base[Q0] - steps[Q0]}),
        "alpha": lambda t: t.update({Q0: base[Q0] + steps[Q0] / 3}),
        "other layer": lambda t: t.update({Q0: base[Q0] + steps[Q1]}),
        "noise": lambda t: t.update({Q0: t[Q0] + 0.02 * torch.randn_like(t[Q0])}),
        "unrelated": lambda t: t.update({Q0: torch.randn_like(t[Q0])}),
        "untouched": lambda t: t.update({K0: t[K0] * 1.01}),
    }
    merge.rewrite("merged", changes[how])


@pytest.mark.parametrize(
    ("how", "name", "verdict", "scale"),
    [
        ("forgotten", Q0, "not applied", 0.0),
        ("twice", Q0, "scaled", 2.0),
        ("sign", Q0, "scaled", -1.0),
        ("alpha", Q0, "scaled", 1 / 3),
        ("other layer", Q0, "different", None),
        ("noise", Q0, "damaged", None),
        ("unrelated", Q0, "unrelated base", None),
        ("untouched", K0, "untouched but changed", None),
    ],
)
def test_what_is_wrong_is_found_and_named(how, name, verdict, scale, tmp_path):
    torch.manual_seed(4)
    merge = peft_merge(tmp_path, LORA, size=0.2)
    _break(merge, how)
    report, found = verdicts(merge)
    assert found[name] == verdict
    assert report.verdict == verdict
    assert {word for other, word in found.items() if other != name} <= {"exact", "rounded"}
    row = next(row for row in report.matrices if row.name == name)
    if scale is not None:
        assert row.scale == pytest.approx(scale, abs=1e-3)
    result = CliRunner().invoke(main, _arguments(merge))
    assert result.exit_code == 1
    document = json.loads(CliRunner().invoke(main, [*_arguments(merge), "--json"]).stdout)
    assert document["verdict"] == verdict
    assert document["counts"][verdict] == 1
    assert {row["name"]: row["verdict"] for row in document["matrices"]}[name] == verdict


def _arguments(merge):
    base, adapter, merged = map(str, merge.paths)
    return ["verify", "--base", base, "--adapter", adapter, "--merged", merged]


def test_a_right_merge_ends_with_exit_status_0(tmp_path):
    result = CliRunner().invoke(main, _arguments(peft_merge(tmp_path, LORA)))
    assert result.exit_code == 0, result.output
    assert "6 of 6 matrices are as merged" in result.output


def test_an_update_that_rounding_drowns_is_not_called_verified(tmp_path):
    report, found = verdicts(peft_merge(tmp_path, LORA, stored=torch.bfloat16, size=1e-12))
    assert set(found.values()) == {"too small to tell"}
    assert report.verdict not in AS_IT_SHOULD_BE


def test_files_in_the_wrong_places_are_one_message(tmp_path):
    merge = peft_merge(tmp_path, LORA)
    base, adapter, merged = merge.paths
    for paths in ((base, merged, adapter), (adapter, base, merged), (base, base, merged)):
        with pytest.raises(SpectraError):
            spectra.verify_merge(*paths)
