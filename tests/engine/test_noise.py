"""Which values are rounding: what was added to W₀ is counted, and nothing else, whatever W₀ and the update are like."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import write_checkpoint

import spectra


def product(W, rank, share, seed=0):
    """A random update of a rank, with a share of W's norm."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(W.shape[0], rank, generator=generator), torch.randn(rank, W.shape[1], generator=generator)
    update = (left @ right).double()
    return update * (share * W.double().norm() / update.norm())


def stored(folder, tuned, base):
    for name, weights in (("tuned", tuned), ("base", base)):
        write_checkpoint(folder / name, {"a.weight": weights})
    (found,) = spectra.decompose(spectra.open_source(folder / "tuned", folder / "base"))
    return found


def gaussian():
    return 0.04 * torch.randn(384, 384)


def heavy():
    return 0.02 * torch.distributions.StudentT(3.0).sample((384, 384))


def faint_rows():
    weights = gaussian()
    weights[::2] *= 1e-2
    return weights


def outlier_columns():
    weights = gaussian()
    weights[:, 100:104] *= 50
    return weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 2, 8, 16])
@pytest.mark.parametrize("weights", [gaussian, heavy, faint_rows])
def test_the_rank_of_an_update_is_found_in_every_family(weights, rank, dtype, tmp_path):
    torch.manual_seed(1)
    base = weights().to(dtype)
    found = stored(tmp_path, (base.double() + product(base, rank, 1e-2)).to(dtype), base)
    assert found.rank > 300
    assert found.signal_rank == rank


@pytest.mark.parametrize("share", [1e-2, 3e-3])
def test_few_directions_on_real_weights_are_not_counted_with_what_rounding_makes_of_them(share, real_pair, tmp_path):
    weights = load_file(real_pair[0] / "model.safetensors")
    for i, key in enumerate([k for k in weights if k.startswith("encoder.layer.") and weights[k].ndim == 2][::6]):
        base = weights[key].bfloat16()
        for rank in (1, 2):
            tuned = (base.double() + product(base, rank, share, seed=i)).bfloat16()
            found = stored(tmp_path / f"{i}-{rank}", tuned, base)
            assert found.signal_rank == rank


def test_columns_that_stand_out_and_do_not_move_hide_nothing(tmp_path):
    torch.manual_seed(0)
    base = outlier_columns().bfloat16()
    found = stored(tmp_path, (base.double() + product(gaussian(), 16, 3e-3)).bfloat16(), base)
    assert found.signal_rank == 16


def test_a_random_update_as_small_as_the_rounding_has_no_signal(tmp_path):
    torch.manual_seed(0)
    base = gaussian().bfloat16()
    found = stored(tmp_path, (base.double() + 3e-5 * torch.randn(384, 384)).bfloat16(), base)
    assert found.signal_rank == 0
    assert found.noise_energy == pytest.approx(found.norm**2, rel=0.05)
    assert "rounding and nothing else" in found.note


def test_a_full_update_far_above_the_rounding_is_all_signal(tmp_path):
    torch.manual_seed(0)
    base = gaussian().bfloat16()
    found = stored(tmp_path, (base.double() + 0.04 * torch.randn(384, 300) @ torch.eye(300, 384)).bfloat16(), base)
    assert 285 <= found.signal_rank <= 300
    assert found.rounding == "tuned on the bf16 grid"
    assert not found.note


def test_the_top_alone_is_judged_as_the_whole(tmp_path):
    torch.manual_seed(0)
    base = gaussian()
    tuned = (base.bfloat16().double() + product(base, 8, 1e-2)).bfloat16()
    whole = stored(tmp_path, tuned, base)
    source = spectra.open_source(tmp_path / "tuned", tmp_path / "base")
    (top,) = spectra.decompose(source, top=12, only_top=True)
    assert top.rounding == whole.rounding
    assert top.noise_edge == pytest.approx(whole.noise_edge, rel=1e-6)
    assert top.signal_rank == whole.signal_rank == 8


def test_a_correct_merge_reads_as_the_update_that_was_merged(tmp_path):
    torch.manual_seed(0)
    base = gaussian().bfloat16()
    update = product(base, 8, 1e-2)
    found = stored(tmp_path, (base.double() + update).bfloat16(), base)
    exact = spectra.Spectrum("a", (384, 384), S=torch.linalg.svdvals(update).numpy()[:8], max_rank=8)
    (row,) = spectra.summarize([found]).to_dict("records")
    assert row["effective_rank"] > 80
    for name in ("effective_rank", "participation_ratio", "stable_rank", "rank_99", "norm"):
        assert row[f"signal_{name}"] == pytest.approx(spectra.METRICS[name](exact), rel=0.01)


@pytest.mark.parametrize("copy", [True, False])
def test_similarity_warns_where_the_base_s_own_error_is_in_both(copy, tmp_path):
    torch.manual_seed(0)
    weights = gaussian()
    base = weights.bfloat16() if copy else weights.bfloat16().float()
    found = []
    for seed in (1, 2):
        tuned = ((weights if copy else base) + product(weights, 8, 1e-2, seed)).float()
        for name, saved in (("tuned", tuned), ("base", base)):
            write_checkpoint(tmp_path / f"{seed}" / name, {"a.weight": saved})
        source = spectra.open_source(tmp_path / f"{seed}" / "tuned", tmp_path / f"{seed}" / "base")
        found += spectra.decompose(source, top=30)
    similarity = spectra.subspace_similarity(*found, top=30)
    assert similarity.k_used == 8
    assert ("contain the rounding error of their base" in similarity.note) == copy


@pytest.mark.parametrize("rate", [0.7, 0.5, 0.3])
def test_values_that_fall_are_not_joined_by_what_rounding_makes_of_the_first(rate, real_pair, tmp_path):
    """Real directions come back smaller when they are rounded again; artefacts come back larger and end the count."""
    weights = load_file(real_pair[0] / "model.safetensors")
    for i, key in enumerate([k for k in weights if k.startswith("encoder.layer.") and weights[k].ndim == 2][4::8]):
        generator = torch.Generator().manual_seed(i)
        base = weights[key].bfloat16()
        left, right = (torch.randn(size, 16, generator=generator, dtype=torch.float64) for size in base.shape)
        left, right = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
        update = (left * rate ** torch.arange(16.0)) @ right.T
        update *= 3e-3 * base.double().norm() / update.norm()
        tuned = (base.double() + update).bfloat16()
        found = stored(tmp_path / f"{i}", tuned, base)
        rest = tuned.double() - base.double()
        rest -= left @ (left.T @ rest)
        rest -= (rest @ right) @ right.T
        outside = float(torch.linalg.matrix_norm(rest, 2))
        true = int((outside < found.S).sum())
        U, _, Vh = torch.linalg.svd(tuned.double() - base.double(), full_matrices=False)
        of_update = (left.T @ U).norm(dim=0) * (Vh @ right).norm(dim=1)
        assert found.signal_rank <= true
        assert abs(found.signal_rank - int((of_update[:16] > 0.5).sum())) <= 1


@pytest.mark.parametrize("roundings", [1, 2])
@pytest.mark.parametrize("kept", ["bf16", "float32"])
def test_the_roundings_of_a_full_rank_update_are_counted(kept, roundings, tmp_path):
    """No energy tells them apart where the update reaches below the edge; the jumps at powers of two do."""
    torch.manual_seed(0)
    W, update = gaussian(), 4e-4 * torch.randn(384, 384, dtype=torch.float64)
    once = kept == "bf16" if roundings == 1 else kept == "float32"  # whether the update is added to a bf16 base
    tuned = ((W.bfloat16() if once else W).double() + update).bfloat16()
    base = W.bfloat16() if kept == "bf16" else W
    found = stored(tmp_path, tuned, base)
    error = float(torch.linalg.matrix_norm(tuned.double() - base.double() - update, 2))
    true = int((error < found.S).sum())
    assert ("base" in found.rounding) == (roundings == 2)
    assert true - 12 <= found.signal_rank <= true


def test_what_rounding_makes_of_rows_that_do_not_move_is_no_second_direction(tmp_path):
    torch.manual_seed(0)
    for seed, dtype, share in ((0, torch.bfloat16, 1e-3), (1, torch.float16, 1e-4)):
        base = faint_rows().to(dtype)
        for rank in (1, 2):
            tuned = (base.double() + product(faint_rows(), rank, share, seed)).to(dtype)
            assert stored(tmp_path / f"{seed}-{rank}", tuned, base).signal_rank == rank


@pytest.mark.parametrize("size", [384, 1024])
@pytest.mark.parametrize("weights", [gaussian, heavy, outlier_columns])
def test_the_edge_is_just_above_the_largest_error(weights, size, tmp_path):
    """Heavy tails and columns that stand out, too: the bound alone was up to 3.4 times as high."""
    torch.manual_seed(0)
    base = weights().repeat(size // 384 + 1, size // 384 + 1)[:size, :size].bfloat16()
    base = base[torch.randperm(size)]
    update = product(gaussian().repeat(3, 3)[:size, :size], 8, 1e-2)
    tuned = (base.double() + update).bfloat16()
    found = stored(tmp_path, tuned, base)
    u, _, vh = torch.linalg.svd(update)
    outside = u[:, 8:].T @ (tuned.double() - base.double()) @ vh[8:].T
    error = float(torch.linalg.matrix_norm(outside, 2))
    assert found.signal_rank == 8
    assert error < found.noise_edge < 1.15 * error


def test_small_or_large_float32_updates_are_not_said_to_have_a_rounded_base(tmp_path):
    for size, share in ((4, 1e-2), (8, 1.0), (16, 10.0), (64, 1.0), (64, 10.0)):
        for seed in range(8):
            torch.manual_seed(seed)
            base = 0.04 * torch.randn(size, size)
            tuned = (base.double() + product(base, 2, share, seed)).float()
            assert stored(tmp_path / f"{size}-{share}-{seed}", tuned, base).rounding == "tuned on the f32 grid"


def scaled_codes(weights, block):
    scales = weights.unfold(1, block, block).abs().amax(2, keepdim=True) / 448
    codes = (weights.unfold(1, block, block) / scales).to(torch.float8_e4m3fn)
    return (codes.float() * scales).reshape(weights.shape)


@pytest.mark.parametrize("block", [384, 128])
def test_of_codes_times_scales_no_edge_is_told(block, tmp_path):
    torch.manual_seed(0)
    weights = gaussian()
    update = product(weights, 8, 2e-2).float()
    coded = stored(
        tmp_path / "1", scaled_codes(weights + update, block).bfloat16(), scaled_codes(weights, block).bfloat16()
    )
    assert coded.rounding == "tuned holds codes times scales, whose rounding is not known"
    assert (coded.noise_edge, coded.signal_rank) == (None, coded.rank)
    base = scaled_codes(weights, block).bfloat16()
    merged = stored(tmp_path / "2", (base.double() + update).bfloat16(), base)
    assert merged.rounding == "tuned on the bf16 grid, base of codes times scales taken as exact"
    assert merged.signal_rank == 8


def test_a_second_rounding_that_nothing_bears_out_is_called_perhaps(tmp_path):
    """Three steps large in few entries, the update hides the jumps and reaches below every edge."""
    torch.manual_seed(5)
    weights = gaussian()[:128, :128].contiguous()
    tuned = (weights + 0.02 * weights.norm() / 128 * torch.randn(128, 128)).bfloat16()
    found = stored(tmp_path, tuned, weights)
    assert found.rounding == "tuned on the bf16 grid, base (f32) perhaps rounded to it first"
    twice = (weights.bfloat16() + product(weights, 8, 1e-2)).bfloat16()
    assert stored(tmp_path, twice, weights).rounding == "tuned on the bf16 grid, base (f32) rounded to it first"


def test_sizes_whose_squares_float32_does_not_hold_are_no_failure(tmp_path):
    """Every bfloat16 pattern may be stored, and 2⁶⁴ squared is more than float32 has."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        codes = torch.randint(-(2**15), 2**15, (300, 8, 6), generator=generator, dtype=torch.int16)
        weights = codes.view(torch.bfloat16)
        weights = torch.where(weights.isfinite(), weights, torch.ones_like(weights))
        tensors = {f"model.layers.{i}.self_attn.q_proj.weight": weights[i].clone() for i in range(len(weights))}
        write_checkpoint(tmp_path / name, tensors)
    found = list(spectra.decompose(spectra.open_source(tmp_path / "tuned", tmp_path / "base")))
    assert {(item.status, item.reason) for item in found} == {("ok", "")}
