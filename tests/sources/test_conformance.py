"""What every row of FORMATS promises, on one example of each: see tests/support/examples.py."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint
from support.examples import EXAMPLES, stored_tensors
from support.peak import peak_bytes
from support.peft_oracle import assert_matches

import spectra
from spectra.engine.schedule import needed
from spectra.errors import BaseRequiredError, SpectraError
from spectra.files.folder import open_folder
from spectra.files.tensors import TensorRef
from spectra.sources import FORMATS, Format

ROWS = {row.kind: row for row in FORMATS}


@pytest.fixture(scope="module", params=sorted(EXAMPLES))
def example(request, tmp_path_factory):
    """A format's row and its example's oracle."""
    folder = tmp_path_factory.mktemp("example")
    return ROWS[request.param], EXAMPLES[request.param](folder)


def test_every_row_has_an_example():
    assert set(EXAMPLES) == set(ROWS)
    assert len(ROWS) == len(FORMATS)


def test_only_the_files_of_formats_that_come_into_question_are_imported(tmp_path):
    base, tuned = (write_checkpoint(tmp_path / name, llama_tensors()) for name in ("base", "tuned"))
    code = f"import sys, spectra; spectra.open_source({str(tuned)!r}, base={str(base)!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    homes = {f"spectra.sources.formats.{row.opener.split('.')[0]}" for row in FORMATS}
    assert homes & set(loaded) == {"spectra.sources.formats.checkpoint"}


def test_the_update_is_the_oracles(example):
    row, oracle = example
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == row.kind
    assert_matches(source, oracle.deltas, oracle.tolerance)


def test_listing_reads_no_tensor_and_decomposing_reads_each_delta_alone(example, monkeypatch):
    _, oracle = example
    with monkeypatch.context() as patch:
        patch.setattr(TensorRef, "read", None)
        source = spectra.open_source(oracle.adapter, oracle.base)
        str(source.coverage), repr(source)
    for delta in source:
        paths = {ref.path for ref in delta.recipe.refs}
        assert paths
        assert delta.read().shape == delta.shape


def test_deltas_travel_as_small_recipes(example):
    _, oracle = example
    for delta in spectra.open_source(oracle.adapter, oracle.base):
        packed = pickle.dumps(delta)
        assert len(packed) < 10_000
        assert pickle.loads(packed) == delta


def test_the_spectrum_is_that_of_the_update(example):
    import numpy as np

    _, oracle = example
    source = spectra.open_source(oracle.adapter, oracle.base)
    for found in spectra.decompose(source, top=3):
        assert found.status == "ok", found
        S = np.linalg.svd(oracle.deltas[found.name].numpy(), compute_uv=False)
        assert np.abs(found.S - S[: len(found.S)]).max() <= max(1e-7, oracle.tolerance) * S[0]
        assert S[len(found.S) :].max(initial=0) <= max(1e-9, oracle.tolerance) * S[0], "max_rank is too low"


def test_whether_the_base_is_needed_is_said_rightly(example):
    row, oracle = example
    if row.needs_base:
        with pytest.raises(BaseRequiredError, match="pass --base"):
            spectra.open_source(oracle.adapter)
        return
    source = spectra.open_source(oracle.adapter)
    later = {name for name, reason in source.coverage.skipped.items() if "pass --base" in reason}
    if row.kind in ("kohya", "diffusers"):  # whose names only the base tells: there is one matrix
        assert len(source) == len(oracle.deltas) == 1
    else:
        assert {delta.name for delta in source} | later == set(oracle.deltas)


def test_every_missing_tensor_is_a_refusal_and_never_a_number(example, tmp_path):
    """Drop one tensor at a time: what is still given must be what it was before."""
    row, oracle = example
    if row.kind == "checkpoint":
        return  # a weight that is not there is `base_only`
    tensors = stored_tensors(oracle.adapter)
    config = oracle.adapter / "adapter_config.json"
    for place, name in enumerate(sorted(tensors)):
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        if not rest or name.endswith(".alpha"):  # a kohya file without alpha means s = 1
            continue
        folder = write_adapter(tmp_path / str(place), rest, None)
        if config.is_file():
            (folder / "adapter_config.json").write_text(config.read_text())
        try:
            source = spectra.open_source(folder, oracle.base)
        except SpectraError:
            continue
        for delta in source:
            if delta.status == "ok":
                got, expected = delta.read().to_dense(), oracle.deltas[delta.name]
                assert float((got - expected).norm()) <= max(oracle.tolerance, 1e-6) * float(expected.norm()), name


def test_the_example_of_a_new_format_in_contributing_works(tmp_path):
    """The code block is run as it stands, with the imports that it leaves out."""
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
    block = text.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    for module in ("sources.adapter", "files.folder", "sources.ledger", "deltas.recipes"):
        exec(f"from spectra.{module} import *", scope)
    exec("from __future__ import annotations\nfrom spectra.deltas.source import Source\n" + block, scope)
    A, B = torch.randn(2, 5), torch.randn(6, 2)
    prefix = "base_model.model.layers.0.q_proj"
    write_adapter(tmp_path, {f"{prefix}.my_A": A, f"{prefix}.my_B": B}, {"peft_type": "MINE"})
    folder = open_folder(tmp_path)
    rows = re.findall(r"`(Format\(.*?\))`", text)
    assert [eval(row, {"Format": Format}).matches(folder) for row in rows] == [True]
    source = scope["open_myformat"](folder, None, split=True, heads="mean", scale=None)
    assert source.kind == "myformat"
    assert_matches(source, {"layers.0.q_proj.weight": B.double() @ A.double()})


def test_reading_takes_no_more_memory_than_the_planner_counts_with(example):
    """At these sizes a block of rows is the whole matrix, and a header's reading is no tensor."""
    _, oracle = example
    for delta in spectra.open_source(oracle.adapter, oracle.base):
        delta.read("cpu")  # what is read once for all matrices is there
        assert peak_bytes(lambda delta=delta: delta.read("cpu")) <= needed(delta, None), delta
