"""Whose eigenvalues: the same numbers from both libraries, one choice per machine and size, none where it is off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from support.torch_threads import torch_threads
from threadpoolctl import threadpool_info

from spectra.cli import main
from spectra.deltas.delta import WeightDelta
from spectra.engine.decompose import decompose_indexed, libraries_for
from spectra.engine.solvers import calibration, dense, eigenvalues

NUMPY_WINS = {"torch": 1.0, "numpy": 0.5}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Calibration on, in a cache of its own."""
    monkeypatch.delenv(calibration.SWITCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_asked", set())
    monkeypatch.setattr(calibration, "_anew", [])
    monkeypatch.setattr(calibration, "_hindrances", [])
    calibration._kept.cache_clear()
    yield tmp_path / "spectra" / "eigenvalues"
    calibration._kept.cache_clear()


@pytest.fixture(autouse=True)
def _own_limit(monkeypatch):
    """Whatever a run that another test has left open holds."""
    monkeypatch.setattr(eigenvalues, "_LIMIT", eigenvalues._Limit())


@pytest.fixture
def one_core():
    with torch_threads(1):
        yield


def gram(size, seed=0):
    return dense.gram(torch.randn((size, 2 * size), generator=torch.Generator().manual_seed(seed)).double())


def of_time(monkeypatch, seconds):
    asked = []
    monkeypatch.setattr(calibration, "measured", lambda size: asked.append(size) or seconds)
    return asked


@pytest.mark.parametrize("size", [1, 2, 64, 300])
def test_both_libraries_agree_with_the_svd(size):
    product = gram(size)
    exact = torch.linalg.svdvals(product).flip(-1)
    for solve in eigenvalues.BY.values():
        assert (solve(product) - exact).abs().max() <= 1e-13 * exact[-1] * size


def test_only_the_upper_triangle_is_read():
    product = gram(40)
    spoiled = product + torch.full((40, 40), 7.0).double().tril(-1)
    for solve in eigenvalues.BY.values():
        assert torch.equal(solve(spoiled), solve(product))


def test_what_does_not_converge_is_told_as_by_torch(monkeypatch):
    def diverges(*_, **__):
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(np.linalg, "eigvalsh", diverges)
    with pytest.raises(RuntimeError, match="did not converge"):
        eigenvalues.by_numpy(gram(3))


def threads_of_numpy():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_threads_of_numpy_are_as_they_were():
    """Also where they are limited twice, and where somebody is done by an error."""
    before = threads_of_numpy()
    with suppress(ZeroDivisionError), eigenvalues.numpy_on_one_core():
        with eigenvalues.numpy_on_one_core():
            assert threads_of_numpy() == {1}
        assert threads_of_numpy() == {1}
        assert eigenvalues.is_numpy_limited()
        raise ZeroDivisionError
    assert threads_of_numpy() == before
    assert not eigenvalues.is_numpy_limited()


def in_new_thread(ask):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()


def overlapping():
    """Two streams that are read in turn, begun and ended by threads that end."""
    first, second = eigenvalues.numpy_on_one_core(), eigenvalues.numpy_on_one_core()
    in_new_thread(first.__enter__)
    second.__enter__()
    in_new_thread(lambda: first.__exit__(None, None, None))
    there = eigenvalues.is_numpy_limited(), threads_of_numpy()
    in_new_thread(lambda: second.__exit__(None, None, None))
    return *there, eigenvalues.is_numpy_limited(), threads_of_numpy()


def test_runs_that_overlap_share_the_limit_and_the_last_puts_it_back():
    """In a process where nobody else has set one, and where there is more than one thread to limit."""
    code = "from engine.test_calibration import overlapping, threads_of_numpy as t; print(t(), *overlapping())"
    tests = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "3", "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    before, *found = run.stdout.split()
    assert found == ["True", "{1}", "False", before]


@pytest.mark.parametrize(
    "pools",
    [
        pytest.param([], id="a library that takes no limit"),
        pytest.param([("openblas", 1), ("mkl", 8)], id="one that is limited for the setting thread alone"),
        pytest.param([("mkl", 1)], id="not numpy's"),
    ],
)
def test_a_limit_that_others_do_not_see_leaves_numpy_out(cache, monkeypatch, one_core, pools):
    seen = [{"user_api": "blas", "internal_api": api, "num_threads": count} for api, count in pools]
    monkeypatch.setattr(eigenvalues, "threadpool_info", lambda: [*seen, {"user_api": "openmp", "num_threads": 1}])
    monkeypatch.setattr(np, "show_config", lambda **_: {"Build Dependencies": {"lapack": {"name": "scipy-openblas"}}})
    asked = of_time(monkeypatch, NUMPY_WINS)
    deltas = [WeightDelta.from_tensor(f"layers.{i}.q_proj.weight", torch.randn(512, 512)) for i in range(8)]
    assert libraries_for(deltas, 1) == {}
    assert {spectrum.status for _, spectrum in decompose_indexed(deltas)} == {"ok"}
    assert asked == []
    assert not eigenvalues.is_numpy_limited()


def test_more_threads_than_numpys_library_was_built_for():
    """128 at once, where wheels of numpy are built for 64: the same numbers from each."""
    product = gram(160)
    alone, together = eigenvalues.by_numpy(product), Barrier(128)

    def solve(_):
        together.wait()
        return torch.equal(eigenvalues.by_numpy(product), alone)

    with eigenvalues.numpy_on_one_core(), ThreadPoolExecutor(128) as pool:
        assert all(pool.map(solve, range(128)))


@pytest.mark.parametrize("cores", [1, 2])
def test_a_run_leaves_numpy_as_it_was(cores, monkeypatch):
    """Whether matrices are solved in this thread or in a pool, and also if it is given up half way."""
    before, inside = threads_of_numpy(), []
    values = calibration.by_torch
    monkeypatch.setattr(calibration, "by_torch", lambda g: inside.append(threads_of_numpy()) or values(g))
    monkeypatch.setattr(calibration, "BY", {"torch": calibration.by_torch})
    deltas = [WeightDelta.from_tensor(f"layers.{i}.q_proj.weight", torch.randn(9, 9)) for i in range(4)]
    with torch_threads(cores):
        run = decompose_indexed(deltas, threads=1)
        next(run)
        run.close()
    assert {1} in inside
    assert threads_of_numpy() == before


@pytest.mark.parametrize(("seconds", "chosen"), [(NUMPY_WINS, "numpy"), ({"torch": 1.0, "numpy": 0.95}, "torch")])
def test_what_was_measured_is_kept_and_used(cache, monkeypatch, seconds, chosen):
    asked = of_time(monkeypatch, seconds)
    assert calibration.calibrate([600] * 8) == {512: chosen}
    assert calibration.calibrate([600] * 8) == {512: chosen}
    assert asked == [512], "once"
    assert [calibration.library_for(size) for size in (500, 501, 620, 640, 1793)] == ["torch", chosen, chosen] + [
        "torch"
    ] * 2
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["seconds"] == seconds


def test_few_matrices_are_not_worth_measuring_for(cache, monkeypatch):
    asked = of_time(monkeypatch, NUMPY_WINS)
    assert calibration.calibrate([600] * 7 + [100] * 50 + [4096] * 50) == {512: "torch"}
    assert asked == []


def test_what_another_process_measured_first_stays(cache, monkeypatch):
    """It may have begun by it."""

    def meanwhile(size):
        calibration._file_of(size).write_text(json.dumps({"seconds": {"torch": 1.0, "numpy": 2.0}}))
        return NUMPY_WINS

    monkeypatch.setattr(calibration, "measured", meanwhile)
    assert calibration.calibrate([600] * 8) == {512: "torch"}
    assert len(list(cache.iterdir())) == 1, "nothing half-written is left"


def test_kept_where_there_are_no_hard_links(cache, monkeypatch):
    def unknown(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", unknown)
    asked = of_time(monkeypatch, NUMPY_WINS)
    assert calibration.calibrate([600] * 8) == calibration.calibrate([600] * 8) == {512: "numpy"}
    assert asked == [512]
    assert len(list(cache.iterdir())) == 1


def test_measured_again_where_the_user_asks_and_once_in_a_process(cache, monkeypatch):
    of_time(monkeypatch, NUMPY_WINS)
    assert calibration.calibrate([600] * 8) == {512: "numpy"}
    asked = of_time(monkeypatch, {"torch": 1.0, "numpy": 2.0})
    assert calibration.calibrate([600] * 8) == {512: "numpy"}, "what was measured holds"
    monkeypatch.setenv(calibration.SWITCH, "again")
    monkeypatch.setattr(calibration, "_asked", set())
    assert calibration.calibrate([600] * 8) == calibration.calibrate([600] * 8) == {512: "torch"}
    assert asked == [512]
    monkeypatch.setenv(calibration.SWITCH, "")
    assert calibration.calibrate([600] * 8) == {512: "torch"}, "and holds from now on"


def test_another_processor_in_the_same_home_is_measured_for_itself(cache, monkeypatch):
    """Clouds call several generations by one name."""
    files = set()
    for model in ("2", "17"):
        text = f"processor: 0\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\ncpu MHz: {model}\n\nprocessor: 1\nmodel: 9\n"
        monkeypatch.setattr(Path, "read_text", lambda *_, said=text, **__: said)
        assert calibration._processor() == {"model": model, "model name": "AMD EPYC"}
        calibration._machine.cache_clear()
        files.add(calibration._file_of(512))
    calibration._machine.cache_clear()
    assert len(files) == 2


def test_nothing_is_written_where_there_is_no_home(cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    asked = of_time(monkeypatch, NUMPY_WINS)
    assert calibration.calibrate([600] * 8) == {512: "torch"}
    assert asked == list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["", "[]", '{"seconds": {"torch": "x"}}', '{"seconds": {}}'])
def test_a_damaged_file_counts_as_torch(cache, monkeypatch, damage):
    of_time(monkeypatch, NUMPY_WINS)
    calibration.calibrate([600] * 8)
    next(cache.iterdir()).write_text(damage)
    calibration._kept.cache_clear()
    assert calibration.calibrate([600] * 8) == {512: "torch"}


def test_where_nothing_can_be_kept_nothing_is_measured(cache, monkeypatch):
    asked = of_time(monkeypatch, NUMPY_WINS)
    cache.parent.parent.joinpath("spectra").write_text("a file where the folder would be")
    assert calibration.calibrate([600] * 8) == {512: "torch"}
    assert asked == []


def test_switched_off(cache, monkeypatch):
    of_time(monkeypatch, NUMPY_WINS)
    calibration.calibrate([600] * 8)
    monkeypatch.setenv(calibration.SWITCH, "off")
    assert calibration.calibrate([600] * 8) == {}
    assert calibration.library_for(600) == "torch"


def test_a_run_measures_uses_it_and_gets_the_same_numbers(cache, monkeypatch, one_core):
    deltas = [
        WeightDelta.from_tensor(
            f"layers.{i}.q_proj.weight", torch.randn((516, 512), generator=torch.Generator().manual_seed(i))
        )
        for i in range(8)
    ]
    asked = of_time(monkeypatch, NUMPY_WINS)
    calls = []
    by_numpy = eigenvalues.by_numpy
    monkeypatch.setattr(calibration, "BY", {**eigenvalues.BY, "numpy": lambda g: calls.append(g.shape) or by_numpy(g)})
    there = dict(decompose_indexed(deltas))
    assert asked == [512]
    assert len(calls) == 8
    monkeypatch.setenv(calibration.SWITCH, "0")
    for place, spectrum in decompose_indexed(deltas):
        assert spectrum.status == there[place].status == "ok"
        assert np.abs(spectrum.S**2 - there[place].S ** 2).max() <= 1e-13 * spectrum.S[0] ** 2
    assert len(calls) == 8, "torch's this time"


def test_several_cores_for_one_matrix_are_torchs(cache, monkeypatch):
    of_time(monkeypatch, NUMPY_WINS)
    calibration.calibrate([600] * 8)
    monkeypatch.setattr(calibration, "BY", {"numpy": lambda _: pytest.fail("on one core only")})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with eigenvalues.numpy_on_one_core():
        assert calibration.eigenvalues(gram(600)).shape == (600,)


def test_measuring_is_of_both():
    seconds = calibration.measured(64)
    assert set(seconds) == {"torch", "numpy"}
    assert all(0 < value < 5 for value in seconds.values())


@pytest.mark.parametrize(
    ("option", "switch"), [("--recalibrate", "again"), ("--no-calibrate", "0"), ("--calibrate", "")]
)
def test_the_command_line_sets_the_switch(monkeypatch, tmp_path, option, switch):
    monkeypatch.setenv(calibration.SWITCH, "")
    seen = []
    monkeypatch.setattr("spectra.cli.options.Compute", lambda *_: seen.append(os.environ[calibration.SWITCH]))
    CliRunner().invoke(main, ["svd", "--tuned", str(tmp_path), option])
    assert seen == [switch]


@pytest.fixture
def full_models(tmp_path):
    """Two checkpoints of so many square matrices of so many rows each."""

    def saved(count, size):
        generator = torch.Generator().manual_seed(0)
        paths = []
        for name in ("base", "tuned"):
            tensors = {
                f"layers.{i}.q_proj.weight": torch.randn((size, size), generator=generator) for i in range(count)
            }
            paths.append(str(tmp_path / f"{name}.safetensors"))
            save_file(tensors, paths[-1])
        return ["--base", paths[0], "--tuned", paths[1]]

    return saved


FEW = "--recalibrate: no size between 501 and 1792 has 8 full matrices here; nothing was measured\n"


@pytest.mark.parametrize(
    ("count", "size", "said"),
    [(7, 520, FEW), (9, 40, FEW), (9, 500, FEW), (1, 1800, FEW), (8, 520, "")],
    ids=["seven", "small ones", "of 500 rows", "a large one", "eight"],
)
def test_asking_to_measure_again_says_when_nothing_was(cache, one_core, monkeypatch, full_models, count, size, said):
    asked = of_time(monkeypatch, NUMPY_WINS)
    monkeypatch.setattr("spectra.engine.decompose.cores", lambda: 1)
    monkeypatch.setenv(calibration.SWITCH, "")
    result = CliRunner().invoke(main, ["svd", *full_models(count, size), "--recalibrate"])
    assert [line for line in result.stderr.splitlines(True) if "recalibrate" in line] == [said] * bool(said)
    assert asked == [] if said else [512]


def test_so_it_does_where_the_matrices_are_solved_elsewhere_or_it_cannot_be_kept(
    cache, one_core, monkeypatch, full_models
):
    of_time(monkeypatch, NUMPY_WINS)
    monkeypatch.setattr("spectra.engine.decompose.cores", lambda: 1)
    monkeypatch.setenv(calibration.SWITCH, "")
    command = ["svd", *full_models(8, 510), "--recalibrate"]
    assert "without --workers; nothing was measured\n" in CliRunner().invoke(main, [*command, "--workers", "1"]).stderr
    cache.parent.write_text("a file where the folder would be")
    assert "what is measured cannot be kept (" in CliRunner().invoke(main, command).stderr
    assert "recalibrate" not in CliRunner().invoke(main, [*command[:-1], "--no-calibrate"]).stderr
    assert "recalibrate" not in CliRunner().invoke(main, [*command, "-q"]).stderr
