"""Configs refuse what makes no sense in one line, and survive their file."""

from __future__ import annotations

import math

import numpy as np
import pytest
from adapted import CONFIGS

from spectra import SpectraError
from spectra.training import AdapterError, MultiLoRAConfig, RLoRAConfig
from spectra.training.config import from_json, to_json

MULTI = {"r": 2, "num_modules": 3, "alpha": 4}
HEADS = {"r": 2, "num_heads": 3, "alpha": 4}
HOSTILE = [
    *[(MultiLoRAConfig, MULTI | {"r": value}) for value in (0, -1, 1.5, True, "2", None, math.nan)],
    *[(MultiLoRAConfig, MULTI | {"num_modules": value}) for value in (0, 2.0, 10**9)],
    *[(MultiLoRAConfig, MULTI | {"alpha": value}) for value in (0, -1, math.nan, math.inf, "8", True, 10**400)],
    *[(MultiLoRAConfig, MULTI | {"dropout": value}) for value in (-0.1, 1, math.nan, "0")],
    *[(MultiLoRAConfig, MULTI | {"target_modules": value}) for value in ("", [], None, [""], ["a", 3], 7, {})],
    *[(RLoRAConfig, HEADS | {"num_heads": value}) for value in (0, -2, False)],
    *[(RLoRAConfig, HEADS | {"gamma": value}) for value in (0, -1, math.inf)],
    (RLoRAConfig, HEADS | {"head_dropout": 1.0}),
    (RLoRAConfig, HEADS | {"use_router": "yes"}),
    (RLoRAConfig, HEADS | {"head_init": "ones"}),
    (RLoRAConfig, HEADS | {"init": "published"}),
    (RLoRAConfig, HEADS | {"init": "released"}),  # without a router
    (RLoRAConfig, HEADS | {"init": "released", "use_router": True, "head_init": "zero"}),
]


@pytest.mark.parametrize(("cls", "values"), HOSTILE, ids=lambda value: str(value)[:60])
def test_hostile_values_are_refused_in_one_line(cls, values):
    with pytest.raises(AdapterError) as caught:
        cls(**values)
    assert isinstance(caught.value, SpectraError)
    assert 10 < len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_configs_are_frozen_and_hashable_and_hold_plain_numbers():
    config = MultiLoRAConfig(np.int64(4), 3, np.float32(8), target_modules=["v_proj"])
    assert type(config.r) is int
    assert type(config.alpha) is float
    assert config == MultiLoRAConfig(4, 3, 8, target_modules="v_proj")
    assert len({config, config}) == 1
    with pytest.raises(AttributeError):
        config.r = 5


@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_gives_the_config_back(name):
    assert from_json(to_json(CONFIGS[name]), "here") == CONFIGS[name]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"peft_type": "LORA"}, "peft_type 'LORA' is none of"),
        ({"peft_type": ["RLORA"]}, "is none of"),
        ({"r": None}, "here: r = None"),
        ({"lora_alpha": "8"}, "alpha = '8'"),
        ({"use_rslora": True}, "use_rslora = True is nothing that MULTILORA has"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ],
)
def test_a_config_file_that_says_something_else_is_refused(change, complaint):
    with pytest.raises(AdapterError, match="here: ") as caught:
        from_json(to_json(CONFIGS["multilora"]) | change, "here")
    assert complaint in str(caught.value)


def test_fields_that_change_no_number_are_let_pass_and_missing_ones_are_named():
    values = to_json(CONFIGS["rlora"])
    assert from_json(values | {"task_type": "CAUSAL_LM", "use_rslora": False}, "here") == CONFIGS["rlora"]
    del values["num_heads"]
    with pytest.raises(AdapterError, match="num_heads is missing"):
        from_json(values, "here")


def test_whose_start_it_is_and_its_scale_are_in_the_file():
    released = RLoRAConfig(4, 3, 8, use_router=True, init="released")
    assert released.scale == 4  # α/√r
    values = to_json(released)
    assert (values["init"], values["use_rslora"]) == ("released", True)
    assert from_json(values, "here") == released
    paper = to_json(RLoRAConfig(4, 3, 8, use_router=True))
    assert (paper["init"], paper["use_rslora"]) == ("paper", False)
    del paper["init"], paper["use_rslora"]  # files that are older than the choice
    assert from_json(paper, "here").scale == 2


@pytest.mark.parametrize("change", [{"use_rslora": False}, {"init": "paper"}])
def test_a_scale_that_contradicts_the_start_is_refused(change):
    values = to_json(RLoRAConfig(4, 3, 8, use_router=True, init="released"))
    with pytest.raises(AdapterError, match=r"here: use_rslora = \w+ contradicts init = "):
        from_json(values | change, "here")


def test_another_librarys_rlora_is_refused_by_name():
    values = {"peft_type": "RLORA", "r": 4, "rlora_alpha": 8, "num_heads": 4, "init_seed": 0, "init_weights": True}
    with pytest.raises(
        AdapterError, match=r"PEFT fork's R-LoRA.*init_seed = 0; load it with the library that saved it"
    ):
        from_json(values, "here")
