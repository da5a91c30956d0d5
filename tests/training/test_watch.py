"""`Watch` in a plain loop: what it measures, what it leaves alone, what it costs, and what it keeps."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from support.peft_oracle import save_model, tiny_model
from torch import nn
from training.adapted import CONFIGS, config_for, tokens

import spectra
from spectra.errors import SelectionError, StoreError
from spectra.training import Watch, merge_adapter, save_adapter
from spectra.training import watch as module
from spectra.training.config import AdapterError

TARGETS = ["q_proj", "v_proj"]


def peft_model(kind="llama", dtype=torch.float64, **options):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options)
    return peft.get_peft_model(tiny_model(kind).to(dtype), config)


def steps(model, watch=None, count=6, begin=0, lr=0.05):
    """Training: some steps on a few tokens, the watch called after each."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    found = {}
    for step in range(begin + 1, begin + count + 1):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            found[step] = watch(step)
    return {step: values for step, values in found.items() if values}


def watching(model, **options):
    return Watch(model, **{"every": 2, "max_share": 1.0, "top": 3} | options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_full_fine_tunes_numbers_are_those_of_its_files(tmp_path, kind):
    model = tiny_model(kind)
    save_model(tmp_path / "base", model)
    matrices = ["mlp"] if kind == "gpt2" else ["q_proj"]
    watch = watching(model, matrices=matrices, out=tmp_path / "watched")
    assert list(steps(model, watch)) == [2, 4, 6]
    save_model(tmp_path / "checkpoint-6", model)
    source = spectra.open_source(tmp_path / "checkpoint-6", tmp_path / "base", split=False).select(matrices)
    assert set(watch.names) == {delta.name for delta in source}
    kept = spectra.load(tmp_path / "watched/checkpoints/step-6")
    for spectrum in spectra.decompose(source, top=3):
        np.testing.assert_allclose(kept[spectrum.name].S, spectrum.S, rtol=1e-9, atol=1e-12)
        assert kept[spectrum.name].shape == spectrum.shape


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3}, {"init_lora_weights": "gaussian"}])
def test_an_adapters_numbers_are_those_of_its_files(tmp_path, options):
    model = peft_model(**options)
    model.save_pretrained(tmp_path / "checkpoint-0")
    watch = watching(model, out=tmp_path / "watched")
    for step in (2, 4):
        steps(model, watch, count=2, begin=step - 2)
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    watch.close()
    live = spectra.series(out=tmp_path / "watched", top=3).set_index(["step", "name"])
    files = [tmp_path / f"checkpoint-{step}" for step in (0, 2, 4)]
    stored = spectra.series(files, top=3).set_index(["step", "name"])
    assert set(live.index) == {index for index in stored.index if index[0]}
    for column in ("norm", "stable_rank", "effective_rank", "phi_to_last", "start_left", "start_right"):
        wanted = stored.loc[live.index, column].astype(float)
        np.testing.assert_allclose(live[column].astype(float), wanted, rtol=1e-5, err_msg=column)  # files are float32


@pytest.mark.parametrize("name", CONFIGS)
def test_our_own_adapters_are_watched_by_their_factors(tmp_path, name):
    from spectra.training import inject_adapter

    model = inject_adapter(tiny_model("llama"), config_for(name))
    save_adapter(model, tmp_path / "checkpoint-0")
    routed = getattr(CONFIGS[name], "use_router", False) or name == "hydralora"
    heads = "mean" if routed else None
    watch = watching(model, heads=heads, out=tmp_path / "watched")
    steps(model, watch, count=2)
    save_adapter(model, tmp_path / "checkpoint-2")
    kept = spectra.load(tmp_path / "watched/checkpoints/step-2")
    for spectrum in spectra.decompose(spectra.open_source(tmp_path / "checkpoint-2")):
        np.testing.assert_allclose(kept[spectrum.name].norm, spectrum.norm, rtol=1e-9)
        assert kept[spectrum.name].note == ""


@pytest.mark.parametrize("start", [False, "pissa"])
def test_an_adapter_that_does_not_start_at_zero_is_measured_from_where_it_starts(start):
    model = peft_model(init_lora_weights=start, dtype=torch.float32)
    watch = watching(model)
    assert all(value < 1e-12 for key, value in watch.measure(0).items() if key.endswith("norm")), (
        "ΔW = 0 but for rounding"
    )
    name, layer = watch.names[0], model.base_model.model.model.layers[0].self_attn.q_proj
    assert name == "model.layers.0.self_attn.q_proj.weight"

    def product():
        return (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()).detach() * 2

    before = product()
    steps(model, watch)
    wanted = torch.linalg.svdvals(product() - before)
    found = watch._previous[name]
    np.testing.assert_allclose(found.S, wanted[: len(found.S)], rtol=1e-8)
    assert "when the adapter was not zero" in found.note


def test_two_active_adapters_add_up():
    model = peft_model(init_lora_weights=False)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=True))
    model.base_model.set_adapter(["default", "other"])
    watch = watching(model)
    steps(model, watch)
    assert watch._previous[watch.names[0]].max_rank == 4 + 2 + 4 + 2


def test_training_is_as_it_would_be_without(tmp_path):
    ends = []
    for watched in (False, True):
        torch.manual_seed(3)
        model = peft_model(lora_dropout=0.5).train()
        steps(model, watching(model, every=1, out=tmp_path / "out") if watched else None)
        ends.append(
            {name: value.clone() for name, value in model.state_dict().items()} | {"rng": torch.get_rng_state()}
        )
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_half_precision_weights_are_compared_in_float64():
    model = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    start = model[0].weight.detach().double()
    watch = watching(model, matrices="0", every=1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model[0].weight.add_(torch.randn(8, 8))
        found = watch(1)
    assert found["spectra/0/norm"] == pytest.approx(
        float((model[0].weight.detach().double() - start).norm()), rel=1e-12
    )


def test_the_steps_after_a_compiled_or_wrapped_model_have_the_weights_own_names():
    model = nn.Sequential(nn.Linear(4, 4))
    assert watching(nn.DataParallel(model), matrices="0").names == ("0.weight",)
    assert watching(torch.compile(model), matrices="0").names == ("0.weight",)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def test_what_would_cost_too_much_is_put_off_until_it_does_not(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    plain = module._spectrum

    def slow(*given):
        clock.now += 1.0  # each matrix takes a second
        return plain(*given)

    monkeypatch.setattr(module, "_spectrum", slow)
    model = nn.Sequential(nn.Linear(4, 4))
    watch = Watch(model, every=10, matrices="0", max_share=0.05)
    measured = []
    for step in range(1, 101):
        clock.now += 1.0
        with torch.no_grad():
            model[0].weight.add_(torch.randn(4, 4))
        if watch(step):
            measured.append(step)
            assert watch.seconds <= max(1.0, 0.05 * clock.now)
    assert measured[0] == 10, "the first one shows what it costs"
    assert measured[1] == 39, "two seconds are 5 % of 40"
    assert len(measured) == 5
    assert watch.put_off > 0
    assert watch.close(100)["spectra/share"] == pytest.approx(6 / 106), "the end is always measured"


def test_without_all_values_effective_ranks_are_left_out():
    model = nn.Sequential(nn.Linear(32, 32))
    watch = watching(model, matrices="0", every=1, values=False)
    with torch.no_grad():
        model[0].weight.add_(torch.randn(32, 32))
    found = watch(1)
    assert "spectra/0/stable_rank" in found
    assert "spectra/0/effective_rank" not in found


def test_weights_that_became_nan_are_counted_and_stop_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    watch = watching(model, matrices="0", every=1, out=tmp_path / "out")
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    assert watch(1)["spectra/not_measured"] == 1.0
    watch.close()
    assert list(spectra.series(out=tmp_path / "out")["status"]) == ["nonfinite"]


def test_a_run_that_goes_on_keeps_its_start_and_undoes_later_steps(tmp_path):
    model = peft_model()
    watch = watching(model, out=tmp_path / "out")
    steps(model, watch, count=4)
    before = {name: watch._previous[name].norm for name in watch.names}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    steps(model, watch, count=2, begin=4)
    with pytest.raises(StoreError, match="holds steps of an earlier run"):
        watching(model, out=tmp_path / "out")
    model.load_state_dict(state)
    again = watching(model, out=tmp_path / "out", step=4)
    assert {path.name for path in (tmp_path / "out/checkpoints").iterdir()} == {"step-2", "step-4"}
    steps(model, again, count=4, begin=4)
    again.close()
    table = spectra.series(out=tmp_path / "out", top=3)
    assert list(dict.fromkeys(table["step"])) == [2, 4, 6, 8]
    assert table["start_right"].notna().all()
    assert dict(zip(table["name"], table[table["step"] == 4]["norm"], strict=False)) == before


def test_what_cannot_be_watched_is_refused_and_the_way_out_is_told(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(AdapterError, match=r"a copy of every watched weight is kept .*choose matrices="):
        watching(model)
    with pytest.raises(SelectionError, match="matches none"):
        watching(model, matrices="nothing")
    with pytest.raises(AdapterError, match="no longer as it was at the start"):
        watching(model, matrices="q_proj", step=5)
    with pytest.raises(AdapterError, match="DoRA"):
        watching(peft_model(use_dora=True))
    loha = peft.get_peft_model(tiny_model("llama"), peft.LoHaConfig(r=2, target_modules=TARGETS))
    with pytest.raises(AdapterError, match="PEFT's loha, and only LoRA"):
        watching(loha)
    with pytest.raises(AdapterError, match="init_lora_weights='pissa'"):
        watching(peft_model(init_lora_weights="pissa", dtype=torch.float32), step=5)
    with pytest.raises(AdapterError, match="nothing to watch"):
        watching(model.requires_grad_(False))
    with pytest.raises(AdapterError, match="max_share = 2"):
        watching(model, max_share=2)
    with pytest.raises(AdapterError, match="every = 0"):
        watching(model, every=0)
    from spectra.training import inject_adapter

    with pytest.raises(AdapterError, match="unmerge it"):
        watching(merge_adapter(inject_adapter(tiny_model("llama"), config_for("multilora"))))
    (tmp_path / "run.json").write_text('{"inputs": {"kind": "checkpoint"}}')
    with pytest.raises(StoreError, match="results of another command"):
        watching(peft_model(), out=tmp_path)
