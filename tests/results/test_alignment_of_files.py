"""`alignment` on files: forms, statuses, the cache of W₀, and a metric added as CONTRIBUTING shows it."""

from __future__ import annotations

import re
from pathlib import Path

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
        assert of_factors[name] == pytest.approx(of_weights[name], rel=1e-6, abs=1e-9), name


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
    write_checkpoint(base, llama_tensors(seed=8))
    assert table(cache=tmp_path / "kept") != plain
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        table(cache=tmp_path / "file")


def test_a_metric_is_one_function_and_one_line_as_contributing_says(tmp_path, base, monkeypatch):
    """The example of "Add a metric" as it stands there becomes a column."""
    section = CONTRIBUTING.read_text().split("## Add a metric")[1].split("\n## ")[0]
    room = dict(vars(metrics))
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], room)
    (line,) = re.findall(r'`"(\w+)": (\w+)`', section)
    monkeypatch.setitem(metrics.ALIGNMENT, line[0], room[line[1]])
    (row,) = spectra.alignment(spectra.open_source(adapter(tmp_path / "lora"), base)).to_dict("records")
    assert row[line[0]] == pytest.approx(sum(row["left_deciles"][5:]))
