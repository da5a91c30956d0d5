"""The decision rule of the long experiment, case by case, and that the page states the same one."""

from __future__ import annotations

import pandas as pd
import pytest
from reproduce.tiny import ROOT

from spectra.reproduce.long import rule
from spectra.reproduce.long.rule import Verdict, judge, overall


def table(**own):
    columns = {"loss": 0.30, "drift_A": 2.0, "rank_90": 4.0, "learned_rank_90": 4.0}
    rows = [{"run": "lora", **columns}, {"run": "lora-2", **columns, "rank_90": 6.0, "learned_rank_90": 6.0}]
    return pd.DataFrame([*rows, {"run": "multilora", **columns, **own}]).assign(step=6400)


@pytest.mark.parametrize(
    ("own", "word"),
    [
        ({"rank_90": 6.25}, "transient"),  # LoRA's mean is 5
        ({"rank_90": 3.0}, "transient"),
        ({"rank_90": 6.3}, "between"),
        ({"rank_90": 10.0, "learned_rank_90": 10.0}, "genuine"),
        ({"rank_90": 10.0, "learned_rank_90": 9.9}, "between"),
        ({"rank_90": 9.9, "learned_rank_90": 30.0}, "between"),
        ({"drift_A": 0.99}, "not to be judged"),
        ({"drift_A": 1.0}, "transient"),
        ({"loss": 0.401}, "not to be judged"),
        ({"loss": 0.199}, "not to be judged"),
        ({"loss": 0.21}, "transient"),
    ],
)
def test_each_case_of_the_rule(own, word):
    assert judge(table(**own), "multilora", 6400).word == word


def test_what_has_not_come_to_the_step_is_not_judged():
    summary = table()
    assert judge(summary, "multilora-2", 6400).reason == "multilora-2 has not come to this step."
    assert judge(summary[summary["run"] == "multilora"], "multilora", 6400).reason == "lora has not come to this step."
    assert judge(summary, "multilora", 50).word == "not to be judged"


def test_one_run_of_lora_is_enough():
    assert judge(table(rank_90=5.1).query("run != 'lora-2'"), "multilora", 6400).word == "between"


def test_repetitions_that_disagree_lie_between_and_the_high_rate_does_not_decide():
    words = {"multilora": "transient", "multilora-2": "transient", "multilora-fast": "genuine"}
    made = [Verdict(run, 6400, word, "") for run, word in words.items()]
    assert overall(made, 6400) == "transient"
    made[1] = Verdict("multilora-2", 6400, "genuine", "")
    assert overall(made, 6400) == "between"
    assert overall([Verdict("multilora", 6400, "not to be judged", "")], 6400) == "not to be judged"


def test_what_is_judged_before_the_last_step_decides_nothing():
    early = Verdict("multilora-2", 400, "between", "")
    assert overall([early], 6400) == "not to be judged"
    assert overall([Verdict("multilora", 6400, "transient", ""), early], 6400) == "transient"


def test_the_page_states_the_thresholds_of_the_code():
    page = (ROOT / "docs" / "long-training.md").read_text()
    section = page.partition("## The rule")[2].partition("\n## ")[0]
    assert f"drift is at least {rule.DRIFT:g}" in section
    assert f"within {rule.LOSSES:g} nats" in section
    assert f"at most {rule.TRANSIENT:g} times LoRA's" in section
    assert rule.GENUINE == 2
    assert "at least twice LoRA's" in section
