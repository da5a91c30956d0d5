"""What every adapter format's tests do: the laws of its recipes, and damage to an adapter that PEFT saved."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import spectra
from spectra.deltas.forms import LowRank
from spectra.deltas.source import Source
from spectra.errors import BaseRequiredError

Tensors = dict[str, torch.Tensor]


def assert_recipes_keep_their_laws(source: Source, base: Path | None) -> None:
    """Small and picklable, the form and rank that they promise, and the base's norm where there is a base."""
    stored = load_file(base / "model.safetensors") if base else {}
    assert len(source)
    for delta in source:
        packed = pickle.dumps(delta)
        assert len(packed) < 4000
        form, again = delta.read(), pickle.loads(packed).read()
        assert torch.equal(form.to_dense(), again.to_dense())
        assert form.to_dense().dtype == torch.float64
        assert isinstance(form, LowRank) == delta.factored
        assert form.shape == delta.shape
        values = torch.linalg.svdvals(form.to_dense())
        assert int((values > 1e-10 * values[0]).sum()) <= delta.max_rank <= min(delta.shape)
        if base:
            assert form.base_norm == pytest.approx(float(stored[delta.name].double().norm()), rel=1e-12)
            assert all(Path(ref.path).is_file() for ref in delta.recipe.refs)


def assert_needs_the_base(adapter: Path) -> None:
    """Without one there is a clear error, and no tensor was read for it."""
    with pytest.raises(BaseRequiredError, match=r"pass base= \(--base\)"):
        spectra.open_source(adapter)


def damaged(
    adapter: Path,
    change: Callable[[Tensors], Tensors] | None = None,
    config: dict[str, Any] | None = None,
    module: str = "layers.0.",
) -> Path:
    """The adapter with the tensors of one module changed, and with other config fields (None removes one).

    `change` gets the module's tensors by their names' ends, and returns them.
    """
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    if change:
        mine = {name: tensors.pop(name) for name in list(tensors) if module in name}
        short = {name.split("_proj.", 1)[-1]: name for name in mine}
        prefix = next(iter(mine)).split("_proj.", 1)[0] + "_proj."
        changed = change({end: mine[name] for end, name in short.items()})
        tensors |= {prefix + end: tensor.contiguous() for end, tensor in changed.items()}
    save_file(tensors, file)
    if config is not None:
        path = adapter / "adapter_config.json"
        fields = json.loads(path.read_text()) | config
        path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return adapter


def without(*ends: str) -> Callable[[Tensors], Tensors]:
    """The module lacks these tensors."""
    return lambda tensors: {end: tensor for end, tensor in tensors.items() if end not in ends}


def cast(dtype: torch.dtype, *ends: str) -> Callable[[Tensors], Tensors]:
    """These tensors are stored in another dtype."""
    return lambda tensors: {end: t.to(dtype) if end in ends else t for end, t in tensors.items()}


def reshaped(end: str, *shape: int) -> Callable[[Tensors], Tensors]:
    """This tensor has another shape, and other numbers."""
    return lambda tensors: tensors | {end: torch.ones(shape, dtype=torch.float64)}


def assert_one_is_refused(source: Source, reason: str) -> None:
    """The first module's matrix is refused for the reason, the other one is done."""
    found = {spectrum.name: spectrum for spectrum in spectra.decompose(source)}
    bad = [spectrum for name, spectrum in found.items() if ".0." in name]
    good = [spectrum for name, spectrum in found.items() if ".1." in name]
    assert [spectrum.status for spectrum in bad] == ["unsupported"]
    assert reason in bad[0].reason, bad[0].reason
    assert bad[0].name in source.coverage.unsupported
    assert good
    assert all(spectrum.status == "ok" for spectrum in good)


def assert_an_unknown_tensor_is_refused(adapter: Path, base: Path | None = None) -> None:
    """A tensor that no format knows takes its module's number away, whether it lies under the module or beside it."""
    file = adapter / "adapter_model.safetensors"
    stored = load_file(file)
    known = next(name for name in sorted(stored) if ".0." in name)
    module, _, slot = known.partition("_proj.")
    for extra, what in ((f"{known}_extra", f"{slot}_extra"), (f"{module}_proj_router.weight", "router.weight")):
        save_file(stored | {extra: torch.ones(2, 3)}, file)
        assert_one_is_refused(spectra.open_source(adapter, base), f"{what} [2, 3] of ")
