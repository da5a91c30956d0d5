"""Which updates are read, whether alone or several small ones as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from spectra.deltas.delta import WeightDelta
from spectra.engine import solve


def watch(patch: pytest.MonkeyPatch, seen: Callable[[WeightDelta], Any]) -> None:
    """From now on, call `seen` with every update that is read."""
    read, read_small = WeightDelta.read, solve.read_small

    def alone(delta: WeightDelta, device: str = "cpu") -> Any:
        seen(delta)
        return read(delta, device)

    def together(deltas: Sequence[WeightDelta]) -> Any:
        found = read_small(deltas)
        for place in found:
            seen(deltas[place])
        return found

    patch.setattr(WeightDelta, "read", alone)
    patch.setattr(solve, "read_small", together)


def refuse(patch: pytest.MonkeyPatch) -> None:
    """From now on, the test fails where an update is read."""
    watch(patch, lambda delta: pytest.fail(f"{delta.name} was read"))
