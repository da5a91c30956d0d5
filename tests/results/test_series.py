"""`series` against its slow definition; order, storage, extension, adapters, and checkpoints that cannot be read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.checkpoints import llama_tensors, nudged, write_adapter, write_checkpoint

import spectra
from spectra.cli import main
from spectra.errors import BaseRequiredError, SelectionError, SourceError, StoreError
from spectra.results import streams
from spectra.results.series import series_rows
from spectra.results.series_table import by_role, step_folder
from spectra.results.shelf import Shelf

NAME = "model.layers.0.self_attn.q_proj.weight"
STEPS = (100, 200, 1000)


def weights(step):
    """The same directions growing, and some that are new at every step."""
    return nudged(nudged(llama_tensors(), seed=1, size=step * 1e-5), seed=step, size=2e-3)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "base", llama_tensors())
    for step in STEPS:
        write_checkpoint(tmp_path / f"checkpoint-{step}", weights(step), shards=2)
    return tmp_path


def paths(*steps):
    return [f"checkpoint-{step}" for step in steps or STEPS]


@pytest.fixture
def computed(monkeypatch):
    """How many matrices were decomposed."""
    counts = []
    plain = streams.decompose_indexed
    from spectra.results import resume

    def counting(deltas, **options):
        counts.append(len(deltas))
        return plain(deltas, **options)

    monkeypatch.setattr(streams, "decompose_indexed", counting)
    monkeypatch.setattr(resume, "decompose_indexed", counting)
    return counts


def update(step, name=NAME):
    return (weights(step)[name].double() - llama_tensors()[name].double()).numpy()


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_column_is_its_definition(run, side):
    k = 4
    table = spectra.series(paths(1000, 100, 200), "base", layers="self_attn", top=k, side=side)
    assert list(dict.fromkeys(table["step"])) == list(STEPS)
    found = table[table["name"] == NAME].set_index("step")
    parts = {step: np.linalg.svd(update(step)) for step in STEPS}

    def basis(step, which):
        return parts[step][0][:, :k] if which == "left" else parts[step][2][:k].T

    for step, before in zip(STEPS, (None, 100, 200), strict=True):
        row, (_, S, _) = found.loc[step], parts[step]
        p = S / S.sum()
        assert row["norm"] == pytest.approx(np.linalg.norm(update(step)), rel=1e-12)
        assert row["stable_rank"] == pytest.approx((S**2).sum() / S[0] ** 2, rel=1e-10)
        assert row["top_1_share"] == pytest.approx(S[0] ** 2 / (S**2).sum(), rel=1e-10)
        assert row["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-8)
        phi = np.linalg.norm(basis(step, side).T @ basis(1000, side)) ** 2 / k
        assert row["phi_to_last"] == pytest.approx(phi, abs=1e-9)
        assert row["phi_to_last_chance"] == k / 16
        if before is None:
            assert np.isnan(row["phi_to_previous"])
        else:
            phi = np.linalg.norm(basis(step, side).T @ basis(before, side)) ** 2 / k
            assert row["phi_to_previous"] == pytest.approx(phi, abs=1e-9)
        for which in ("left", "right"):
            inside = ((basis(100, which).T @ basis(step, which)) ** 2).sum(0)
            share = (S[:k] ** 2 * inside).sum() / (S[:k] ** 2).sum()
            assert row[f"start_{which}"] == pytest.approx(share, abs=1e-9)
            assert row[f"start_{which}_chance"] == k / 16


def test_stored_or_not_the_numbers_are_the_same_and_only_what_is_new_is_decomposed(run, computed):
    plain = spectra.series(paths(), "base", layers="q_proj", top=4)
    computed.clear()
    first = spectra.series(paths(100, 1000), "base", layers="q_proj", top=4, out="kept")
    assert computed == [2, 2]
    assert set(first["step"]) == {100, 1000}
    again = spectra.series(paths(), "base", layers="q_proj", top=4, out="kept")
    assert computed == [2, 2, 2], "two matrices of step 200 alone"
    pd.testing.assert_frame_equal(again.drop(columns="checkpoint"), plain.drop(columns="checkpoint"), check_exact=False)
    stored = spectra.series(out="kept", top=4)
    assert computed == [2, 2, 2]
    pd.testing.assert_frame_equal(stored.drop(columns="checkpoint"), again.drop(columns="checkpoint"))
    assert len(pd.read_csv("kept/series.csv")) == len(again)
    assert len(spectra.load(step_folder(run / "kept", 200))) == 2, "each step is a results directory"


def test_a_new_last_checkpoint_changes_phi_to_last_without_reading_the_others(run, computed):
    spectra.series(paths(100, 200), "base", layers="q_proj", top=4, out="kept")
    for step in (100, 200):
        shutil.rmtree(run / f"checkpoint-{step}")  # save_total_limit
    computed.clear()
    found = spectra.series(paths(1000), "base", layers="q_proj", top=4, out="kept")
    assert computed == [2]
    assert list(dict.fromkeys(found["step"])) == list(STEPS)
    for step in (100, 200):
        write_checkpoint(run / f"checkpoint-{step}", weights(step), shards=2)
    plain = spectra.series(paths(), "base", layers="q_proj", top=4)
    for column in ("phi_to_last", "phi_to_previous", "start_left"):
        np.testing.assert_allclose(found[column], plain[column], rtol=1e-6)


def test_a_checkpoint_that_cannot_be_read_is_one_row_and_the_others_go_on(run):
    for file in (run / "checkpoint-1000").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    (run / "checkpoint-50").mkdir()
    table = spectra.series([*paths(), "checkpoint-50"], "base", layers="q_proj", top=4)
    failed = table[table["status"] == "unreadable"].set_index("step")
    assert list(failed.index) == [50, 1000]
    assert list(failed["name"]) == ["", ""]
    assert "holds no weights" in failed.loc[50, "reason"]
    assert "truncated" in failed.loc[1000, "reason"]
    done = table[table["status"] == "ok"]
    assert list(done[done["name"] == NAME]["step"]) == [100, 200]
    assert list(done[done["step"] == 200]["phi_to_last"]) == pytest.approx([1.0, 1.0])


def test_if_none_can_be_read_the_error_is_the_first_ones(run):
    with pytest.raises(BaseRequiredError, match="checkpoint-100"):
        spectra.series(paths())
    with pytest.raises(SelectionError, match="matches none"):
        spectra.series(paths(), "base", layers="nothing")
    for step in STEPS:
        for file in run.glob(f"checkpoint-{step}/*.safetensors"):
            file.write_bytes(b"")
    with pytest.raises(SourceError):
        spectra.series(paths(), "base")


def test_a_matrix_that_cannot_be_done_has_its_status(run):
    tensors = weights(200)
    tensors[NAME][0, 0] = float("nan")
    shutil.rmtree(run / "checkpoint-200")
    write_checkpoint(run / "checkpoint-200", tensors)
    shutil.rmtree(run / "checkpoint-100")
    write_checkpoint(run / "checkpoint-100", llama_tensors())
    table = spectra.series(paths(), "base", layers="q_proj", top=4)
    of_name = table[table["name"] == NAME].set_index("step")
    assert list(of_name["status"]) == ["unchanged", "nonfinite", "ok"]
    assert of_name["phi_to_last"].isna().tolist() == [True, True, False]
    assert of_name.loc[1000, "start_left"] == pytest.approx(1.0), "the first checkpoint that has directions"
    rows = by_role(table.replace({np.nan: None}).to_dict("records"))
    assert [(row["step"], row["matrices"]) for row in rows] == [(200, 1), (1000, 2)]


def lora(folder, A, B, step):
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{prefix}.lora_A.weight": A.contiguous(), f"{prefix}.lora_B.weight": B.contiguous()}
    write_adapter(folder, tensors, {"peft_type": "LORA", "r": A.shape[0], "lora_alpha": A.shape[0]})
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def test_an_adapters_start_is_what_its_factors_span_before_training(run):
    torch.manual_seed(0)
    A, moved = torch.randn(3, 16), torch.randn(3, 16)
    B = torch.randn(16, 3)
    lora(run / "start", A, torch.zeros(16, 3), 0)
    lora(run / "a", A, 0.1 * B, 10)
    lora(run / "b", A + 0.5 * moved, B, 20)
    P = np.linalg.pinv(A.double().numpy()) @ A.double().numpy()
    delta = (B.double() @ (A + 0.5 * moved).double()).numpy()
    wanted = np.linalg.norm(delta @ P) ** 2 / np.linalg.norm(delta) ** 2
    for options in ({"start": "start"}, {}):
        folders = ["b", "a"] if options else ["b", "start", "a"]
        found = spectra.series(folders, **options).set_index("step")
        assert found.loc[20, "start_right"] == pytest.approx(wanted, rel=1e-9)
        assert found.loc[10, "start_right"] == pytest.approx(1.0)
        assert found.loc[20, "start_right_chance"] == 3 / 16
        assert found.loc[20, "start_left"] == pytest.approx(1.0), "B's span at its first checkpoint"
    assert found.loc[0, "status"] == "unchanged"
    with pytest.raises(SelectionError, match=r"holds no factors: start= \(--start\)"):
        spectra.series(["checkpoint-100"], "base", start="checkpoint-200", layers="q_proj")


def test_a_start_that_is_no_longer_there_is_kept_and_never_replaced_by_a_later_one(run):
    torch.manual_seed(0)
    for step in (10, 20):
        lora(run / f"l{step}", torch.randn(3, 16), torch.randn(16, 3), step)
    first = spectra.series(["l10"], top=2, out="kept")
    shutil.rmtree(run / "l10")
    found = spectra.series(["l20"], top=2, out="kept").set_index("step")
    assert first["start_right"][0] == pytest.approx(1.0)
    assert found.loc[20, "start_right"] < 0.9
    shutil.rmtree(run / "kept/start")
    found = spectra.series(["l20"], top=2, out="kept").set_index("step")
    assert np.isnan(found["start_right"].astype(float)).all(), "of rank 3 two directions are stored, which do not tell"


def test_a_directory_of_something_else_or_of_another_base_is_refused(run):
    source = spectra.open_source("checkpoint-100", "base").select("q_proj")
    spectra.decompose(source, out="svd").collect()
    with pytest.raises(StoreError, match="results of another command"):
        spectra.series(paths(), "base", layers="q_proj", out="svd")
    spectra.series(paths(100, 200), "base", layers="q_proj", out="kept")
    write_checkpoint(run / "other", llama_tensors(seed=5))
    with pytest.raises(StoreError, match="different: base"):
        spectra.series(paths(1000), "other", layers="q_proj", out="kept")
    shutil.copytree(run / "checkpoint-100", run / "another" / "checkpoint-200")
    with pytest.raises(StoreError, match="other inputs"):
        spectra.series(["another/checkpoint-200"], "base", layers="q_proj", out="kept")
    file = run / "base/model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(StoreError, match=r"is not as it was when step 100 was stored"):
        spectra.series(paths(1000), "base", layers="q_proj", out="kept")


def test_what_is_damaged_is_said_and_made_anew(run):
    right = spectra.series(paths(), "base", layers="q_proj", top=3, out="out")
    (run / "out" / "run.json").write_text("{")
    (run / "out" / "checkpoints" / "step-200" / "run.json").write_text("[]")
    file = sorted((run / "out" / "checkpoints" / "step-1000" / "spectra").iterdir())[0]
    file.write_bytes(file.read_bytes()[:-1])
    notes: list[str] = []
    again = pd.DataFrame(list(series_rows(paths(), "base", layers="q_proj", top=3, out="out", notes=notes)))
    pd.testing.assert_frame_equal(again, right)
    assert sum("run.json was damaged" in line for line in notes) == 2
    assert sum(file.name in line for line in notes) == 1
    shown = CliRunner().invoke(
        main, ["series", *paths(), "--base", "base", "--layer", "q_proj", "--top", "3", "--out", "out"]
    )
    assert "damaged" not in shown.stderr
    file.write_bytes(file.read_bytes()[:-1])
    shown = CliRunner().invoke(
        main, ["series", *paths(), "--base", "base", "--layer", "q_proj", "--top", "3", "--out", "out"]
    )
    assert "warning: computed again" in shown.stderr


@pytest.mark.parametrize("origin", [1e-320, [], ["step 100", False], ["step 100", 1, 3], [None, False, 3]])
def test_a_basis_of_the_start_that_does_not_say_what_it_is_of_is_taken_anew(run, origin):
    right = spectra.series(paths(), "base", layers="q_proj", top=3, out="out")
    start = Shelf(run / "out" / "start")
    arrays, origins = start.get(NAME)
    start.put(NAME, arrays, origins | {"right": origin})
    pd.testing.assert_frame_equal(spectra.series(paths(), "base", layers="q_proj", top=3, out="out"), right)
    assert start.get(NAME)[1] == origins


def test_fewer_directions_than_asked_for_are_said(run):
    spectra.series(paths(), "base", layers="q_proj", top=3, out="kept")
    found = spectra.series(out="kept", top=5)
    assert set(found["k"]) == {3}
    assert set(found["phi_to_last_chance"]) == {3 / 16}
    assert all("φ to last: k clamped from 5 to 3" in note for note in found["note"])
    plain = spectra.series(out="kept", top=2)
    assert set(plain["k"]) == {2}
    assert set(plain["note"]) == {""}


def test_nothing_to_do_is_said(run):
    with pytest.raises(SelectionError, match="none was given"):
        spectra.series([])
    with pytest.raises(SelectionError, match="top = 0"):
        spectra.series(paths(), "base", top=0)
    with pytest.raises(SelectionError, match="side='up'"):
        spectra.series(paths(), "base", side="up")


def test_at_most_three_checkpoints_are_in_memory(run, monkeypatch):
    """Spectra of a checkpoint are let go when the one after the next comes."""
    import gc
    import weakref

    from spectra.results import series as module

    alive: list[weakref.ref] = []
    most = []
    plain = module.decompose

    def watched(*args, **options):
        made = plain(*args, **options)
        collect = made.collect

        def keep():
            found = collect()
            alive.append(weakref.ref(found))
            gc.collect()
            most.append(sum(ref() is not None for ref in alive))
            return found

        made.collect = keep
        return made

    monkeypatch.setattr(module, "decompose", watched)
    for step in range(1, 8):
        write_checkpoint(run / f"checkpoint-{step}", weights(step))
    spectra.series(paths(*range(1, 8)), "base", layers="q_proj")
    assert len(most) == 7
    assert max(most) <= 3
