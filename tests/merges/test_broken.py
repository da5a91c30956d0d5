"""Every way to break a merge is found, and called by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from support.merges import Merge, peft_merge

import spectra
from spectra.errors import SelectionError, SpectraError
from spectra.merges.report import AS_IT_SHOULD_BE

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Q, Q1 = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
K = "model.layers.0.self_attn.k_proj.weight"
ON = ["q_proj", "v_proj", "down_proj"]
# The type of the base's file, the one it is merged in, and the size of the factors: from updates that drown the base
# to ones of half a percent of it.
MODES = {
    "float32": (F32, F32, 0.05),
    "bfloat16": (BF16, BF16, 0.01),
    "large": (BF16, BF16, 0.3),
    "float16": (F16, F16, 0.05),
    "cast": (F32, BF16, 0.01),
}


def lora(**options: object) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=12, target_modules=ON, **options)


@pytest.fixture(scope="module", params=MODES)
def merge(request, tmp_path_factory) -> Merge:
    stored, loaded, size = MODES[request.param]
    return peft_merge(tmp_path_factory.mktemp("merge"), lora(), stored=stored, loaded=loaded, size=size)


def broken(merge: Merge, tmp_path: Path, change: Callable[..., torch.Tensor], name: str = Q) -> spectra.MergeReport:
    """The report on the merge with one weight replaced: `change(W₀, ΔW, all ΔW)` in float64."""
    updates = {delta.name: delta.read().to_dense() for delta in spectra.open_source(merge.adapter, merge.base)}
    weight = change(merge.weights("base")[name].double(), updates.get(name), updates)
    copy = Merge(merge.base, merge.adapter, tmp_path / "broken")
    copy.merged.mkdir()
    (copy.merged / "config.json").write_text((merge.merged / "config.json").read_text())
    (copy.merged / "model.safetensors").write_bytes((merge.merged / "model.safetensors").read_bytes())
    copy.rewrite("merged", lambda tensors: tensors.update({name: weight.to(tensors[name].dtype)}))
    report = spectra.verify_merge(*copy.paths)
    others = {row.verdict for row in report if row.name != name}
    assert others <= {*AS_IT_SHOULD_BE, "too small to tell"}
    return report


SCALES = {
    2: "applied twice",
    -1: "subtracted",
    1 / 3: "α/r ignored",
    0.5: "rsLoRA ignored",
    1.3: "1.3",
    4: "divided by r",
}


@pytest.mark.parametrize("s", SCALES)
def test_another_scale(merge, tmp_path, s):
    row = broken(merge, tmp_path, lambda W, D, _: W + s * D)[Q]
    assert row.verdict == "scaled"
    assert row.scale == pytest.approx(s, rel=0.02)
    assert SCALES[s] in row.cause
    assert row.residual == pytest.approx(abs(s - 1), rel=0.02)


def test_a_forgotten_layer(merge, tmp_path):
    report = broken(merge, tmp_path, lambda W, D, _: W)
    assert report.verdict == report[Q].verdict == "not applied"
    assert report[Q].scale == pytest.approx(0, abs=0.01)
    assert report.counts == {"not applied": 1, "exact": 5}


def test_the_update_of_another_layer(merge, tmp_path):
    row = broken(merge, tmp_path, lambda W, D, updates: W + updates[Q1])[Q]
    assert (row.verdict, row.cause) == ("different", f"holds the update of another weight: {Q1}")


def test_a_transposed_update(merge, tmp_path):
    row = broken(merge, tmp_path, lambda W, D, _: W + D.T)[Q]
    assert (row.verdict, row.cause) == ("different", "the update was transposed")


def test_noise(merge, tmp_path):
    torch.manual_seed(3)
    row = broken(merge, tmp_path, lambda W, D, _: W + D + 0.1 * D.std() * torch.randn_like(D))[Q]
    assert row.verdict == "damaged"
    assert row.scale == pytest.approx(1, abs=0.05)


def test_another_base(merge, tmp_path):
    torch.manual_seed(3)
    row = broken(merge, tmp_path, lambda W, D, _: 0.1 * torch.randn_like(W) + D)[Q]
    assert row.verdict == "unrelated base"


def test_another_revision_of_the_base(merge, tmp_path):
    torch.manual_seed(3)
    row = broken(merge, tmp_path, lambda W, D, _: W + 0.005 * torch.randn_like(W) + D)[Q]
    assert row.verdict == "damaged"
    assert "another base" in row.cause


def row_of_noise(W: torch.Tensor, D: torch.Tensor, _: object) -> torch.Tensor:
    torch.manual_seed(3)
    merged = W + D
    merged[5] = torch.randn(merged.shape[1]).double()
    return merged


def test_one_row(merge, tmp_path):
    row = broken(merge, tmp_path, row_of_noise)[Q]
    assert (row.verdict, row.cause) == ("damaged", "not as merged: 1 of 16 rows: 5")


def test_one_entry(merge, tmp_path):
    def flipped(W: torch.Tensor, D: torch.Tensor, _: object) -> torch.Tensor:
        merged = W + D
        merged[3, 7] = -merged[3, 7] + 0.1
        return merged

    row = broken(merge, tmp_path, flipped)[Q]
    assert (row.verdict, row.cause) == ("damaged", "not as merged: 1 of 256 entries: [3, 7]")


def four_bit(W: torch.Tensor) -> torch.Tensor:
    """Each block of 64 entries rounded to 16 levels."""
    blocks = W.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    return ((blocks / largest * 7.5 - 0.5).round().add(0.5).div(7.5) * largest).reshape(W.shape)


def test_a_dequantised_base(merge, tmp_path):
    row = broken(merge, tmp_path, lambda W, D, _: four_bit(W) + D)[Q]
    assert row.verdict == "damaged"
    if not (merge.weights("merged")[Q].dtype == BF16 and row.rounding < 0.003):  # ΔW drowns W₀, so M cannot tell
        assert "dequantised 4-bit base" in row.cause


def test_nothing_but_a_dequantised_base(merge, tmp_path):
    row = broken(merge, tmp_path, lambda W, D, _: four_bit(W))[Q]
    assert (row.verdict, "dequantised 4-bit base" in row.cause) == ("different", True)


def test_a_matrix_that_the_adapter_does_not_touch(merge, tmp_path):
    report = broken(merge, tmp_path, lambda W, D, _: 1.01 * W, name=K)
    assert report[K].verdict == report.verdict == "untouched but changed"
    assert report[K].scale is None


def test_not_a_number(merge, tmp_path):
    row = broken(merge, tmp_path, lambda W, D, _: W * float("nan"))[Q]
    assert (row.verdict, row.cause) == ("nonfinite", "the merged weight holds NaN or infinity")


OTHERS = {
    "dora": lambda: lora(use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=6, target_modules=ON),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=3, decompose_factor=2, target_modules=ON),
    "ia3": lambda: peft.IA3Config(target_modules=ON, feedforward_modules=["down_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=ON),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=ON),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=ON),
}


@pytest.mark.parametrize("stored", [F32, BF16])
@pytest.mark.parametrize("name", OTHERS)
def test_other_formats(tmp_path, name, stored):
    merge = peft_merge(tmp_path, OTHERS[name](), stored=stored, size=0.2)
    wrong = {
        "not applied": lambda W, D, _: W,
        "scaled": lambda W, D, _: W + 1.5 * D,
        "damaged": row_of_noise,
    }
    for verdict, change in wrong.items():
        folder = tmp_path / verdict
        folder.mkdir()
        row = broken(merge, folder, change)[Q]
        assert row.verdict == verdict, row


def test_a_rotation_that_was_applied_twice(tmp_path):
    merge = peft_merge(tmp_path, OTHERS["oft"](), size=0.2)
    twice = tmp_path / "twice"
    twice.mkdir()
    delta = spectra.open_source(merge.adapter, merge.base)[Q]

    def again(W: torch.Tensor, D: torch.Tensor, _: object) -> torch.Tensor:
        return W + D + delta.recipe.from_base(W + D).to_dense()

    row = broken(merge, twice, again)[Q]
    assert row.verdict == "different"
    assert "applied twice" in row.cause


@pytest.mark.parametrize("stored", [BF16, F16])
def test_a_tiny_update_cannot_be_told(tmp_path, stored):
    merge = peft_merge(tmp_path, lora(), stored=stored, size=1e-6 if stored == BF16 else 1e-7)
    report = spectra.verify_merge(*merge.paths)
    assert report.counts == {"too small to tell": 6}
    assert not report.ok
    assert min(row.rounding for row in report) > 0.5
    forgotten = broken(merge, tmp_path, lambda W, D, _: W)
    assert forgotten[Q].verdict == "too small to tell"


def test_a_missing_matrix(tmp_path):
    merge = peft_merge(tmp_path, lora())
    merge.rewrite("merged", lambda tensors: [tensors.pop(name) for name in (Q, K)])
    report = spectra.verify_merge(*merge.paths)
    assert {name: report[name].verdict for name in (Q, K)} == {Q: "base_only", K: "base_only"}
    assert report[Q].cause == "not in the tuned model"


def test_a_matrix_of_another_shape(tmp_path):
    merge = peft_merge(tmp_path, lora())
    merge.rewrite("merged", lambda tensors: tensors.update({Q: tensors[Q][:8]}))
    row = spectra.verify_merge(*merge.paths)[Q]
    assert (row.verdict, row.cause) == ("shape_mismatch", "tuned is [8, 16], base is [16, 16]")


def test_a_changed_vector_is_noted(tmp_path):
    merge = peft_merge(tmp_path, lora())
    merge.rewrite("merged", lambda tensors: tensors["model.norm.weight"].add_(1))
    report = spectra.verify_merge(*merge.paths)
    assert report.ok
    assert report.notes == ("not the base's, and not judged, being no matrices: model.norm.weight",)


def test_a_buffer_that_only_the_base_has_is_noted(tmp_path):
    merge = peft_merge(tmp_path, lora())
    buffers = {"model.position_ids": torch.arange(8).reshape(1, 8), "model.attn.bias": torch.ones(1, 1, 4, 4)}
    merge.rewrite("base", lambda tensors: tensors.update(buffers))
    report = spectra.verify_merge(*merge.paths)
    assert report.counts == {"exact": 6}
    (note,) = report.notes
    assert set(note.removeprefix("not in the merged model: ").split(", ")) == set(buffers)


def test_a_weight_that_only_the_adapter_and_the_merged_model_have(tmp_path):
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    merge = peft_merge(tmp_path, config, kind="bert")
    head = "classifier.weight"
    merge.rewrite("base", lambda tensors: tensors.pop(head))
    assert spectra.verify_merge(*merge.paths)[head].verdict == "exact"
    merge.rewrite("merged", lambda tensors: tensors[head].mul_(2))
    assert spectra.verify_merge(*merge.paths)[head].verdict == "different"
    merge.rewrite("merged", lambda tensors: tensors.pop(head))
    assert spectra.verify_merge(*merge.paths)[head].verdict == "tuned_only"


def test_swapped_folders_are_told(tmp_path):
    base, adapter, merged = peft_merge(tmp_path, lora()).paths
    swapped = {
        (adapter, base, merged): "is an adapter, not a base model",
        (base, merged, adapter): "holds full weights, not an adapter",
        (base, adapter, adapter): r"is an adapter \(lora\), not merged weights",
    }
    for paths, message in swapped.items():
        with pytest.raises(SpectraError, match=message):
            spectra.verify_merge(*paths)
    report = spectra.verify_merge(merged, adapter, base)
    assert set(report.counts) == {"scaled"}
    assert all("--base and --merged swapped" in row.cause for row in report)


def test_an_adapter_for_another_model(tmp_path):
    merge = peft_merge(tmp_path / "llama", lora())
    other = peft_merge(tmp_path / "opt", peft.LoraConfig(target_modules=["fc1"]), kind="opt")
    with pytest.raises(SpectraError):
        spectra.verify_merge(merge.base, other.adapter, merge.merged)


def test_a_matrix_above_the_budget(tmp_path):
    report = spectra.verify_merge(*peft_merge(tmp_path, lora()).paths, memory_budget=1000)
    assert report.verdict == "too_large"
    assert "raise --memory" in report.matrices[0].cause


def test_a_file_that_breaks_off(tmp_path):
    merge = peft_merge(tmp_path, lora())
    file = merge.merged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2000])
    report = spectra.verify_merge(*merge.paths)
    assert report.verdict not in AS_IT_SHOULD_BE
    assert "unreadable" in report.counts
    assert "exact" in report.counts


@pytest.mark.parametrize("what", ["base", "adapter", "merged"])
def test_what_is_in_memory_is_told_to_be_saved(what):
    given = {"base": "b", "adapter": "a", "merged": "m"} | {what: {"w": torch.ones(2, 2)}}
    with pytest.raises(SelectionError, match=f"{what} is a dict: a merge is checked on files"):
        spectra.verify_merge(**given)
