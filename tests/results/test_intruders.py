"""`intruders` counts what `alignment` counts, from bounds where they decide and from all vectors where they do not."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import run, strict

import spectra
from spectra.engine.solve import ROUNDING_ONLY
from spectra.errors import BaseRequiredError, SelectionError
from spectra.results import base_cache

NAME = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture
def planted(tmp_path):
    """Spikes of rank 0, 1 and 3 on weights of 96×96, and one matrix whose top direction is deep in W₀."""
    generator = torch.Generator().manual_seed(0)

    def orthonormal(k):
        return torch.linalg.qr(torch.randn(96, k, generator=generator, dtype=torch.float64))[0]

    base, tuned = {}, {}
    for layer, rank in enumerate((0, 1, 3)):
        weight = (orthonormal(96) * torch.linspace(4, 1, 96).double()) @ orthonormal(96).T
        base[NAME.format(layer)] = weight
        tuned[NAME.format(layer)] = weight + 50 * orthonormal(rank) @ orthonormal(rank).T + 1e-6 * orthonormal(96)
    U, _, Vh = torch.linalg.svd(base[NAME.format(0)])
    base[NAME.format(3)] = base[NAME.format(0)].clone()
    tuned[NAME.format(3)] = base[NAME.format(0)] + 50 * U[:, 90:91] @ Vh[90:91]
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    return tmp_path


def test_the_counts_are_those_of_alignment_and_what_they_rest_on_is_said(planted, monkeypatch):
    calls = []
    svd = base_cache.svd_top
    monkeypatch.setattr(base_cache, "svd_top", lambda *given: [calls.append(given), svd(*given)][1])
    source = spectra.open_source(planted / "tuned", planted / "base")
    found = spectra.intruders(source, k=5)
    assert list(found["intruders"]) == [0, 1, 3, 0]
    assert list(found["decided_by"]) == ["bounds"] * 3 + ["all vectors of W₀"]
    assert len(calls) == 1, "W₀ is decomposed where it has to be"
    whole = spectra.alignment(source, k=5)
    assert list(found["intruders"]) == list(whole["intruders"])
    for least, most, truth in zip(found["least_cosines"], found["most_cosines"], whole["largest_cosines"], strict=True):
        assert all(low - 1e-9 <= value <= high + 1e-9 for low, value, high in zip(least, truth, most, strict=True))


def test_a_cache_of_the_bases_vectors_is_used(planted, monkeypatch):
    source = spectra.open_source(planted / "tuned", planted / "base")
    whole = spectra.alignment(source, k=5, cache=planted / "kept")
    monkeypatch.setattr(base_cache, "svd_top", None)
    found = spectra.intruders(source, k=5, cache=planted / "kept")
    assert set(found["decided_by"]) == {"all vectors of W₀"}
    for bound, truth in zip(found["most_cosines"], whole["largest_cosines"], strict=True):
        assert bound == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_small_matrices_of_all_shapes_agree_with_alignment(tmp_path, scale):
    base = write_checkpoint(tmp_path / "base", llama_tensors())
    tuned = write_checkpoint(tmp_path / "tuned", nudged(llama_tensors(), size=scale))
    source = spectra.open_source(tuned, base)
    assert list(spectra.intruders(source, k=4)["intruders"]) == list(spectra.alignment(source, k=4)["intruders"])


def test_what_cannot_be_done_has_its_status(tmp_path):
    base = llama_tensors()
    tuned = nudged(base)
    tuned[NAME.format(0)] = base[NAME.format(0)]
    tuned[NAME.format(1)][0, 0] = float("nan")
    base["model.layers.0.self_attn.k_proj.weight"] *= 0
    source = spectra.open_source(write_checkpoint(tmp_path / "tuned", tuned), write_checkpoint(tmp_path / "base", base))
    table = spectra.intruders(source.select(["q_proj", "layers.0.self_attn.k_proj"]), k=3).set_index("name")
    assert table.loc[NAME.format(0), "status"] == "unchanged"
    assert table.loc[NAME.format(1), "status"] == "nonfinite"
    zero = table.loc["model.layers.0.self_attn.k_proj.weight"]
    assert (zero["status"], zero["intruders"]) == ("ok", 3), "a W₀ of zeros knows no direction"
    with pytest.raises(SelectionError, match="k = 0"):
        spectra.intruders(source, k=0)
    lone = spectra.WeightDelta.from_tensor("w", torch.eye(3))
    with pytest.raises(BaseRequiredError, match="pass base="):
        spectra.intruders([lone])


def test_the_command_counts_and_keeps(planted, monkeypatch):
    monkeypatch.chdir(planted)
    arguments = ["alignment", "--base", "base", "--tuned", "tuned", "--k", 5, "--intruders-only"]
    out, err = run(*arguments, "--out", "kept")
    assert out.splitlines()[0].split() == ["matrix", "k", "intruders", "decided", "by"]
    assert "4 intruders in 4 matrices" in err
    printed, _ = run(*arguments, "--json", "--workers", 2)
    assert strict(printed)["matrices"] == strict((planted / "kept/intruders.json").read_text())["matrices"]


@pytest.mark.parametrize("rank", [3, 30])
def test_equal_values_of_the_base_do_not_part_the_two_counts(tmp_path, rank):
    """Groups of equal σ of W₀, one of them cut at 2k: the bases of their spaces are not determined, the counts are."""
    generator = torch.Generator().manual_seed(rank)

    def orthonormal(k):
        return torch.linalg.qr(torch.randn(48, k, generator=generator, dtype=torch.float64))[0]

    S = torch.tensor([4.0] * 4 + [3.0] * 3 + [2.5] * 5 + [1.0] * 36, dtype=torch.float64)
    base = {
        NAME.format(0): (orthonormal(48) * S) @ orthonormal(48).T,
        NAME.format(1): (2 * orthonormal(48)).contiguous(),
    }
    tuned = {name: weight.contiguous() + 2.4 * orthonormal(rank) @ orthonormal(rank).T for name, weight in base.items()}
    source = spectra.open_source(write_checkpoint(tmp_path / "ft", tuned), write_checkpoint(tmp_path / "b", base))
    for epsilon in (0.3, 0.5, 0.7, 0.9):
        counted, whole = (what(source, k=5, epsilon=epsilon) for what in (spectra.intruders, spectra.alignment))
        assert list(counted["intruders"]) == list(whole["intruders"]), epsilon
        assert whole["intruders"][1] == 0, "of a multiple of an orthogonal matrix every direction is one"
        bounds = zip(counted["least_cosines"], counted["most_cosines"], whole["largest_cosines"], strict=True)
        for least, most, truth in bounds:
            assert all(low - 1e-9 <= value <= high + 1e-9 for low, value, high in zip(least, truth, most, strict=True))


def test_an_update_that_is_rounding_alone_says_so_in_both(tmp_path):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    base = {NAME.format(0): weight, NAME.format(1): weight.clone()}
    tuned = {NAME.format(0): weight.bfloat16(), NAME.format(1): (weight + 0.1 * torch.eye(64)).bfloat16()}
    source = spectra.open_source(write_checkpoint(tmp_path / "ft", tuned), write_checkpoint(tmp_path / "b", base))
    for what in (spectra.intruders, spectra.alignment):
        first, second = what(source, k=3)["note"]
        assert first == ROUNDING_ONLY
        assert second == ""
