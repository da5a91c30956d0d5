"""A real Dask scheduler and two worker processes on this machine."""

from __future__ import annotations

import signal
from concurrent.futures import Future

import pytest
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.dask_processes import dask_cluster
from support.hub_server import HubServer
from support.spectra_kinds import slow_deltas

import spectra
from spectra.deltas.source import Source
from spectra.engine.decompose import Work, decompose_indexed
from spectra.errors import SpectraError

pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with dask_cluster(tmp_path_factory.mktemp("dask")) as place:
        yield place.address, [place.worker() for _ in range(2)]


def test_workers_read_from_a_server_for_themselves(cluster, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    from spectra.engine.executors.dask_cluster import cluster_executor
    from spectra.files import http

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    base = {name: tensor.repeat(*[4] * tensor.ndim) for name, tensor in llama_tensors().items()}
    write_checkpoint(tmp_path / "base", base, shards=2)
    write_checkpoint(tmp_path / "tuned", nudged(base), shards=2)
    with HubServer() as server, cluster_executor(cluster[0]) as executor:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        for name in ("base", "tuned"):
            server.add(f"org/{name}", tmp_path / name)
        source = spectra.open_source("org/tuned", "org/base")
        here, start = http.received(), len(server.seen)
        found = {item.name: item for item in spectra.decompose(source, device="cpu", executor=executor)}
        checked = http.received() - here
        largest = max(sum(ref.nbytes for ref in delta.refs) for delta in source)
        assert checked <= 2 * largest, "one result of each worker is read again by this process, and nothing else"
        sent = sum(seen.sent for seen in server.seen[start:] if seen.server == "cdn")
        chosen = sum(ref.nbytes for delta in source for ref in delta.refs)
        assert chosen <= sent - checked <= 1.02 * chosen
        lists = [seen.path for seen in server.seen[start:] if "/api/" in seen.path]
        assert len(lists) <= 2 * 2, "each worker asks once for each model's list of files"
    for spectrum in spectra.decompose(spectra.open_source(tmp_path / "tuned", tmp_path / "base")):
        assert found[spectrum.name].status == "ok", found[spectrum.name].reason
        assert pytest.approx(spectrum.S, rel=1e-12) == found[spectrum.name].S


def test_a_worker_killed_in_the_middle_costs_nothing(cluster, tmp_path):
    from spectra.engine.executors.dask_cluster import cluster_executor

    address, workers = cluster
    deltas = slow_deltas(14)
    source = Source("made", tuple(deltas), tuned="tuned")
    with cluster_executor(address) as executor:
        executor._client.wait_for_workers(2, timeout=60)
        executor._workers(anew=True)
        assert executor._max_workers == 2
        assert 0.5 * 2**30 < executor.memory_budget < 2**30
        stream = spectra.decompose(source, top=2, device="cpu", executor=executor, out=tmp_path / "run")
        found = [next(stream)]
        workers[0].send_signal(signal.SIGKILL)
        found += stream
    assert sorted(item.name for item in found) == sorted(delta.name for delta in deltas)
    here = dict(decompose_indexed(deltas, top=2, device="cpu", threads=1))
    stored = spectra.load(tmp_path / "run")
    for spectrum in here.values():
        assert stored[spectrum.name].status == "ok"
        assert pytest.approx(spectrum.S, rel=1e-12) == stored[spectrum.name].S
        assert abs(stored[spectrum.name].U) == pytest.approx(abs(spectrum.U), abs=1e-7)  # kept in float32


def test_a_matrix_above_a_workers_memory_is_named(cluster):
    from spectra.engine.executors.dask_cluster import cluster_executor

    with cluster_executor(cluster[0]) as executor:
        found = dict(decompose_indexed(slow_deltas(1, size=9000), executor=executor))
    assert found[0].status == "too_large"


def test_work_for_a_gpu_goes_to_workers_that_offer_one():
    from spectra.engine.executors.dask_cluster import ClusterExecutor

    asked = []

    class Recording:
        def __init__(self, resources):
            self.resources = resources

        def submit(self, *_arguments):
            asked.append(self.resources)
            return Future()

    class Client:
        def get_executor(self, **options):
            return Recording(options.get("resources"))

    executor = ClusterExecutor(Client())
    executor.submit(Work(None, False, "cuda"))
    executor.submit(Work(None, False, "auto"))
    assert asked == [{"GPU": 1}, None]


def test_nobody_at_the_address():

    from spectra.engine.executors import dask_cluster as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CONNECT", "1s")
        with (
            pytest.raises(SpectraError, match="no Dask scheduler answers"),
            module.cluster_executor("tcp://127.0.0.1:9"),
        ):
            pass
