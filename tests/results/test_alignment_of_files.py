"""`alignment` on files: forms, statuses, the cache of W₀, and a metric added as CONTRIBUTING shows it."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from support.checkpoints import llama_tensors, nudged, write_adapter, write_checkpoint

import spectra
from spectra.errors import BaseRequiredError, SelectionError, StoreError
from spectra.metrics import alignment as metrics
from spectra.results import base_cache

PROJECTION = "model.layers.0.self_attn.v_proj.weight"
CONTRIBUTING = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "base", llama_tensors())


def adapter(folder):
    generator = torch.Generator().manual_seed(3)
    prefix = "base_model.model.model.layers.0.self_attn.v_proj"
    rows, columns = llama_tensors()[PROJECTION].shape
    factors = {
        f"{prefix}.lora_A.weight": torch.randn(2, columns, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(rows, 2, generator=generator),
    }
    return write_adapter(folder, factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2})


def test_an_adapter_and_its_merge_are_aligned_alike(tmp_path, base):
    source = spectra.open_source(adapter(tmp_path / "lora"), base)
    merged = llama_tensors(dtype=torch.float64)
    merged[PROJECTION] = llama_tensors()[PROJECTION].double() + source[PROJECTION].read().to_dense()
    full = spectra.open_source(write_checkpoint(tmp_path / "merged", merged), base).select("layers.0.self_attn.v_proj")
    (of_factors,) = spectra.alignment(source, k=2).to_dict("records")
    (of_weights,) = spectra.alignment(full, k=2).to_dict("records")
    assert (of_factors["r"], of_factors["k"], of_factors["status"]) == (2, 2, "ok")
    for name in metrics.ALIGNMENT:
        assert of_factors[name] == pytest.approx(np.asarray(of_weights[name], dtype=float), rel=1e-6, abs=1e-9), name


def test_what_cannot_be_done_has_its_status_and_the_others_go_on(tmp_path, base):
    tensors = nudged(llama_tensors())
    tensors[PROJECTION] = llama_tensors()[PROJECTION]
    tensors[PROJECTION.replace("v_proj", "q_proj")][0, 0] = float("nan")
    source = spectra.open_source(write_checkpoint(tmp_path / "tuned", tensors), base).select("layers.0.self_attn.*")
    table = spectra.alignment(source).set_index("name")
    assert table.loc[PROJECTION, "status"] == "unchanged"
    assert table.loc[PROJECTION.replace("v_proj", "q_proj"), "status"] == "nonfinite"
    assert list(table["status"]).count("ok") == len(table) - 2 > 0
    small = spectra.alignment(source, memory_budget=1)
    assert set(small["status"]) == {"too_large"}
    assert "raise memory_budget=" in small["reason"][0]


def test_without_a_base_the_message_says_what_to_pass(tmp_path):
    with pytest.raises(BaseRequiredError, match=r"pass base= \(--base\)"):
        spectra.alignment(spectra.open_source(adapter(tmp_path / "lora")))


@pytest.mark.parametrize("wrong", [{"k": 0}, {"epsilon": 0.0}, {"epsilon": 1.5}])
def test_what_is_no_number_of_directions_or_no_cosine_is_refused(wrong):
    with pytest.raises(SelectionError, match=next(iter(wrong))):
        spectra.alignment([], **wrong)


def test_the_cache_spares_the_bases_decomposition_until_the_base_changes(tmp_path, base, monkeypatch):
    def table(**options):
        return spectra.alignment(spectra.open_source(adapter(tmp_path / "lora"), base), **options).to_dict("records")

    calls = []
    svd = base_cache.svd_top
    monkeypatch.setattr(base_cache, "svd_top", lambda *given: [calls.append(given), svd(*given)][1])
    plain = table()
    assert table(cache=tmp_path / "kept") == plain
    assert len(calls) == 2
    assert table(cache=tmp_path / "kept") == plain
    assert len(calls) == 2, "the second run read what the first one kept"
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert table(cache=tmp_path / "kept") == plain, "half a file counts as none"
    done, content = len(calls), bytearray(kept.read_bytes())
    content[-5] ^= 1
    kept.write_bytes(content)
    assert table(cache=tmp_path / "kept") == plain, "and so does one with another bit"
    assert len(calls) > done
    write_checkpoint(base, llama_tensors(seed=8))
    assert table(cache=tmp_path / "kept") != plain
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        table(cache=tmp_path / "file")


def test_the_cache_does_not_change_the_last_bits(tmp_path):
    base = llama_tensors()
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", nudged(base))
    source = spectra.open_source(tmp_path / "tuned", tmp_path / "base")
    tables = [spectra.alignment(source, k=3, cache=cache).to_csv() for cache in (None, tmp_path / "kept")]
    assert spectra.alignment(source, k=3, cache=tmp_path / "kept").to_csv() == tables[0] == tables[1]


def test_a_metric_is_one_function_and_one_line_as_contributing_says(tmp_path, base, monkeypatch):
    """The example of "Add a metric" as it stands there becomes a column."""
    section = CONTRIBUTING.read_text().split("## Add a metric")[1].split("\n## ")[0]
    room = dict(vars(metrics))
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], room)
    (line,) = re.findall(r'`"(\w+)": (\w+)`', section)
    monkeypatch.setitem(metrics.ALIGNMENT, line[0], room[line[1]])
    (row,) = spectra.alignment(spectra.open_source(adapter(tmp_path / "lora"), base)).to_dict("records")
    assert row[line[0]] == pytest.approx(sum(row["left_deciles"][5:]))


def test_as_many_matrices_are_at_work_as_the_budget_holds_and_rows_come_in_order(tmp_path, base):
    source = spectra.open_source(write_checkpoint(tmp_path / "tuned", nudged(llama_tensors())), base)
    source = source.select("self_attn")
    plain = spectra.alignment(source, k=3)
    largest = (7 + 4) * 8 * 16 * 16
    for budget, most in ((largest, 2), (100 * largest, 3)):  # k and v are half as large as q and o
        with CountingPool(3) as pool:
            found = spectra.alignment(source, k=3, executor=pool, memory_budget=budget)
        assert pool.most == most
        pd.testing.assert_frame_equal(found, plain)


class CountingPool(ThreadPoolExecutor):
    """Counts how many tasks are in flight."""

    most = now = 0

    def submit(self, *given):
        self.now += 1
        self.most = max(self.most, self.now)
        future = super().submit(*given)
        result = future.result
        future.result = lambda: [result(), setattr(self, "now", self.now - 1)][0]
        return future


def test_a_planted_spike_is_one_intruder_and_an_update_in_the_top_none_through_the_files(tmp_path):
    X, Z = (
        torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(seed)).double())[0]
        for seed in (0, 1)
    )
    weight = X @ torch.diag(torch.linspace(4, 1, 48).double()) @ Z.T
    name = "model.layers.0.self_attn.q_proj.weight"
    base = write_checkpoint(tmp_path / "base", {name: weight})
    even = torch.full((48, 1), 48**-0.5, dtype=torch.float64)  # as far from every direction of W₀ as can be
    for folder, update, count in (
        ("spike", 50 * (X @ even) @ (Z @ even).T, 1),
        ("inside", 0.5 * X[:, :4] @ torch.diag(torch.arange(4, 0, -1).double()) @ Z[:, :4].T, 0),
    ):
        tuned = write_checkpoint(tmp_path / folder, {name: weight + update})
        (row,) = spectra.alignment(spectra.open_source(tuned, base), k=4).to_dict("records")
        assert row["intruders"] == count, folder
    assert row["cosines"][0][0] == pytest.approx(1.0)
