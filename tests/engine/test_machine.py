"""What the engine asks of the machine: memory, its devices, and how fast they are at float64."""

from __future__ import annotations

import pytest
import torch

from spectra.engine import devices, memory
from spectra.engine.devices import Cpu, Cuda, device_named, full_rate_double, resolve_device, slow_double
from spectra.engine.memory import free_memory, memory_budget
from spectra.errors import DeviceError, SelectionError


@pytest.mark.parametrize("capability", [(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)])
def test_data_centre_cards_have_full_rate_float64(capability):
    assert full_rate_double(*capability)
    assert slow_double(*capability) == ""


@pytest.mark.parametrize("capability", [(5, 2), (6, 1), (7, 5), (8, 6), (8, 7), (8, 9), (10, 3), (12, 0), (99, 0)])
def test_other_cards_and_unknown_ones_count_as_slow(capability):
    assert not full_rate_double(*capability)
    assert "compute capability {}.{}".format(*capability) in slow_double(*capability)


@pytest.mark.parametrize(("text", "count"), [("1KiB", 1024), ("2 GB", 2 * 10**9), ("0.5MiB", 2**19), (77, 77)])
def test_sizes(text, count):
    assert memory_budget(text) == count


@pytest.mark.parametrize("text", ["", "4 apples", "-1GiB", "GiB"])
def test_what_is_not_a_size(text):
    with pytest.raises(SelectionError, match="is not a size"):
        memory_budget(text)


def test_without_a_budget_half_of_what_is_free_is_used(monkeypatch):
    assert free_memory() > 0
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    assert memory_budget(None) == Cpu("cpu").budget() == 500


def test_free_memory_is_known_without_the_kernels_estimate(monkeypatch):
    def gone(*_):
        raise OSError

    monkeypatch.setattr("builtins.open", gone)
    assert free_memory() > 0


class _TwoCards:
    """What is asked of torch.cuda, on a machine with two cards."""

    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    mem_get_info = staticmethod(lambda name: ({"cuda:0": 100, "cuda:1": 300}[name], 400))


@pytest.fixture
def two_cards(monkeypatch):
    monkeypatch.setattr(devices.torch, "cuda", _TwoCards)


@pytest.mark.usefixtures("two_cards")
def test_a_card_that_is_there_is_taken_and_every_card_has_its_own_memory():
    assert [resolve_device(name) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    assert [device_named(f"cuda:{i}").budget() for i in (0, 1)] == [50, 150]


@pytest.mark.usefixtures("two_cards")
def test_a_card_that_is_not_there_is_an_error():
    with pytest.raises(DeviceError, match="torch sees 2 CUDA devices; use --device cpu"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cpu:0", ""])
def test_what_is_not_a_device(name):
    with pytest.raises(DeviceError, match="is not one of auto, cpu, cuda"):
        resolve_device(name)


def test_devices_are_known_by_their_names():
    assert (device_named("cpu"), device_named("cuda:1")) == (Cpu("cpu"), Cuda("cuda:1"))


def test_a_cpu_needs_no_stream_and_no_remark():
    cpu = Cpu("cpu")
    cpu.settle()
    cpu.hand_over([torch.ones(1)])
    cpu.release()
    assert cpu.remark == ""
    with cpu.reading() as finish:
        finish()
