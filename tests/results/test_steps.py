"""At which step a checkpoint was saved: the trainer's state, names, and what is refused."""

from __future__ import annotations

import json

import pytest

from spectra.errors import SelectionError
from spectra.results.steps import in_order


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("run/checkpoint-500", 500),
        ("run/ckpt_20", 20),
        ("global_step1200", 1200),
        ("run/step-00000500.safetensors", 500),
        ("my-lora-000007.safetensors", 7),
        ("EleutherAI/pythia-70m@step1000", 1000),
        ("run/checkpoint-40/adapter", 40),
        ("adapters/0000100_adapters.safetensors", 100),
        ("run/iter_300", 300),
        ("epoch_3", 3),
        ("12", 12),
    ],
)
def test_names_say_it(name, step):
    (moment,) = in_order([name])
    assert (moment.step, moment.path) == (step, name)


@pytest.mark.parametrize("name", ["final", "llama-7b", "lora-r16", "my-model-v2", "checkpoint-last", "run-1/final"])
def test_a_name_without_a_step_is_refused_and_the_way_out_is_told(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SelectionError, match=rf"{name}: neither its name .*--step N"):
        in_order(["checkpoint-1", name])
    assert [moment.path for moment in in_order(["checkpoint-1", name], [5, 2])] == [name, "checkpoint-1"]


def test_the_trainers_state_counts_before_the_name(tmp_path):
    for name, step in (("b", 30), ("checkpoint-10", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-25").mkdir()
    found = in_order([tmp_path / "b", tmp_path / "checkpoint-25", tmp_path / "checkpoint-10"])
    assert [moment.step for moment in found] == [20, 25, 30]
    said = f"{tmp_path / 'checkpoint-10'} is of step 20 by its trainer_state.json, which counts, and of 10 by its name"
    assert [moment.note for moment in found] == [said, "", ""]
    with pytest.raises(SelectionError, match=r"both of step 20: .* each; .*checkpoint-10 is of step 20 by its trainer"):
        in_order([tmp_path / "checkpoint-10", "other/checkpoint-20"])
    (tmp_path / "b" / "trainer_state.json").write_text("{")
    with pytest.raises(SelectionError, match=r"trainer_state\.json is damaged"):
        in_order([tmp_path / "b"])


def test_the_folder_of_a_run_is_answered_with_its_checkpoints(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10", "spectra"):
        (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(
        SelectionError, match=r"run is no checkpoint, but holds 2, such as checkpoint-5: give those \(.*"
    ):
        in_order([tmp_path / "run"])


def test_numbers_are_sorted_as_numbers():
    assert [moment.step for moment in in_order(["c-1000", "c-9", "c-200"])] == [9, 200, 1000]


def test_two_of_one_step_two_units_and_wrong_counts_are_refused():
    with pytest.raises(SelectionError, match="a/checkpoint-5 and b/checkpoint-5 are both of step 5"):
        in_order(["a/checkpoint-5", "b/checkpoint-5"])
    with pytest.raises(SelectionError, match="epoch-1 counts epochs and checkpoint-5 counts steps"):
        in_order(["epoch-1", "checkpoint-5"])
    with pytest.raises(SelectionError, match="1 steps for 2 checkpoints"):
        in_order(["a", "b"], [1])
    with pytest.raises(SelectionError, match="whole numbers"):
        in_order(["a", "b"], [1, -2])
