"""What every row of FORMATS promises, on one example of each: see tests/support/examples.py."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from support.checkpoints import llama_tensors, write_adapter, write_checkpoint
from support.examples import EXAMPLES
from support.peft_oracle import assert_matches
from support.stored import rewritten, stored_tensors

import spectra
from spectra.deltas.source import Source
from spectra.errors import BaseRequiredError, SpectraError
from spectra.files.folder import open_folder
from spectra.files.tensors import TensorRef
from spectra.naming import split_parts
from spectra.sources import FORMATS, Format

ROWS = {row.kind: row for row in FORMATS}
OTHER_NAMES = ("torchtune", "torchtune_dora", "gguf", "xlabs")


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
    homes = {f"spectra.sources.formats.{row.file or row.kind}" for row in FORMATS}
    assert homes & set(loaded) == {"spectra.sources.formats.checkpoint"}


def test_the_update_is_the_oracles(example):
    row, oracle = example
    source = spectra.open_source(oracle.adapter, oracle.base)
    assert source.kind == row.kind
    assert_matches(source, oracle.deltas, oracle.tolerance)


def test_inspect_lists_the_modules_where_the_update_needs_a_base(example):
    row, oracle = example
    found = spectra.inspect(oracle.adapter)
    if found.source is not None or row.kind == "checkpoint":
        assert found.modules == ()
        return
    assert "pass base= (--base)" in found.needs
    expected = {split_parts(name)[0].removesuffix(".weight") for name in oracle.deltas}
    if row.kind in OTHER_NAMES:
        assert len(found.modules) == len(expected)
    elif row.kind != "ln_tuning":  # its modules are norms, and its only matrices weights that are saved whole
        assert set(found.modules) == expected
    assert {line["status"] for line in found.by_role} == {"needs the base"}


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
    if row.needs_base or row.kind == "ln_tuning":  # whose only matrices are saved whole
        with pytest.raises(BaseRequiredError, match=r"pass base= \(--base\)"):
            spectra.open_source(oracle.adapter)
        return
    source = spectra.open_source(oracle.adapter)
    later = {name for name, reason in source.coverage.skipped.items() if "pass base= (--base)" in reason}
    if row.kind in ("kohya", "diffusers"):  # whose names only the base tells: there is one matrix
        assert len(source) == len(oracle.deltas) == 1
    else:
        assert {delta.name for delta in source} | later == set(oracle.deltas)


def test_every_update_knows_the_base_weight_it_changes(example):
    """`delta.base` is W₀ in the update's orientation, and says where its entries lie in the stored tensor."""
    _, oracle = example
    stored = {ref.name: ref for ref in open_folder(oracle.base).tensors.values()}
    for delta in spectra.open_source(oracle.adapter, oracle.base):
        base = delta.base
        assert base is not None
        assert base.shape == delta.shape
        whole = stored[base.stored.name].read_float64().flatten()
        assert torch.equal(whole[base.places()], base.read())
        assert delta.read().base_norm == pytest.approx(base.norm(), rel=1e-12)
        assert base.ref in delta.refs
    assert all(delta.base is None for delta in _without_base(oracle))


def _without_base(oracle):
    try:
        return spectra.open_source(oracle.adapter)
    except BaseRequiredError:
        return ()


@pytest.mark.parametrize("ending", [".not_known.weight", "_not_known.weight", ".lora_not_known"])
def test_a_tensor_that_no_rule_knows_takes_the_number_of_its_module(example, tmp_path, ending):
    row, oracle = example
    if row.kind in ("checkpoint", "ln_tuning", "trainable_tokens"):
        return  # no module but weights; whole weights beside them have a test of their own
    if row.kind in OTHER_NAMES:
        return  # the file's names are not the base's: a test of their own
    if row.kind == "kohya" and ending.startswith("_"):
        return  # with underscores for dots this is another module's name, and gets a row of its own
    before = {delta.name: delta for delta in spectra.open_source(oracle.adapter, oracle.base)}
    name = next(iter(before))
    tensors = stored_tensors(oracle.adapter)
    module = name.removesuffix(".weight")
    flat = module.removeprefix("unet.").replace(".", "_")
    stored, path = next((key, path) for key in tensors for path in (module, flat) if f"{path}." in key)
    prefix = stored[: stored.index(path) + len(path)]
    strange = {**tensors, prefix + ending: torch.ones(2, 2)}
    folder = rewritten(oracle.adapter, tmp_path / "adapter", strange)
    source = spectra.open_source(folder, oracle.base)
    assert source[name].status == "unsupported"
    assert "not_known" in source[name].reason
    for delta in source:
        if delta.name in before and not delta.name.startswith(module):
            assert delta.status == before[delta.name].status


def test_every_missing_tensor_is_a_refusal_and_never_a_number(example, tmp_path):
    """Drop one tensor at a time: what is still given must be what it was before."""
    row, oracle = example
    if row.kind == "checkpoint":
        return  # a weight that is not there is `base_only`
    tensors = stored_tensors(oracle.adapter)
    for place, name in enumerate(sorted(tensors)):
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        if not rest:
            continue
        folder = rewritten(oracle.adapter, tmp_path / str(place), rest)
        try:
            source = spectra.open_source(folder, oracle.base)
        except SpectraError:
            continue
        for delta in source:
            if delta.status == "ok":
                got, expected = delta.read().to_dense(), oracle.deltas[delta.name]
                assert float((got - expected).norm()) <= max(oracle.tolerance, 1e-6) * float(expected.norm()), name


def test_the_example_of_a_new_format_in_contributing_works(tmp_path, monkeypatch):
    """The code block is run as it stands, with the imports that it leaves out."""
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
    block = text.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    for module in ("sources.adapter", "sources.ledger", "deltas.recipes"):
        exec(f"from spectra.{module} import *", scope)
    exec("from __future__ import annotations\n" + block, scope)
    A, B = torch.randn(2, 5), torch.randn(6, 2)
    prefix = "base_model.model.layers.0.q_proj"
    tensors = {f"{prefix}.my_A": A, f"{prefix}.my_B": B}
    config = {"peft_type": "MINE", "my_scale": 3.0}
    rows = re.findall(r"`(Format\(.*?\))`", text)

    def opened(name: str, found: dict) -> Source:
        folder = open_folder(write_adapter(tmp_path / name, found, config))
        (row,) = (eval(row, {"Format": Format}) for row in rows)
        assert row.matches(folder)
        monkeypatch.setattr(Format, "module", types.SimpleNamespace(read=scope["read"]))
        return row.open(folder, None)

    source = opened("right", tensors)
    assert source.kind == "myformat"
    update = source["layers.0.q_proj.weight"].read().to_dense()
    assert torch.allclose(update, 3 * B.double() @ A.double())
    strange = opened("strange", tensors | {f"{prefix}.my_C": torch.ones(2, 2)})
    assert "my_C" in strange["layers.0.q_proj.weight"].reason
