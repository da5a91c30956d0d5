"""The benchmarks run: the GPU script's checks on the CPU, and one small comparison."""

from __future__ import annotations

import csv

import pytest
from support.card import card_of


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))


def test_the_gpu_script_finds_the_device_path_right_on_the_cpu():
    from benchmarks import gpu

    assert [fault for _, fault in gpu.faults("cpu", 2**30) if fault] == []


def test_the_gpu_script_finds_it_right_on_a_card_and_sees_its_faults(monkeypatch):
    from benchmarks import gpu

    with card_of(monkeypatch) as card:
        assert [fault for _, fault in gpu.faults("cuda", 2**28) if fault] == []
    assert card.misuses == []

    def drifting(right, matrix, *rest, **options):
        values, vectors = right(matrix, *rest, **options)
        vectors[..., :, -1] += vectors[..., :, 0]
        return values, vectors

    with card_of(monkeypatch, faults={"linalg_eigh": drifting}) as card:
        told = dict(gpu.known_faults("cuda", 2**28))
    assert told["NaN in a matrix"] == ""
    assert "right only by the next solver: gram-eigh-f64 rejected" in told["64 × 40², top 4, call 4"]


def test_the_gpu_script_sees_a_fault():
    from dataclasses import replace

    from benchmarks import gpu, inputs
    from spectra import WeightDelta

    delta = WeightDelta.from_tensor("a", inputs.gaussian(20, 10))
    (found,) = gpu.on_device([delta], "cpu", 2**30, 2)
    assert gpu.fault_of(delta, found, 2) == ""
    assert "values off" in gpu.fault_of(delta, replace(found, S=found.S * 1.01), 2)
    assert "sin θ" in gpu.fault_of(delta, replace(found, U=found.U[::-1].copy()), 2)


def test_the_table_holds_what_was_measured(tmp_path):
    from benchmarks import __main__ as table
    from benchmarks.measure import Sample, compare

    outcome = compare("work", "peer", 2.0, lambda: Sample(1.0), lambda: Sample(3.0), repeats=3)
    table.write_table(tmp_path, [outcome], "a remark")
    (row,) = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert (float(row["ratio"]), float(row["ours_s"]), float(row["peer_s"])) == (3.0, 1.0, 3.0)
    text = (tmp_path / "table.md").read_text()
    assert "| work | peer | 2× | 3.00× | 3.00–3.00 | 3 |" in text
    assert text.endswith("|\n\na remark\n")
    assert "torch" in text.splitlines()[0]


def test_the_rounding_table_counts_what_is_there(tmp_path):
    from benchmarks import rounding

    lines = list(rounding.by_storage(96, range(1), None, tmp_path))
    assert lines[2] == "| bf16 base, merged in bf16 | 8 | 8 |"
    assert len(lines) == 2 + 11
    assert rounding.cell([(8, 8), (8, 8)]) == "8"
    assert rounding.cell([(9, 8), (8, 8)]) == "**9, 8** (8, 8)"
