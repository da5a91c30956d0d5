"""Sentences say what the table's numbers say, and nothing where there is no number."""

from __future__ import annotations

import numpy as np

from spectra.metrics.similarity import SubspaceSimilarity
from spectra.results.findings import compared_findings, findings, similarity_findings
from spectra.results.tables import row
from spectra.spectrum import Spectrum


def matrix(name, S, shape=(20, 20), **fields):
    return Spectrum(name, shape, S=S, **fields)


def told(*spectra):
    return findings([row(s) for s in spectra], {s.name: s.base_norm for s in spectra if s.base_norm})


def said(sentences, words):
    (found,) = [sentence for sentence in sentences if words in sentence]
    return found


V, Q = "layers.0.v_proj.weight", "layers.1.q_proj.weight"


def test_counts_and_size_are_those_of_the_rows():
    sentences = told(
        matrix(V, [4.0, 3.0], base_norm=50.0),
        matrix(Q, [], status="nonfinite"),
        matrix("layers.2.q_proj.weight", [0.0], status="unchanged", base_norm=120.0),
    )
    assert sentences[0] == "3 matrices: 1 changed, 1 did not (ΔW = 0), 1 could not be done and has no numbers."
    assert "‖ΔW‖_F = √Σ‖ΔW‖² is 5; that is 3.85 % of ‖W₀‖_F." in sentences[1]
    assert "the base was not read" in told(matrix(V, [4.0, 3.0]))[1]
    assert "over the 1 matrix whose base was read" in told(matrix(V, [4.0], base_norm=8.0), matrix(Q, [4.0]))[1]


def test_the_role_and_the_matrix_with_most_are_named():
    sentences = told(matrix(V, [3.0], base_norm=3.0), matrix(Q, [1.0], base_norm=4.0))
    assert said(sentences, "largest part").startswith("v_proj holds the largest part of the update: 90 % of Σ‖ΔW‖²")
    assert f"{V} changed most (‖ΔW‖_F/‖W₀‖_F = 1) and {Q} least of those that changed (0.25)" in said(
        sentences, "Relative"
    )


def test_dominance_has_its_threshold_and_leaves_out_small_ranks():
    spread = matrix(V, np.ones(20))
    spiky = matrix(Q, [10.0, *[0.1] * 19])
    small = matrix("layers.2.q_proj.weight", [1.0, 1.0], max_rank=2)
    sentence = said(told(spread, spiky, small), "top_8_share > 0.5")
    assert "in 1 of 2 matrices with more than 8 possible" in sentence
    assert said(told(spread), "90 %").startswith("90 % of a matrix's energy Σσ² lies in its top 18 directions")


def test_an_adapters_form_rounding_and_strangers_are_told():
    low = matrix(V, [3.0, 1.0], max_rank=2, noise_edge=2.0, base_cosine=0.1, unmoved_share=0.25)
    sentences = told(low)
    assert "1 of 1 updates are of low rank by their form, an adapter's: rank ≤ 2" in said(sentences, "form")
    assert "above that edge is 50 %, and each has a value above it" in said(sentences, "rounds away")
    assert "cosine of W and W₀ under 0.5" in said(sentences, "nothing to do")
    assert "25 % of a changed matrix" in said(sentences, "equal in both")
    drowned = told(matrix(V, [1.0] * 20, noise_edge=2.0))
    assert "in 1 no value is above it" in said(drowned, "rounds away")


def test_a_truncated_spectrum_is_told():
    assert "only the top of the spectrum" in told(matrix(V, [3.0, 2.0], norm=10.0))[-1]


def test_nothing_changed_or_nothing_done_is_no_fault():
    assert told(matrix(V, [0.0], status="unchanged")) == [
        "1 matrix: 0 changed, 1 did not (ΔW = 0).",
        "All together, ‖ΔW‖_F = √Σ‖ΔW‖² is 0; the base was not read, so it is not known how large that is beside the "
        "weights.",
    ]
    assert told(matrix(V, [], status="failed")) == ["1 matrix: 0 changed, 1 could not be done and has no numbers."]
    assert findings([]) == ["0 matrices: 0 changed."]


def test_runs_are_compared_over_what_they_share():
    first = [row(matrix(V, [2.0, 2.0])), row(matrix(Q, [1.0]))]
    second = [row(matrix(V, [8.0, 0.0]))]
    sentences = compared_findings({"a": first, "b": second})
    assert sentences[0].startswith("1 matrix changed in both runs")
    assert "Median of ‖ΔW‖_F: b 8, a 2.828; b has the largest in 1 of 1 matrix." in sentences[1]
    assert compared_findings({"a": first}) == []
    nearly = [row(matrix(V, [2.0, 2.0 + 1e-12])), row(matrix(Q, [1.0]))]
    assert all(
        "have the same in each of 2 matrices" in said for said in compared_findings({"a": first, "b": nearly})[1:]
    )
    assert "nothing is shared" in compared_findings({"a": first[:1], "b": first[1:]})[0]


def test_a_comparison_is_told_with_its_chance_level():
    items = [
        SubspaceSimilarity(name, "left", 1, np.array([[phi]]), np.array([[0.125]]), np.zeros(1))
        for name, phi in ((V, 0.75), (Q, 0.25))
    ]
    (sentence,) = similarity_findings(items)
    assert (
        "left directions, k = 1: 0.5 on average over 2 matrices, where random directions would give 0.125" in sentence
    )
    assert f"most in {V} (0.75), least in {Q} (0.25)" in sentence
