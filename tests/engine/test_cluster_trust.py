"""A Dask cluster that is not as it should be: one message each, and nothing is believed that is not so."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from dataclasses import replace

import pytest
from click.testing import CliRunner
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.dask_processes import dask_cluster
from support.spectra_kinds import slow_deltas

import spectra
from spectra.cli.main import main
from spectra.engine.executors.trust import Answer, Trust, error_in, misfit
from spectra.errors import SpectraError

pytest.importorskip("distributed")
from spectra.engine.executors import dask_cluster as module

WITHOUT_PACKAGE = "import sys; sys.modules['spectra'] = None"
OLDER = "import spectra._version as it; it.__version__ = '0.0.9'"
DOUBLED = """
from dataclasses import replace
import spectra.engine.decompose as it
right = it.solve
def solve(*given, **named):
    found = right(*given, **named)
    return replace(found, S=2 * found.S, norm=2 * found.norm)
it.solve = solve
"""
WORSE = DOUBLED.replace(", norm=2 * found.norm", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with dask_cluster(tmp_path_factory.mktemp("dask")) as cluster:
        yield cluster


@pytest.fixture
def alone(place):
    """The scheduler, with the workers of the last test gone."""
    for worker in place.workers:
        worker.kill()
        worker.wait()
    place.workers.clear()
    return place


@pytest.fixture
def models(tmp_path):
    write_checkpoint(tmp_path / "base", llama_tensors())
    write_checkpoint(tmp_path / "tuned", nudged(llama_tensors()))
    return tmp_path


def svd(models, address, *more):
    words = ["svd", str(models / "tuned"), "--base", str(models / "base"), "--cluster", address, *more]
    return CliRunner().invoke(main, words)


def one_message(shown):
    assert shown.exit_code == 1, (shown.output, shown.exception)
    assert isinstance(shown.exception, SystemExit), shown.exception
    assert "Traceback" not in shown.output
    (line,) = [line for line in shown.stderr.splitlines() if line.startswith("Error: ")]
    return line


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (WITHOUT_PACKAGE, "every worker needs spectra .*: tcp://.* cannot import it"),
        (OLDER, r"every worker needs spectra .*: tcp://.* has 0\.0\.9"),
        (DOUBLED, "sent wrong numbers for .*‖ΔW‖_F is .* there and .* here"),
        (WORSE, "sent wrong numbers for .*is not ‖ΔW‖²"),
    ],
)
def test_a_worker_that_is_not_like_this_machine_ends_the_run(alone, models, before, words):
    alone.worker(before=before)
    shown = svd(models, alone.address, "--out", str(models / "run"), "--no-figures")
    assert re.search(words, one_message(shown)), shown.output
    assert not list((models / "run").glob("spectra/*"))


def test_right_workers_are_believed_and_the_results_are_those_of_this_machine(alone, models):
    alone.worker()
    shown = svd(models, alone.address, "--json", "--top", "2")
    assert shown.exit_code == 0, shown.output
    words = ["svd", str(models / "tuned"), "--base", str(models / "base"), "--json", "--top", "2"]
    assert [line for line in shown.stdout.splitlines() if '"method"' not in line] == [
        line for line in CliRunner().invoke(main, words).stdout.splitlines() if '"method"' not in line
    ]


def test_no_worker_with_a_card_is_said(alone, models, monkeypatch):
    monkeypatch.setattr(module, "_WAIT_FOR_WORKERS", 6.0)
    monkeypatch.setattr(module.ClusterExecutor, "patience", 0.5)
    alone.worker()
    line = one_message(svd(models, alone.address, "--device", "cuda"))
    assert 'none offers a GPU; start them with --resources "GPU=1"' in line


def test_workers_that_are_gone_or_have_no_memory_are_said(alone, models, monkeypatch):
    monkeypatch.setattr(module, "_WAIT_FOR_WORKERS", 6.0)
    monkeypatch.setattr(module.ClusterExecutor, "patience", 0.5)
    assert "has no workers; start some" in one_message(svd(models, alone.address))
    alone.worker("--memory-limit", "60MiB")
    line = one_message(svd(models, alone.address, "--memory", "1GiB"))
    assert "all are paused for want of memory (60.0 MiB the least)" in line


def test_the_last_worker_dies_under_a_run(alone, monkeypatch):
    monkeypatch.setattr(module, "_WAIT_FOR_WORKERS", 6.0)
    monkeypatch.setattr(module.ClusterExecutor, "patience", 0.5)
    worker = alone.worker()
    with module.cluster_executor(alone.address) as executor:
        stream = spectra.decompose(slow_deltas(8), device="cpu", executor=executor)
        next(stream)
        worker.kill()
        monkeypatch.setattr(module, "_WAIT_FOR_WORKERS", 1.0)
        with pytest.raises(SpectraError, match="there is none any more; start some: dask worker tcp://"):
            list(stream)


def test_a_scheduler_that_is_killed_is_one_message(place, tmp_path):
    code = """
import pathlib, sys, time, spectra
from spectra.engine.executors import dask_cluster as module
from support.spectra_kinds import slow_deltas
module.ClusterExecutor.patience = 0.5
with module.cluster_executor(sys.argv[1]) as executor:
    stream = spectra.decompose(slow_deltas(12), device="cpu", executor=executor)
    next(stream)
    print("begun", flush=True)
    while not pathlib.Path(sys.argv[2]).exists():
        time.sleep(0.05)
    module._ANSWER = "5s"
    try:
        list(stream)
    except spectra.errors.SpectraError as problem:
        print(problem, flush=True)
"""
    (tmp_path / "dask").mkdir()
    with dask_cluster(tmp_path / "dask", warm=place.warm) as cluster:
        cluster.worker()
        words, into = [cluster.address, tmp_path / "killed"], tmp_path / "driver"
        driver = cluster.warm.start(code, words, into=into, environment=cluster.environment)
        until = time.monotonic() + 300
        while "begun" not in driver.out.read_text() and time.monotonic() < until:
            assert not driver.err.read_text()
            time.sleep(0.1)
        cluster.scheduler.kill()
        cluster.scheduler.wait()
        began = time.monotonic()
        (tmp_path / "killed").touch()
        assert driver.wait() == 0
        assert time.monotonic() - began < 60
    out = driver.out.read_text()
    assert "does not answer any more" in out
    assert "what is stored stays" in out
    assert driver.err.read_text() == ""  # Dask's own hundred lines about it are left away


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("nonsense", "is no address of a Dask scheduler"),
        ("tcp://host", "is no address"),
        ("foo://host:1", "unknown address scheme"),
        ("tls://127.0.0.1:9", "DASK_DISTRIBUTED__COMM__TLS__CA_FILE"),
        ("ucx://127.0.0.1:9", "distributed-ucxx"),
        ("tcp://127.0.0.1:9", "no Dask scheduler answers"),
    ],
)
def test_addresses_where_nothing_is(address, words, models, monkeypatch):
    monkeypatch.setattr(module, "_CONNECT", "1s")
    shown = svd(models, address)
    assert shown.exit_code == (2 if words == "is empty" else 1), shown.exception
    assert words in shown.output
    assert "Traceback" not in shown.output


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with openssl")
def test_tls_as_documented(tmp_path, models, monkeypatch):
    (tmp_path / "tls").mkdir()
    key, certificate = tmp_path / "tls" / "key.pem", tmp_path / "tls" / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=spectra",
         "-keyout", key, "-out", certificate], check=True, capture_output=True,
    )  # fmt: skip
    files = {"CA_FILE": certificate}
    files |= {f"{who}__{what}": file for who in ("CLIENT", "SCHEDULER", "WORKER") for what, file in
              (("CERT", certificate), ("KEY", key))}  # fmt: skip
    for name, file in files.items():
        monkeypatch.setenv(f"DASK_DISTRIBUTED__COMM__TLS__{name}", str(file))
    words = ["--base", models / "base", "--tuned", models / "tuned", "--layer", "v_proj", "--cluster"]
    with dask_cluster(tmp_path / "tls", ["--protocol", "tls"]) as cluster:
        assert cluster.address.startswith("tls://")
        cluster.worker()
        shown = cluster.warm.run(  # another process: certificates are looked for when Dask is imported
            "from spectra.cli import main; main.main(prog_name='spectra')", ["svd", *words, cluster.address],
            into=tmp_path / "shown",
        )  # fmt: skip
    assert shown.returncode == 0, shown.stderr


def test_what_a_worker_may_not_send():
    (delta,) = slow_deltas(1, size=12)
    (right,) = spectra.decompose([delta], top=2, device="cpu")
    assert misfit(delta, right) == error_in(delta, right) == ""
    assert Trust().accept(delta, Answer(right, spectra.__version__, "w")) is right
    flipped = right.U.copy()
    flipped[:, 0] *= -1
    for wrong, words in [
        (replace(right, name="another"), "they are called another"),
        (replace(right, shape=(12, 11)), "they are called"),
        (replace(right, S=right.S[::-1]), "not descending"),
        (replace(right, S=2 * right.S), "is not ‖ΔW‖²"),
        (replace(right, S=2 * right.S, norm=2 * right.norm), "there and"),
        (replace(right, norm=float("nan")), "a norm of nan"),
        (replace(right, S=right.S * float("nan")), "values that are not finite"),
        (replace(right, U=right.U[:5]), "vectors of shapes"),
        (replace(right, U=flipped), "in the vectors"),
        (replace(right, U=2 * right.U), "not orthonormal"),
    ]:
        with pytest.raises(SpectraError, match=words):
            Trust().accept(delta, Answer(wrong, spectra.__version__, "w"))
    with pytest.raises(SpectraError, match="one has another"):
        Trust().accept(delta, right)
