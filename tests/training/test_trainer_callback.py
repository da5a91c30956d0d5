"""`WatchSpectra` in a real Trainer: what reaches its log and its reporters, and what training is like with it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from support.peft_oracle import save_model, tiny_model

import spectra
from spectra.training import WatchSpectra
from spectra.training.config import AdapterError

TARGETS = ["q_proj", "v_proj"]


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.randint(0, 40, (5,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Reporter(transformers.TrainerCallback):
    """What TensorBoard and the like get to see."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **others):
        self.seen.append((state.global_step, set(logs)))

    def steps(self, word):
        return [step for step, keys in self.seen if any(word in key for key in keys)]


def adapted():
    return peft.get_peft_model(tiny_model("llama").float(), peft.LoraConfig(r=4, target_modules=TARGETS))


def trainer_for(model, folder, *callbacks, **options):
    settings = {
        "max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "logging_steps": 2, "save_steps": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **settings | options)
    return transformers.Trainer(model, arguments, train_dataset=Tokens(), callbacks=list(callbacks))


def watching(**options):
    return WatchSpectra(**{"every": 4, "max_share": 1.0, "top": 3} | options)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_numbers_reach_the_log_and_the_reporters_beside_the_loss(tmp_path, precision):
    reporter = Reporter()
    trainer = trainer_for(adapted(), tmp_path, reporter, **precision)
    watching().attach(trainer)
    trainer.train()
    assert reporter.steps("spectra/q_proj/stable_rank") == [4, 8], "every fourth step of the optimizer"
    assert reporter.steps("spectra/share") == [4, 8]
    assert [step for step, keys in reporter.seen if "loss" in keys] == [2, 4, 6, 8], "no loss is lost"
    state = json.loads((tmp_path / "checkpoint-8/trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "spectra/v_proj/norm" in line] == [4, 8]


def test_the_stored_run_is_what_series_makes_of_the_trainers_checkpoints(tmp_path):
    trainer = trainer_for(adapted(), tmp_path)
    trainer.model.save_pretrained(tmp_path / "start")
    watching().attach(trainer)
    trainer.train()
    live = spectra.series(out=tmp_path / "spectra", top=3)
    files = spectra.series([tmp_path / "checkpoint-8", tmp_path / "checkpoint-4"], top=3, start=tmp_path / "start")
    assert (tmp_path / "spectra/series.csv").is_file()
    for column in ("step", "norm", "stable_rank", "phi_to_last", "start_left", "start_right"):
        np.testing.assert_allclose(live[column].astype(float), files[column].astype(float), rtol=1e-6, err_msg=column)
    drawn = spectra.draw_results(tmp_path / "spectra")
    assert {path.name for path in drawn.files} == {"series.png", "series.pdf", "series_curves.csv"}


def test_full_fine_tuning_is_watched_against_the_weights_at_the_start(tmp_path):
    model = tiny_model("llama").float()
    save_model(tmp_path / "base", model)
    trainer = trainer_for(model, tmp_path / "run")
    watching(matrices="v_proj", out=tmp_path / "kept").attach(trainer)
    trainer.train()
    live = spectra.series(out=tmp_path / "kept", top=3)
    checkpoints = [tmp_path / f"run/checkpoint-{step}" for step in (4, 8)]
    files = spectra.series(checkpoints, tmp_path / "base", layers="v_proj", top=3)
    for column in ("step", "norm", "effective_rank", "phi_to_last", "start_right"):
        np.testing.assert_allclose(live[column].astype(float), files[column].astype(float), rtol=1e-6, err_msg=column)


def test_given_as_a_callback_alone_the_numbers_are_in_the_log_history(tmp_path):
    reporter = Reporter()
    trainer = trainer_for(adapted(), tmp_path, reporter, watching())
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "spectra/q_proj/norm" in line] == [4, 8]
    assert reporter.steps("spectra") == []
    assert len(spectra.series(out=tmp_path / "spectra")) == 8


def test_training_is_the_same_with_and_without(tmp_path):
    ends = []
    for name in ("plain", "watched"):
        transformers.set_seed(1)
        trainer = trainer_for(adapted(), tmp_path / name)
        if name == "watched":
            watching(every=1).attach(trainer)
        trainer.train()
        ends.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_a_run_goes_on_from_a_checkpoint(tmp_path):
    trainer = trainer_for(adapted(), tmp_path)
    watching(every=2).attach(trainer)
    trainer.train()
    again = trainer_for(adapted(), tmp_path)
    watching(every=2).attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    table = spectra.series(out=tmp_path / "spectra", top=3)
    assert list(dict.fromkeys(table["step"])) == [2, 4, 6, 8]
    assert table["start_right"].notna().all()
    full = trainer_for(tiny_model("llama").float(), tmp_path / "full")
    full.train()
    more = trainer_for(tiny_model("llama").float(), tmp_path / "full", max_steps=10)
    watching(matrices="v_proj").attach(more)
    with pytest.raises(AdapterError, match="no longer as it was at the start"):
        more.train(resume_from_checkpoint=True)


def test_a_fault_while_training_goes_on_is_a_warning(tmp_path):
    trainer = trainer_for(adapted(), tmp_path)
    callback = watching(every=2, out=tmp_path / "kept").attach(trainer)

    class Breaks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            if state.global_step == 3:
                (tmp_path / "kept/checkpoints/step-4").write_text("a file is in the way")

    trainer.add_callback(Breaks())
    with pytest.warns(UserWarning, match="no longer watched from step 4 on: .*step-4"):
        trainer.train()
    assert trainer.state.global_step == 8
    assert callback.watch is None


def test_a_missing_transformers_is_answered_with_the_install_command():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import spectra.adapters, spectra.training\n"
        "try: spectra.training.WatchSpectra\n"
        "except spectra.SpectraError as problem: print(problem)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "WatchSpectra needs an optional dependency: pip install 'weight-spectra[training]'"


def test_options_are_checked_where_they_are_given():
    with pytest.raises(AdapterError, match="every = 0"):
        WatchSpectra(every=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WatchSpectra()
