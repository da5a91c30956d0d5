"""The storage-rounding floor: its parts against slow definitions, and the whole on real weights."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.checkpoints import write_checkpoint

import spectra
from spectra.deltas import grids
from spectra.deltas.edges import may_spike, spike
from spectra.deltas.grids import GRIDS, Grid, grid_of
from spectra.deltas.rounding import rounding_edge, rounding_noise
from spectra.deltas.separable import separable_edge

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("name", TYPES)
def test_ulp_is_the_distance_to_the_next_number(name):
    x = torch.cat([torch.randn(500).abs() * 10.0**e for e in range(-6, 4)] + [torch.tensor([1.0, 2.0, 0.5, 1e-7])])
    x = x.to(TYPES[name])
    integer = torch.int32 if name == "F32" else torch.int16
    following = (x.view(integer) + 1).view(TYPES[name])
    gap = following.double() - x.double()
    assert torch.equal(GRIDS[name].squared_steps(x[None].double())[0], gap.square())


def whole_table(rows, columns):
    """The definition over the whole table of w and u."""
    t = 0.5 - 0.5 * np.cos(np.pi * np.arange(1, 400) / 400)
    a, b = ((side / side.max())[:, None] for side in (rows, columns))
    reach_a, reach_b = (t * (side / (1 - t * side)).sum(0) for side in (a, b))
    u = np.exp(np.interp(np.log(reach_a), np.log(reach_b), np.log(t)))
    least = np.where(reach_a <= reach_b[-1], reach_a / t / u, np.inf).min()
    return math.sqrt(least * rows.max() * columns.max() / rows.sum())


@pytest.mark.parametrize("seed", range(20))
def test_the_separable_edge_is_the_least_of_the_whole_table(seed):
    rng = np.random.default_rng(seed)
    kinds = [
        np.ones,
        rng.random,
        lambda k: rng.pareto(1, k) + 1e-9,
        lambda k: np.where(rng.random(k) < 0.1, 100.0, 1.0),
    ]
    for make in kinds:
        rows = make(int(rng.integers(1, 200)))
        columns = kinds[seed % 4](int(rng.integers(1, 200)))
        columns *= rows.sum() / columns.sum()
        assert separable_edge(rows, columns) == pytest.approx(whole_table(rows, columns), rel=1e-12)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.floats(0, 0.7))
def test_the_separable_edge_is_where_the_largest_singular_value_is(seed, spread):
    rng = np.random.default_rng(seed)
    a, b = (np.exp(spread * rng.standard_normal(size)) for size in (200, 300))
    draws = rng.uniform(-1, 1, (7, 200, 300)) * np.sqrt(3 * a[:, None] * b)
    edge = separable_edge(a * b.sum(), b * a.sum())
    # The edge is the upper end of where the largest value can lie. Where one row outweighs the others that is a
    # bubble of its own and the median lies inside: over 200 draws of (a, b) it was .89 to 1.00 of the edge.
    assert 0.85 * edge <= np.median(np.linalg.norm(draws, 2, axis=(1, 2))) <= 1.02 * edge


def test_equal_variances_give_the_classical_edge():
    for m, n in ((50, 50), (30, 700), (1, 9)):
        found = separable_edge(np.full(m, n * 0.25), np.full(n, m * 0.25))
        assert found == pytest.approx(0.5 * (math.sqrt(m) + math.sqrt(n)), rel=1e-3)


def test_gaussian_weights_give_the_edge_of_the_hump_that_rounding_leaves():
    torch.manual_seed(0)
    base = (0.02 * torch.randn(512, 512)).to(torch.bfloat16).double()
    update = 1e-2 * torch.randn(512, 512, dtype=torch.float64) * 0.02
    tuned = (base + update).to(torch.bfloat16)
    hump = torch.linalg.matrix_norm(tuned.double() - base - update, 2)
    assert float(hump) <= rounding_edge(tuned.double(), "BF16") <= 1.08 * float(hump)


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_known_updates_merged_into_real_weights_are_recovered(real_pair, tmp_path, name):
    """Rank 8 at 1 % of the norm: the stored difference has full rank, the values above the edge are eight."""
    weights = load_file(real_pair[0] / "model.safetensors")
    torch.manual_seed(0)
    base, tuned = {}, {}
    for key in [key for key in weights if key.startswith("encoder.layer.") and weights[key].ndim == 2][::4]:
        base[key] = weights[key].to(TYPES[name])
        m, n = base[key].shape
        update = torch.randn(m, 8) @ torch.randn(8, n)
        tuned[key] = (base[key].double() + 0.01 * update.double() * base[key].double().norm() / update.norm()).to(
            TYPES[name]
        )
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    found = list(spectra.decompose(spectra.open_source(tmp_path / "tuned", tmp_path / "base"), top=12))
    assert len(found) == 9
    for spectrum in found:
        assert spectrum.rank > 300
        assert spectrum.signal_rank == 8
        assert 0 < spectrum.unmoved_share < 0.25
        # similarity does not compare directions that rounding made
        assert spectra.subspace_similarity(spectrum, spectrum, top=12).k_used == 8


def test_a_swamped_update_is_known_by_its_unchanged_entries(tmp_path):
    torch.manual_seed(0)
    base = torch.randn(256, 256).to(torch.bfloat16)
    update = 1e-3 * torch.randn(256, 256)
    write_checkpoint(tmp_path / "base", {"w": base})
    write_checkpoint(tmp_path / "tuned", {"w": (base.float() + update).to(torch.bfloat16)})
    (found,) = spectra.decompose(spectra.open_source(tmp_path / "tuned", tmp_path / "base"))
    assert found.unmoved_share > 0.6


def test_fp32_weights_have_an_edge_far_below_their_update(real_pair):
    base, tuned = real_pair
    (found, *_) = spectra.decompose(spectra.open_source(tuned, base).select("v_proj"))
    assert found.noise_edge < 1e-5 * found.S[0]
    assert found.signal_rank == found.rank


def test_of_what_did_not_move_one_rounding_is_told(tmp_path):
    torch.manual_seed(0)
    weights = {"model.layers.0.self_attn.q_proj.weight": torch.randn(32, 32).bfloat16()}
    base, tuned = (write_checkpoint(tmp_path / side, weights) for side in "bt")
    (found,) = spectra.decompose(spectra.open_source(tuned, base))
    assert (found.status, found.rounding, found.noise_edge) == ("unchanged", "tuned on the bf16 grid", 0.0)


def test_no_edge_where_none_is_known():
    assert rounding_edge(torch.ones(3, 3), "U8") is None
    assert rounding_edge(torch.ones(0, 3), "BF16") is None
    assert rounding_edge(torch.tensor([[1.0, math.nan]]), "BF16") is None
    assert rounding_edge(torch.zeros(4, 4), "BF16") > 0  # subnormal spacing, not zero


def test_one_outstanding_entry_raises_the_edge():
    torch.manual_seed(0)
    weights = 1e-3 * torch.randn(100, 100)
    plain = rounding_edge(weights.double(), "BF16")
    weights[3, 5] = 100.0
    assert rounding_edge(weights.double(), "BF16") >= max(plain, 2.0 ** (6 - 7) / 2)


@pytest.mark.parametrize("roundings", [1, 2])
def test_no_spike_above_the_edge_is_passed_over_by_the_bound(roundings):
    """The entries themselves are the oracle: where the largest of them is above the edge, they have to be looked at."""
    rng = np.random.default_rng(roundings)
    said = []
    for _ in range(300):
        shape = rng.integers(1, 12, 2)
        steps = 4.0 ** (rng.integers(-1, 2, shape) + 3 * (rng.random(shape) < 0.05))
        steps *= rng.random(shape) < 0.9
        steps[0, 0] = 1.0
        delta = torch.from_numpy(np.sqrt(steps) * rng.uniform(0, 2, shape)) if rng.random() < 0.5 else None
        rows, columns, highest = steps.sum(1) / 12, steps.sum(0) / 12, steps.max(1)
        if delta is not None:
            highest = np.minimum(highest, 4 * delta.square().amax(1).numpy())
        largest = spike(torch.from_numpy(steps).__getitem__, rows, columns, highest, roundings, delta)
        for edge in (largest * (1 - 1e-6), largest * 1.3, largest * 3 + 1e-9):
            looked = may_spike(rows, columns, highest * roundings / 4, edge)
            assert looked or largest <= edge
            said.append(looked)
    assert 0.2 < np.mean(said) < 0.8


@pytest.mark.parametrize("dtype", GRIDS)
def test_the_step_at_one_number_is_that_of_a_tensor(dtype):
    numbers = [0.0, 5e-324, 1e-310, -(2.0**-1022), 1e-45, 6e-8, -0.7, 1.0, 1.5, -3e4, 1e38]
    of_all = GRIDS[dtype].squared_steps(torch.tensor(numbers, dtype=torch.float64)).tolist()
    assert [GRIDS[dtype].squared_step(number) for number in numbers] == of_all


E4M3 = torch.float8_e4m3fn
STORED = {
    "float32": (lambda w: w, "F32", GRIDS["F32"]),
    "bf16": (lambda w: w.bfloat16().float(), "F32", Grid(7, -149)),
    "fp16": (lambda w: w.half().float(), "F32", Grid(10, -149)),
    "small fp16": (lambda w: (1e-3 * w).half().float(), "F32", Grid(10, -24)),
    "bf16, then fp16": (lambda w: (1e-3 * w).bfloat16().half(), "F16", Grid(7, -24)),
    "e4m3": (lambda w: w.to(E4M3).bfloat16(), "BF16", Grid(3, -9)),
    "e4m3 times a power of two": (lambda w: (64 * w).to(E4M3).bfloat16() / 64, "BF16", Grid(3, -133)),
    "e5m2": (lambda w: w.to(torch.float8_e5m2).float(), "F32", Grid(2, -149)),
    "multiples of 1/256": (lambda w: (256 * w).round() / 256, "F32", Grid(5, -8)),
    "a pattern": (torch.sign, "F32", GRIDS["F32"]),
    "too few": (lambda w: w[:8, :8].bfloat16().float(), "F32", GRIDS["F32"]),
    "float64 of float32": (lambda w: w.double(), "F64", Grid(23, -1074)),
}


@pytest.mark.parametrize("kind", STORED)
def test_the_grid_is_the_one_that_the_values_lie_on_whatever_the_file_says(kind):
    store, dtype, found = STORED[kind]
    torch.manual_seed(0)
    values = store(0.04 * torch.randn(384, 256))
    assert grid_of(values, dtype) == found
    assert torch.equal(found.round(values.double()), values.double())


def test_a_few_values_off_the_grid_do_not_hide_it():
    torch.manual_seed(0)
    weights = torch.randn(384, 256)
    stored = weights.bfloat16().float()
    stored[0, :40] = weights[0, :40]
    assert grid_of(stored, "F32").name == "bf16"
    stored[::2] = weights[::2]
    assert grid_of(stored, "F32").name == "f32"


@pytest.mark.parametrize("kind", STORED)
def test_a_first_look_at_a_few_entries_changes_no_grid(kind, monkeypatch):
    store, dtype, _ = STORED[kind]
    torch.manual_seed(0)
    values = store(0.04 * torch.randn(1024, 512))
    found = grid_of(values, dtype)
    monkeypatch.setattr(grids, "_show_all_bits", lambda values, _: np.zeros(len(values), bool))
    assert grid_of(values, dtype) == found


@pytest.mark.parametrize("strays", [0.0, 5e-4])
def test_a_step_is_seen_though_many_values_have_all_bits(strays):
    """Multiples of 2⁻²⁴, as random generators make them: a third have 23 bits."""
    torch.manual_seed(0)
    values = torch.randint(2**22, 2**24, (512, 512)).float() * 2.0**-24
    values[:, ::16] *= 0.0  # and a few that are nothing
    values[torch.rand(512, 512) < 0.1] = 3 * 2.0**-24
    off = torch.rand(512, 512) < strays
    values[off] *= 1e-3
    assert grid_of(values, "F32") == Grid(23, -24)
    assert grid_of(torch.randn(512, 512), "F32") == GRIDS["F32"]


def bits_one_by_one(x, grid):
    """The slow definition: Python's exact integers."""
    _, exponent = math.frexp(x)
    step = Fraction(2) ** max(exponent - 1 - grid.bits, grid.floor)
    return float(round(Fraction(x) / step) * step)


@pytest.mark.parametrize("grid", [*GRIDS.values(), Grid(5, -8), Grid(0, -3)])
def test_rounding_is_exact_also_at_ties_near_zero_and_below_the_smallest_step(grid):
    torch.manual_seed(0)
    near = 2.0 ** max(grid.floor, -1000) * torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 3.5, 2.0**grid.bits])
    ties = (1 + (2 * torch.arange(8) + 1) * 2.0 ** -(grid.bits + 1)).double() if grid.bits < 52 else torch.ones(1)
    x = torch.cat([near.double(), ties.double(), torch.randn(200, dtype=torch.float64), torch.tensor([1e-5, 3e7])])
    x = torch.cat([x, -x])
    assert grid.round(x).tolist() == [bits_one_by_one(value, grid) for value in x.tolist()]


def test_rounding_is_that_of_torch():
    torch.manual_seed(0)
    weights = torch.cat([0.04 * torch.randn(200, 100), torch.randn(200, 100) * 1e-3, torch.zeros(1, 100)])
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F8_E4M3", E4M3)):
        assert torch.equal(GRIDS[name].round(weights.double()), weights.to(dtype).double())


# How W + U comes to be stored, and W: tuned, base, and whether that is more than one rounding on the tuned's grid.
MERGED = {
    "float32 base, merged in bf16": (lambda W, U: (W.bfloat16() + U).bfloat16(), lambda W: W, "rounded to it first"),
    "float32 base, cast after the sum": (lambda W, U: (W + U).bfloat16(), lambda W: W, "tuned on the bf16 grid"),
    "fp16 base, merged in bf16": (lambda W, U: (W.half().bfloat16() + U).bfloat16(), lambda W: W.half(),
                                  "base (fp16) rounded to it first"),
    "a bf16 merge saved as float32": (lambda W, U: (W.bfloat16() + U).bfloat16().float(), lambda W: W.bfloat16(),
                                      "tuned on the bf16 grid"),
    "the same beside a float32 base": (lambda W, U: (W.bfloat16() + U).bfloat16().float(), lambda W: W,
                                       "base (f32) rounded to it first"),
    "the base a bf16 copy": (lambda W, U: (W + U).float(), lambda W: W.bfloat16(),
                             "base (bf16) taken for a rounded copy"),
    "the base truly bf16": (lambda W, U: (W.bfloat16().double() + U).float(), lambda W: W.bfloat16(),
                            "tuned on the f32 grid"),
    "fp16 after bf16": (lambda W, U: (W.bfloat16() + U).bfloat16().half(), lambda W: W.half(),
                        "base (fp16) rounded to it first"),
    "the base a bf16 copy of an fp16 file of bf16 values": (lambda W, U: (W + U).bfloat16().half(),
                                                            lambda W: W.bfloat16(), "base a copy rounded to it"),
    "both copies in bf16": (lambda W, U: (W + U).bfloat16(), lambda W: W.bfloat16(), "base a copy rounded to it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MERGED)
def test_a_rank_eight_update_is_found_however_it_was_stored(kind, real_pair, tmp_path):
    merge, store, said = MERGED[kind]
    weights = load_file(real_pair[0] / "model.safetensors")
    torch.manual_seed(0)
    base, tuned = {}, {}
    for key in [key for key in weights if key.startswith("encoder.layer.") and weights[key].ndim == 2][::9]:
        W = weights[key]
        update = (torch.randn(W.shape[0], 8) @ torch.randn(8, W.shape[1])).double()
        base[key], tuned[key] = store(W), merge(W, 0.01 * update * W.double().norm() / update.norm())
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    table = spectra.summarize(spectra.decompose(spectra.open_source(tmp_path / "tuned", tmp_path / "base"), top=10))
    assert table["signal_rank"].tolist() == [8] * len(base)
    assert all(text.endswith(said) for text in table["rounding"])
    if "truly" not in kind:
        assert (table["rank"] > 300).all()


def test_the_energy_of_two_roundings_is_that_of_the_errors():
    torch.manual_seed(0)
    W = 0.04 * torch.randn(300, 200)
    U = 4e-3 * torch.randn(300, 200)
    tuned = (W.bfloat16().double() + U).bfloat16()
    twice, once = rounding_noise(tuned, "BF16", W, "F32")
    error = tuned.double() - W.double() - U
    assert twice.energy == pytest.approx(float(error.square().sum()), rel=0.03)
    assert once.energy == pytest.approx(twice.energy / 2, rel=0.03)
    assert float(torch.linalg.matrix_norm(error, 2)) <= twice.edge <= 1.1 * float(torch.linalg.matrix_norm(error, 2))
