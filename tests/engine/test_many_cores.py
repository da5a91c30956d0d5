"""Machines that are not at hand, and containers: who runs beside whom, on how many threads, in how much memory."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from support.torch_threads import torch_threads

from spectra.deltas.delta import WeightDelta
from spectra.engine import decompose as engine
from spectra.engine import devices, memory, quota
from spectra.engine.costs import needed
from spectra.engine.schedule import plan, side_by_side
from spectra.spectrum import Spectrum

MIXES = {
    "one": [(2048, 2048)],
    "few": [(1024, 4096)] * 3,
    "as many as LLaMA has": [(4096, 4096)] * 16 + [(11008, 4096)] * 12,
    "large and small": [(4096, 11008)] * 3 + [(384, 384)] * 200,
    "small": [(64, 48)] * 300,
}


def deltas_of(mix):
    """Of these shapes, and without their entries."""
    small = WeightDelta.from_tensor("small", torch.eye(2))
    return [replace(small, name=str(i), shape=shape) for i, shape in enumerate(MIXES[mix])]


class Watched:
    """Stands where matrices are solved: who is at it at once, with which threads and bytes.

    The first `together` wait for one another, for as long as a test has patience.
    """

    def __init__(self, top, together=1):
        self.top, self.lock, self.running = top, threading.Lock(), {}
        self.together, self.first = threading.Barrier(together), together
        self.threads, self.bytes = 0, 0

    def __call__(self, deltas, **_):
        first = deltas[0].name
        with self.lock:
            self.running[first] = torch.get_num_threads(), sum(needed(delta, self.top) for delta in deltas)
            self.threads = max(self.threads, sum(threads for threads, _ in self.running.values()))
            self.bytes = max(self.bytes, sum(bytes_there for _, bytes_there in self.running.values()))
            self.first -= 1
            waits = self.first >= 0
        if waits:
            self.together.wait(timeout=30)
        time.sleep(0.001)
        with self.lock:
            del self.running[first]
        return [Spectrum(delta.name, delta.shape, "unchanged", max_rank=0) for delta in deltas]


@pytest.fixture(params=[8, 32, 128])
def many(request):
    with torch_threads(request.param):
        yield request.param


@pytest.mark.parametrize("top", [None, 30])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("gib", [0.3, 24, 512])
def test_cores_and_bytes_are_never_given_twice(monkeypatch, many, mix, gib, top):
    deltas, budget = deltas_of(mix), int(gib * 2**30)
    fitting = [delta for delta in deltas if needed(delta, top) <= budget]
    side = min(many, len(fitting)) if gib == 512 else 1
    watched = Watched(top, side)
    monkeypatch.setattr(engine, "solve_together", watched)
    found = dict(engine.decompose_indexed(deltas, top=top, device="cpu", budget=budget))
    assert sorted(found) == list(range(len(deltas)))
    assert sum(spectrum.status == "too_large" for spectrum in found.values()) == len(deltas) - len(fitting)
    assert watched.threads <= many
    assert watched.bytes <= budget
    if gib == 512:
        assert watched.threads == side * (many // side), "all are used that can be"


@pytest.mark.parametrize("cores", [8, 32, 128])
@pytest.mark.parametrize(("mix", "beside"), [("one", 1), ("few", 3), ("as many as LLaMA has", 28), ("small", 300)])
def test_threads_are_what_the_matrices_leave(monkeypatch, cores, mix, beside):
    monkeypatch.setattr(devices.torch, "get_num_threads", lambda: cores)
    workers = side_by_side(plan(deltas_of(mix), 512 * 2**30), cores)
    assert workers == min(beside, cores)
    assert engine.threads_for(deltas_of(mix), device="cpu", budget="512GiB") == cores // workers


def test_a_container_is_given_its_share(monkeypatch, tmp_path):
    """3.5 of 128 cores and 2 of 500 GiB: no more are used, though torch knows nothing of it."""
    groups(monkeypatch, tmp_path, "0::/slice/job\n")
    put(tmp_path / "slice/cpu.max", "350000 100000")
    put(tmp_path / "slice/job/cpu.max", "max 100000")
    put(tmp_path / "slice/job/memory.max", str(2 * 2**30))
    put(tmp_path / "slice/job/memory.current", str(2**30))
    put(tmp_path / "slice/job/memory.stat", f"anon 5\nactive_file {2**28}\ninactive_file {2**28}\nfile {2**29}")
    put(tmp_path / "slice/memory.max", "max")
    assert (quota.granted_cores(), quota.granted_memory()) == (4, 2**30 + 2**29)
    monkeypatch.setattr(memory, "_free_on_machine", lambda: 500 * 2**30)
    assert memory.memory_budget(None) == 3 * 2**28
    with torch_threads(128):
        for mix in ("one", "small"):
            watched = Watched(None, 1 if mix == "one" else 4)
            monkeypatch.setattr(engine, "solve_together", watched)
            list(engine.decompose_indexed(deltas_of(mix), device="cpu"))
            assert watched.threads == 4
        assert torch.get_num_threads() == 128


def test_the_older_groups_of_a_container_that_does_not_see_its_path(monkeypatch, tmp_path):
    groups(monkeypatch, tmp_path, "5:cpu,cpuacct:/docker/1a\n4:memory:/docker/1a\n1:name=systemd:/\n")
    put(tmp_path / "cpu/cpu.cfs_quota_us", "50000")
    put(tmp_path / "cpu/cpu.cfs_period_us", "100000")
    put(tmp_path / "memory/memory.limit_in_bytes", "1000")
    put(tmp_path / "memory/memory.usage_in_bytes", "1200")
    put(tmp_path / "memory/memory.stat", "inactive_file 7\ntotal_inactive_file 300\ntotal_active_file 1")
    assert (quota.granted_cores(), quota.granted_memory()) == (1, 101)


@pytest.mark.parametrize("there", ["0::/\n", "5:cpu:/\n4:memory:/\n", "", None])
@pytest.mark.parametrize("limited", [False, True])
def test_where_nothing_is_limited_or_known(monkeypatch, tmp_path, there, limited):
    groups(monkeypatch, tmp_path, there)
    if limited:
        put(tmp_path / "cpu.max", "max 100000")
        put(tmp_path / "memory.max", "max")
        put(tmp_path / "cpu/cpu.cfs_quota_us", "-1")
        put(tmp_path / "cpu/cpu.cfs_period_us", "100000")
    assert quota.granted_cores() is quota.granted_memory() is None
    monkeypatch.setattr(memory, "_free_on_machine", lambda: 77)
    assert (memory.free_memory(), devices.cores()) == (77, torch.get_num_threads())


def groups(monkeypatch, root, own):
    monkeypatch.setattr(quota, "GROUPS", root)
    monkeypatch.setattr(quota, "OWN", root / "self")
    if own is not None:
        put(root / "self", own)


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
