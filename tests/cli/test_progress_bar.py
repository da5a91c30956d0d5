"""The bar tells the bytes that come from servers, also while one matrix takes long."""

from __future__ import annotations

import re
import time

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import llama_tensors, write_adapter
from torch import nn

import spectra
from spectra.adapters import RLoRAConfig, inject_adapter, save_adapter
from spectra.cli import progress
from spectra.deltas.at_work import Account, announce, at_work, in_hands, watched
from spectra.deltas.delta import WeightDelta
from spectra.engine import accounts, decompose
from spectra.engine.solvers import dense
from spectra.files import http
from spectra.results import comparison
from spectra.results.series import count_new


class Bar:
    """What tqdm does, written down."""

    disable = False

    def __init__(self):
        self.said, self.open = [], True

    def set_postfix_str(self, text, refresh):
        self.said.append(text)

    def refresh(self):
        assert self.open

    def update(self):
        pass

    def close(self):
        self.open = False


@pytest.fixture
def bar(monkeypatch):
    made = Bar()
    monkeypatch.setattr(progress, "_bar", lambda total, what: made)
    monkeypatch.setattr(progress, "_EVERY", 0.01)
    return made


def test_bytes_are_told_before_the_first_matrix_is_done(bar):
    with progress.Progress(3, "svd"):
        http.count(3 * 2**20)
        until = time.monotonic() + 20
        while not any(bar.said) and time.monotonic() < until:
            time.sleep(0.01)
        assert re.fullmatch(r"3\.0 MiB read, [0-9,.]+ MiB/s", bar.said[-1])
        told = bar.said[-1]
        time.sleep(0.1)
        assert bar.said[-1] == told, "the rate is that of the time in which bytes came"
    assert not bar.open


def test_no_bytes_are_told_where_nothing_comes_from_a_server(bar):
    with progress.Progress(3, "svd") as shown:
        shown.update()
        time.sleep(0.05)
    assert bar.said
    assert not any("MiB" in words for words in bar.said)


def large_and_small():
    return [WeightDelta.from_tensor(name, torch.eye(size)) for name, size in (("small", 8), ("large", 64))]


def test_the_matrix_at_work_is_told_while_it_is_read_and_solved(bar, monkeypatch):
    said = []
    with progress.Progress(2, "svd") as shown:

        def looked(inner):
            def wrapped(*given, **named):
                shown._tell()
                said.append(bar.said[-1])
                return inner(*given, **named)

            return wrapped

        recipe = type(large_and_small()[0].recipe)
        monkeypatch.setattr(recipe, "read", looked(recipe.read))
        monkeypatch.setattr(dense, "gram_values", looked(dense.gram_values))
        for _ in spectra.decompose(large_and_small(), executor=None):
            shown.update()
    assert {"reading large (64×64)", "solving large (64×64)"} <= {words.split(", ")[-1] for words in said}
    assert at_work() == []


def test_the_time_left_is_told_before_the_first_matrix_is_done(bar, monkeypatch):
    monkeypatch.setattr(progress, "_LONG", 0.0)
    monkeypatch.setattr(accounts, "pace", lambda top, **wanted: 1000.0)  # operations per second
    with progress.Progress(2, "svd") as shown:
        next(decompose.decompose_indexed(large_and_small()))
        account = shown._account
    assert account.pace == 1000.0
    fresh = Account(account.costs, account.total, pace=1000.0)
    assert fresh.left() == pytest.approx(account.total / 1000.0, abs=0.1)


def test_a_plan_tells_the_time_by_what_each_matrix_costs():
    account = Account({"large": 9.0, "small": 1.0}, 10.0, start=time.monotonic() - 90)
    assert account.left() is None, "nothing was measured and nothing is done"
    account.finish("large")
    assert account.left() == pytest.approx(10, abs=0.5), "by their number it would be 90"
    account.finish("a matrix of no cost")
    assert account.done == 9.0


@pytest.fixture
def plans():
    """Every plan that is announced meanwhile."""
    announced = []
    with watched(announced.append):
        yield announced


def files(folder, count=2):
    """A base and fine-tunes of it, each with a large matrix and a small one."""
    sizes = {"model.layers.0.self_attn.q_proj.weight": 48, "model.layers.0.self_attn.k_proj.weight": 12}
    torch.manual_seed(0)
    base = {name: torch.randn(size, 48) for name, size in sizes.items()}
    paths = [folder / f"{name}.safetensors" for name in ("base", *map(str, range(count)))]
    for place, path in enumerate(paths):
        save_file({name: tensor + 0.1 * place * torch.randn(tensor.shape) for name, tensor in base.items()}, path)
    return paths


def by_cost(plan):
    """Whether all of a plan is done, as it was counted before, and the large matrix was most of it."""
    large, small = sorted(plan.costs.values(), reverse=True)
    return plan.done == pytest.approx(plan.total) and large > 3 * small > 0


def test_all_pairs_are_one_plan_with_every_update_in_it(tmp_path, plans):
    base, *updates = files(tmp_path, 3)
    opened = {path.name: spectra.open_source(path, base) for path in updates}
    list(spectra.compare_all(opened, top=2))
    (plan,) = plans
    assert plan.done == pytest.approx(plan.total) == 3 * sum(plan.costs.values())


def test_waves_of_pairs_are_one_plan(tmp_path, plans, monkeypatch):
    monkeypatch.setattr(comparison, "_AT_ONCE", 2)
    base, *updates = files(tmp_path)
    list(spectra.compare(*(spectra.open_source(path, base) for path in updates), top=2))
    (plan,) = plans
    assert plan.done == pytest.approx(plan.total)


@pytest.mark.parametrize("command", [spectra.alignment, spectra.intruders])
def test_alignment_goes_by_the_cost_of_the_base(tmp_path, plans, command):
    base, tuned = files(tmp_path, 1)
    command(spectra.open_source(tuned, base), k=2)
    (plan,) = plans
    assert by_cost(plan)


def test_a_base_whose_vectors_are_kept_costs_less(tmp_path, plans):
    base, tuned = files(tmp_path, 1)
    for _ in range(2):
        spectra.alignment(spectra.open_source(tuned, base), k=2, cache=tmp_path / "kept")
    first, second = plans
    assert second.total < first.total


def test_interference_and_heads_go_by_costs(tmp_path, plans):
    base, *updates = files(tmp_path)
    spectra.interference([spectra.open_source(path, base) for path in updates])
    assert by_cost(plans.pop())
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(48, 48), "v_proj": nn.Linear(48, 4)})
    inject_adapter(model, RLoRAConfig(r=2, num_heads=3, alpha=2, target_modules=["q_proj", "v_proj"]))
    save_adapter(model, tmp_path / "heads")
    spectra.head_similarity(spectra.open_source(tmp_path / "heads", heads="each"))
    (plan,) = plans
    assert 0 < plan.done == pytest.approx(plan.total)


def test_verify_goes_by_what_is_read(tmp_path, plans):
    adapter, base = tmp_path / "lora", tmp_path / "base.safetensors"
    weights = llama_tensors(layers=1)
    save_file(weights, base)
    factors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(2, 16)}
    factors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.randn(16, 2)
    write_adapter(adapter, factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    spectra.verify_merge(base, adapter, base)
    (plan,) = plans
    assert 0 < plan.done == pytest.approx(plan.total)


@pytest.mark.parametrize("rule", [{"rank": 2}, {"energy": 0.9}, {"parameters": 150}])
def test_values_and_triplets_of_an_extraction_are_one_plan(tmp_path, plans, rule):
    base, tuned = files(tmp_path, 1)
    spectra.extract(spectra.open_source(tuned, base), tmp_path / "out", **rule)
    (plan,) = plans
    assert 0 < plan.done == pytest.approx(plan.total)


def test_a_series_tells_the_time_of_the_checkpoints_that_are_to_come(bar):
    with progress.Progress(3, "series", plans=3) as shown:
        first = announce(Account({"w": 10.0}, 10.0, start=time.monotonic() - 5))
        first.finish("w")
        assert shown._left(False) == "about 10 s left"  # two more of 5 s
        second = announce(Account({"w": 10.0}, 10.0))
        assert second.pace == pytest.approx(2.0, rel=0.1), "that of the one before"
        assert shown._left(False) == "about 10 s left"


def test_stored_checkpoints_are_not_to_come(tmp_path):
    base, *updates = files(tmp_path)
    out, steps = tmp_path / "out", (1, 2)
    assert count_new(updates, steps, out) == 2
    spectra.series(updates[:1], base, steps=steps[:1], out=out, top=1)
    assert count_new(updates, steps, out) == 1


def test_those_that_others_are_at_work_on_count_for_half():
    account = Account({"a": 1.0, "b": 1.0}, 2.0, start=time.monotonic() - 30)
    with in_hands("solving", "b", (2, 2)):
        account.finish("a")
    assert account.left() == pytest.approx(10, abs=0.5)  # 1.5 of 2 in 30 s


def test_the_pace_is_that_of_a_matrix_which_is_solved():
    assert 1e6 < accounts.pace(None, only_top=False, size=128) < 1e15


def test_what_was_read_is_in_hands_no_more_whoever_read_it():
    delta = WeightDelta.from_tensor("a", torch.eye(2))
    delta.read()
    assert at_work() == []
    with in_hands("solving", "a", (2, 2)):
        delta.read()
        assert [one.doing for one in at_work()] == ["solving"]
    with pytest.raises(KeyboardInterrupt), in_hands("reading", "a", (2, 2)):
        raise KeyboardInterrupt
    assert at_work() == []


def test_a_hostile_name_is_printed_and_a_long_one_is_cut():
    with in_hands("reading", "\x1b[31m" + "x" * 50 + "\x1b[0m", (2, 3)):
        words = progress._in_hands(at_work())
    assert "\x1b" not in words
    assert words.startswith("reading …x")
    assert words.endswith("(2×3)")


def test_a_download_of_nothing_has_no_bar(capsys):
    with progress.downloading("nothing comes"):
        pass
    assert capsys.readouterr().err == ""
