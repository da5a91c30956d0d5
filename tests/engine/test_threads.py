"""Threads side by side: the caller's own settings stay, the pool's are its share, results do not depend on it."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading

import pytest
import torch
from support.spectra_kinds import matrix_of
from support.torch_threads import torch_threads

from spectra.deltas.delta import WeightDelta
from spectra.engine.decompose import decompose_indexed, threads_for
from spectra.engine.executors.threads import thread_executor


@pytest.fixture
def three_threads():
    with torch_threads(3):
        yield


def _in_new_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.usefixtures("three_threads")
def test_settings_are_left_alone_even_while_the_pool_works():
    with thread_executor(3) as pool:
        shares = {pool.submit(_after_work).result() for _ in range(6)}
        assert shares == {1}
        assert torch.get_num_threads() == 3
        assert _in_new_thread() == 3
    assert torch.get_num_threads() == 3
    assert _in_new_thread() == 3


def _after_work():
    torch.linalg.qr(torch.ones(200, 20))
    return torch.get_num_threads()


@pytest.mark.usefixtures("three_threads")
def test_an_abandoned_run_leaves_the_settings_alone():
    stream = decompose_indexed([WeightDelta.from_tensor(str(i), torch.eye(20)) for i in range(6)], device="cpu")
    next(stream)
    assert torch.get_num_threads() == 3
    stream.close()
    assert (torch.get_num_threads(), _in_new_thread()) == (3, 3)


@pytest.mark.usefixtures("three_threads")
def test_threads_per_matrix_follow_the_number_of_matrices():
    deltas = [WeightDelta.from_tensor(str(i), torch.eye(20)) for i in range(6)]
    assert threads_for(deltas, device="cpu") == 1
    assert threads_for(deltas[:1], device="cpu") == 3
    assert threads_for(deltas[:2], device="cpu") == 1


def test_side_by_side_equals_one_by_one_bit_for_bit():
    deltas = [WeightDelta.from_tensor(str(i), matrix_of("gaussian", 60, 50, i)) for i in range(4)]
    together = dict(decompose_indexed(deltas, top=3, device="cpu", threads=1))
    for i, delta in enumerate(deltas):
        alone = dict(decompose_indexed([delta], top=3, device="cpu", threads=1))[0]
        assert (alone.S == together[i].S).all()
        assert (alone.U == together[i].U).all()
        assert (alone.Vh == together[i].Vh).all()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does with freed memory")
def test_freed_memory_is_used_again():
    """Fresh pages for 40 times four blocks of 4 MiB: 8,192 for the first four, up to 300,000 without the hint."""
    code = (
        "import resource, torch; from spectra.engine.executors.threads import keep_freed_memory; keep_freed_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = faults()\n"
        "for _ in range(40): blocks = [torch.ones(2**19, dtype=torch.float64) for _ in range(4)]; del blocks\n"
        "print(faults() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 20_000
