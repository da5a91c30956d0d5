"""The device path, run on the CPU: same numbers as one by one, memory that runs out, members that fail."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from threading import Event

import pytest
import torch
from support.spectra_kinds import KINDS, matrix_of, slow_deltas

from spectra.deltas.delta import WeightDelta
from spectra.engine.costs import needed
from spectra.engine.devices import Cpu, device_named
from spectra.engine.executors import device as batch_module
from spectra.engine.executors.device import decompose_batches
from spectra.engine.schedule import Batch, batches, plan
from spectra.engine.solve import Wanted, solve
from spectra.engine.solvers import dense
from spectra.errors import SourceError


def _run(deltas, top=0, only_top=False, most=64):
    groups = batches(deltas, plan(deltas, 2**30), most)
    return dict(decompose_batches(deltas, groups, Wanted(top, only_top, together=True)))


def _mixed():
    deltas = [WeightDelta.from_tensor(kind, matrix_of(kind, 24, 30)) for kind in KINDS]
    deltas += [
        WeightDelta.from_factors(f"f{i}", matrix_of("power", 24, 3, i), matrix_of("power", 3, 30, i)) for i in range(3)
    ]
    deltas += [WeightDelta.refused("r", (3, 3), "unsupported", "why")]
    return deltas


@pytest.mark.parametrize(("top", "only_top"), [(0, False), (4, False), (4, True)])
@pytest.mark.parametrize("most", [64, 3])
def test_equals_one_by_one(top, only_top, most):
    deltas = _mixed()
    found = _run(deltas, top, only_top, most)
    assert sorted(found) == list(range(len(deltas)))
    for i, delta in enumerate(deltas):
        alone = solve(delta, top=top or None, only_top=only_top)
        assert (found[i].name, found[i].status, found[i].k) == (alone.name, alone.status, alone.k)
        assert found[i].method == alone.method
        assert pytest.approx(alone.S, abs=1e-7 * max(alone.S, default=0)) == found[i].S


def test_memory_that_runs_out_halves_the_batch_and_says_so(monkeypatch):
    right = dense.gram_values

    def small(matrix):
        if matrix.dim() == 3 and len(matrix) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(matrix)

    monkeypatch.setattr(dense, "gram_values", small)
    deltas = [WeightDelta.from_tensor(str(i), matrix_of("gaussian", 10, 8, i)) for i in range(6)]
    found = _run(deltas)
    assert {spectrum.status for spectrum in found.values()} == {"ok"}
    assert "batch of 6 halved for want of memory; then gram-eigvals-f64" in found[0].method


def test_one_that_does_not_fit_alone_is_too_large(monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dense, "gram_values", never)
    monkeypatch.setattr(dense, "svd_values", never)
    found = _run([WeightDelta.from_tensor("a", matrix_of("gaussian", 10, 8))])
    assert found[0].status == "too_large"


def test_a_failed_check_sends_only_that_matrix_down_the_ladder(monkeypatch):
    right = dense.gram_values

    def lying(matrix):
        values = right(matrix)
        if matrix.dim() == 3:
            values[1] *= 1.1
        return values

    monkeypatch.setattr(dense, "gram_values", lying)
    found = _run([WeightDelta.from_tensor(str(i), matrix_of("gaussian", 10, 8, i)) for i in range(3)])
    assert found[0].method == found[2].method == "gram-eigvals-f64"
    assert found[1].method.startswith("gram-eigvals-f64 rejected")
    assert found[1].method.endswith("svd-f64")


def test_a_batch_that_fails_to_converge_is_done_one_by_one(monkeypatch):
    right = dense.gram_values

    def picky(matrix):
        if matrix.dim() == 3:
            raise torch.linalg.LinAlgError("item 1 did not converge")
        return right(matrix)

    monkeypatch.setattr(dense, "gram_values", picky)
    found = _run([WeightDelta.from_tensor(str(i), matrix_of("gaussian", 10, 8, i)) for i in range(3)])
    assert {spectrum.status for spectrum in found.values()} == {"ok"}


def _gaussians(count):
    return [WeightDelta.from_tensor(str(i), matrix_of("gaussian", 10, 8, i)) for i in range(count)]


def test_the_next_batch_is_read_while_one_computes(monkeypatch):
    read, solve_forms = batch_module.read_batch, batch_module.solve_forms
    second = Event()
    seen = []

    def reading(members, *rest):
        if members[0].name != "0":
            second.set()
        return read(members, *rest)

    def solving(members, *rest):
        if members[0].name == "0":
            seen.append(second.wait(20))  # it comes although nothing is solved yet
        return solve_forms(members, *rest)

    monkeypatch.setattr(batch_module, "read_batch", reading)
    monkeypatch.setattr(batch_module, "solve_forms", solving)
    assert len(_run(_gaussians(3), most=1)) == 3
    assert seen == [True]


def test_no_more_than_two_batches_are_there_and_one_if_two_do_not_fit(monkeypatch):
    deltas = _gaussians(4)
    need = needed(deltas[0], None)
    read, solve_forms = batch_module.read_batch, batch_module.solve_forms
    for budget, most in ((4 * need, 2), (int(1.5 * need), 1)):
        there, held = [], []
        monkeypatch.setattr(batch_module, "read_batch", lambda *a, there=there: there.append(1) or read(*a))
        groups = batches(deltas, plan(deltas, budget), most=1)
        assert [group.ahead for group in groups[1:]] == [most == 2] * 3

        def solving(*a, there=there, held=held):
            time.sleep(0.05)  # the reader gets its chance
            held.append(len(there))
            there.pop()
            return solve_forms(*a)

        monkeypatch.setattr(batch_module, "solve_forms", solving)
        assert len(dict(decompose_batches(deltas, groups, Wanted(together=True)))) == 4
        assert max(held) == most


def test_an_error_of_our_own_in_the_reader_surfaces(monkeypatch):
    deltas = _gaussians(3)
    monkeypatch.setattr(type(deltas[0].recipe), "read", lambda *_: [][1])
    with pytest.raises(IndexError):
        _run(deltas, most=1)
    assert _readers() == []


def test_what_cannot_be_read_has_a_status_and_the_rest_is_done(monkeypatch):
    deltas = _gaussians(3)
    right = type(deltas[0].recipe).read

    def reading(recipe, device):
        if recipe is deltas[1].recipe:
            raise SourceError("gone")
        return right(recipe, device)

    monkeypatch.setattr(type(deltas[0].recipe), "read", reading)
    found = _run(deltas, most=1)
    assert [found[i].status for i in range(3)] == ["ok", "unreadable", "ok"]


def _readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("spectra-read")]


def test_a_run_that_is_given_up_leaves_no_thread_and_reads_no_further():
    deltas = slow_deltas(9, delay=0.2)
    schedule = plan(deltas, 2**30)
    first, rest = Batch(schedule.tasks[:1]), Batch(schedule.tasks[1:])
    run = decompose_batches(deltas, [first, rest], Wanted(together=True))
    next(run)
    start = time.perf_counter()
    run.close()
    assert time.perf_counter() - start < 1.2  # all eight would take 1.6 s
    assert _readers() == []


class _SlowAtDouble(Cpu):
    """A device that is none of torch's: all that the device path asks of one is these few methods."""

    remark = "float64 is slow here"


def test_a_device_that_is_slow_at_float64_is_named_in_every_result():
    deltas = _mixed()
    wanted = Wanted(2, device=_SlowAtDouble("cpu"), together=True)
    found = dict(decompose_batches(deltas, batches(deltas, plan(deltas, 2**30)), wanted))
    for spectrum in found.values():
        assert spectrum.method.endswith("; float64 is slow here") == bool(spectrum.method)
    assert found[0].method == "gram-eigh-f64; float64 is slow here"


class _FakeCuda:
    """What the device path asks of torch.cuda, on a machine without it."""

    def __init__(self):
        self.log = []

    def synchronize(self, device):
        self.log.append(f"synchronize {device}")

    def get_device_capability(self, device):
        return (8, 6)

    def Stream(self, device):  # noqa: N802
        return self

    def current_stream(self, device):
        return "main"

    def stream(self, stream):
        self.log.append("enter")
        return nullcontext()


def test_on_a_card_the_reader_has_a_stream_of_its_own_and_waits_for_it(monkeypatch):
    cuda, handed = _FakeCuda(), []
    cuda.synchronize = lambda device=None: cuda.log.append(f"synchronize {device or 'stream'}")
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: handed.append((tensor.shape, stream)))
    deltas = _gaussians(2)
    right = type(deltas[0].recipe).read
    monkeypatch.setattr(type(deltas[0].recipe), "read", lambda recipe, _: cuda.log.append("read") or right(recipe))
    groups = batches(deltas, plan(deltas, 2**30), most=1)
    found = dict(decompose_batches(deltas, groups, Wanted(device=device_named("cuda:0"), together=True)))
    assert cuda.log[:4] == ["synchronize cuda:0", "enter", "read", "synchronize stream"]
    assert cuda.log.count("read") == cuda.log.count("synchronize stream") == 2
    assert handed == [(torch.Size([10, 8]), "main")] * 2
    assert found[0].method == "gram-eigvals-f64; float64 on a card that is slow at it (compute capability 8.6)"
