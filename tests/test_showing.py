"""What the nouns show of themselves, as text and in a notebook: enough, escaped, and without reading anything."""

from __future__ import annotations

import html
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from support import reading

import spectra
from spectra.deltas.delta import WeightDelta
from spectra.deltas.forms import Dense, Kronecker, LowRank
from spectra.deltas.source import Coverage, Source
from spectra.metrics.similarity import SubspaceSimilarity
from spectra.results.store import Shelf, Store
from spectra.spectrum import STATUSES, Spectrum

HOSTILE = "layers.0.<script>alert('x')</script>&\"q_proj\".weight"
ALLOWED = {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td"}


class Page(HTMLParser):
    """The cells of every table, row by row, and every tag and attribute that occurs."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.open, self.tags, self.styles = [], [], set(), set()
        self.feed(text)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        self.styles |= {value for key, value in attrs if key == "style"}
        assert {key for key, _ in attrs} <= {"style", "colspan"}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def shown(thing):
    """The page of one thing, which is plain whatever its names are."""
    page = Page(thing._repr_html_())
    assert page.tags <= ALLOWED
    assert page.styles <= {"text-align: left", "text-align: right"}
    return page


def delta(name, size=(4, 3)):
    return WeightDelta.from_tensor(name, torch.ones(size))


def similarity(name, k=2, note=""):
    grid = np.full((k, k), 0.5)
    if k:
        grid[0, 0] = 0.25
    return SubspaceSimilarity(name, "left", k, grid, grid / 5, np.zeros(k), note)


EVERY_NOUN = {
    "delta": delta(HOSTILE),
    "refused": WeightDelta.refused(HOSTILE, (2, 2), "unsupported", HOSTILE),
    "coverage": Coverage(skipped={HOSTILE: HOSTILE}, warnings=(HOSTILE,)),
    "source": Source(HOSTILE, (delta(HOSTILE),), Coverage(warnings=(HOSTILE,)), HOSTILE, HOSTILE),
    "spectrum": Spectrum(HOSTILE, (2, 2), S=[2.0, 1.0], method=HOSTILE, note=HOSTILE),
    "failed": Spectrum(HOSTILE, (2, 2), "failed", reason=HOSTILE),
    "similarity": similarity(HOSTILE, note=HOSTILE),
}


@pytest.mark.parametrize("noun", EVERY_NOUN)
def test_names_from_files_are_escaped(noun):
    text = EVERY_NOUN[noun]._repr_html_()
    assert "<script" not in text
    assert html.escape("<script>alert('x')</script>") in text
    shown(EVERY_NOUN[noun])


def test_stored_spectra_are_escaped_and_listed(tmp_path):
    directory = tmp_path / "<b>results"
    spectra.save(
        [Spectrum(HOSTILE, (3, 2), S=[4.0, 3.0]), Spectrum("b.weight", (2, 2), "failed", reason="x")], directory
    )
    stored = spectra.load(directory)
    assert "<b>results" not in stored._repr_html_()
    assert shown(stored).rows == [
        ["name", "status", "shape", "‖ΔW‖_F", "rank ≤", "values", "vectors"],
        ["b.weight", "failed", "2×2", "–", "2", "0", "0"],
        [HOSTILE, "ok", "3×2", "5", "2", "2", "0"],
    ]


def test_a_collection_in_memory_shows_the_same_without_a_place():
    found = spectra.Spectra([Spectrum(HOSTILE, (3, 2), S=[4.0, 3.0], U=np.eye(3)[:, :1], Vh=np.eye(2)[:1])])
    assert shown(found).rows[1:] == [[HOSTILE, "ok", "3×2", "5", "2", "2", "1"]]
    assert repr(spectra.Spectra([Spectrum("q_proj.weight", (1, 1), S=[1.0])])) == "Spectra(1 matrix: 1 q_proj)"
    assert "Spectra: 1 matrix</b>" in found._repr_html_()


def test_a_collection_says_what_its_numbers_say_and_how_to_see_all(tmp_path):
    found = spectra.Spectra([Spectrum("layers.0.q_proj.weight", (3, 2), S=[4.0, 3.0], base_norm=50.0)])
    assert "that is 10 % of ‖W₀‖_F" in found._repr_html_()
    assert ".report(&quot;page.html&quot;)" in found._repr_html_()
    assert "report" not in spectra.Spectra()._repr_html_()


def test_a_damaged_result_is_shown_as_such_and_few_files_are_opened(tmp_path, monkeypatch):
    spectra.save([Spectrum(f"layers.{i}.v_proj.weight", (2, 2), S=[1.0, 0.5]) for i in range(40)], tmp_path)
    stored = spectra.load(tmp_path)
    Store(tmp_path).spectra.path(stored.names[1]).write_bytes(b"broken")
    opened = []
    record = Shelf.record
    monkeypatch.setattr(Shelf, "record", lambda self, name: opened.append(name) or record(self, name))
    rows = shown(stored).rows
    assert rows[2][:2] == ["layers.1.v_proj.weight", "missing or damaged"]
    assert rows[-1][0] == "… and 28 more; to_frame() shows all"
    assert opened == list(stored.names[:12])
    assert repr(stored) == f"Spectra({tmp_path}, 40 matrices: 40 v_proj)"


def test_a_source_is_a_table_by_role(source):
    rows = shown(source).rows
    assert ["not used", "3 skipped"] in rows
    assert ["role", "matrices", "shape", "rank ≤", "status"] in rows
    assert ["k_proj", "2", "8×16", "8", "ok"] in rows
    assert ["embed_tokens", "1", "32×16", "16", "ok"] in rows
    assert sum(int(row[1]) for row in rows[4:]) == len(source)
    assert repr(source).startswith("Source(checkpoint, 16 matrices: ")
    assert "2 k_proj" in repr(source)


def test_ranks_that_differ_are_a_range_and_refused_matrices_a_row_of_their_own():
    deltas = [WeightDelta(f"layers.{i}.v_proj.weight", (8, 8), None, rank) for i, rank in enumerate((2, 8, 4))]
    refused = WeightDelta.refused("layers.3.v_proj.weight", (8, 8), "unsupported", "int4")
    assert shown(Source("adalora", (*deltas, refused))).rows[-2:] == [
        ["v_proj", "3", "8×8", "2 – 8", "ok"],
        ["v_proj", "1", "8×8", "–", "unsupported"],
    ]


def test_ten_thousand_matrices_are_not_printed_one_by_one():
    many = tuple(WeightDelta(f"layers.{i}.x{i}.weight", (2, 2), None, 1, note=f"note {i}") for i in range(10_000))
    coverage = Coverage(skipped={f"b{i}": f"because of {i}" for i in range(10_000)}, warnings=("w",) * 10_000)
    source = Source("lora", many, coverage, "adapter")
    for text in (repr(source), repr(coverage)):
        assert len(text) < 300
    for thing in (source, coverage):
        assert len(thing._repr_html_()) < 10_000
    assert "and 9,976 more rows" in source._repr_html_()
    assert "… and 9,995 more" in source._repr_html_()
    assert "skipped: b9999: because of 9999" in str(coverage)


def test_long_names_are_cut():
    assert len(Spectrum("x" * 10**6, (1, 1), S=[1.0])._repr_html_()) < 2_000


def test_an_empty_source_says_so():
    empty = Source("lora", ())
    assert repr(empty) == "Source(lora, 0 matrices)"
    assert shown(empty).rows == [["base", "none"], ["not used", "nothing"]]
    assert repr(Coverage()) == "Coverage(everything was paired and used)"
    assert "everything was paired and used" in Coverage()._repr_html_()


def test_coverage_is_told_by_reason():
    coverage = Coverage(base_only={"a": "gone"}, skipped={"b.bias": "a vector", "c.bias": "a vector"}, warnings=("hm",))
    assert shown(coverage).rows == [
        ["list", "reason", "entries", "for example"],
        ["base_only", "gone", "1", "a"],
        ["skipped", "a vector", "2", "b.bias"],
    ]
    assert "warning: hm" in coverage._repr_html_()
    assert repr(coverage) == "Coverage(1 base_only, 2 skipped; warnings: 1)"


def test_a_delta_names_its_stored_tensors(source):
    name = "model.layers.0.self_attn.v_proj.weight"
    rows = shown(source[name]).rows
    assert ["rank ≤", "8"] in rows
    assert [name, "F32", "8×16", "tuned/model.safetensors"] in rows
    assert [name, "F32", "8×16", "base/model.safetensors"] in rows
    assert repr(source[name]) == f"WeightDelta({name}, 8×16, rank ≤ 8, dense, Difference)"
    assert repr(WeightDelta.refused("a", (2, 2), "unsupported", "int4")) == "WeightDelta(a, unsupported: int4)"


def test_a_spectrum_is_told_without_its_arrays():
    spectrum = Spectrum(
        "layers.0.v_proj.weight", (8, 8), S=np.arange(8.0, 0.0, -1), U=np.eye(8)[:, :2], Vh=np.eye(8)[:2],
        base_norm=100.0, noise_edge=3.5, method="by hand", note="a mean",
    )  # fmt: skip
    assert shown(spectrum).rows == [
        ["shape", "8×8"],
        ["status", "ok"],
        ["‖ΔW‖_F", "14.28 = 0.143 ‖W₀‖_F"],
        ["rank", "8 of 8"],
        ["above the rounding edge", "5 values over 3.5"],
        ["σ", "8, 7, 6, 5, 4, …"],
        ["vectors", "the top 2"],
        ["method", "by hand"],
        ["note", "a mean"],
    ]
    assert repr(spectrum) == "Spectrum(layers.0.v_proj.weight, 8×8, σ₁ = 8, ‖ΔW‖_F = 14.28, rank 8 of 8, top 2 vectors)"


def test_a_truncated_spectrum_does_not_claim_its_rank():
    assert "rank at least 2 of 8" in repr(Spectrum("a", (8, 8), S=[2.0, 1.0]))


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_is_shown_and_no_number_without_one(status):
    spectrum = Spectrum("a", (2, 2), status, S=np.zeros(2 if status in ("ok", "unchanged") else 0), reason="why")
    assert ["status", f"{status}: why"] in shown(spectrum).rows
    assert ("‖ΔW‖_F" in spectrum._repr_html_()) == (status in ("ok", "unchanged"))
    assert status == "ok" or status in repr(spectrum)


def test_a_similarity_is_its_two_corners_beside_chance():
    assert shown(similarity("a", note="k clamped")).rows == [
        ["side", "left singular vectors (out)"],
        ["directions", "k = 2"],
        ["note", "k clamped"],
        ["", "value", "chance"],
        ["φ(1, 1)", "0.250", "0.050"],
        ["φ(2, 2)", "0.500", "0.100"],
    ]
    assert repr(similarity("a")) == "SubspaceSimilarity(a, left, φ(2, 2) = 0.500, chance 0.100)"
    assert [row[0] for row in shown(similarity("a", k=1)).rows].count("φ(1, 1)") == 1
    assert "nothing compared" in repr(similarity("a", k=0))
    shown(similarity("a", k=0))


def test_forms_show_their_size_and_no_numbers():
    zeros = torch.zeros
    assert repr(Dense(zeros(3, 4))) == "Dense(3×4)"
    assert repr(LowRank(zeros(3, 2), zeros(2, 4))) == "LowRank(3×2 · 2×4)"
    assert repr(Kronecker(zeros(3, 2), zeros(1, 4))) == "Kronecker(3×2 ⊗ 1×4)"


def test_displaying_a_model_loads_no_torch_and_no_pandas(source):
    code = (
        f"import sys, spectra; source = spectra.open_source({source.tuned!r}, {source.base!r});"
        "delta = source.deltas[0]; spectrum = spectra.Spectrum('a', (2, 2), S=[2.0, 1.0]);"
        "[repr(x) + x._repr_html_() for x in (source, source.coverage, delta, spectrum)];"
        "print({'torch', 'pandas', 'matplotlib', 'IPython'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("set()\n", "")


def test_displaying_reads_no_tensor(source, monkeypatch):
    from spectra.files.tensors import TensorRef

    monkeypatch.setattr(TensorRef, "read_real", lambda *_: pytest.fail("a tensor was read"))
    reading.refuse(monkeypatch)
    for thing in (source, source.coverage, *source.deltas):
        assert repr(thing)
        shown(thing)
