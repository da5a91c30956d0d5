"""The benchmarks run: the GPU script's checks on the CPU, and one small comparison."""

from __future__ import annotations

import csv

import pytest
import torch
from support.card import card_of


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))


def test_the_gpu_script_finds_the_device_path_right_on_the_cpu():
    from benchmarks import gpu

    assert [fault for _, fault in gpu.faults("cpu", 2**30) if fault] == []


def test_the_gpu_script_finds_it_right_on_a_card_and_sees_its_faults(monkeypatch):
    from benchmarks import gpu

    with card_of(monkeypatch) as card:
        assert [fault for _, fault in gpu.faults("cuda", 2**28) if fault] == []
    assert card.misuses == []

    def drifting(right, matrix, *rest, **options):
        values, vectors = right(matrix, *rest, **options)
        vectors[..., :, -1] += vectors[..., :, 0]
        return values, vectors

    with card_of(monkeypatch, faults={"linalg_eigh": drifting}) as card:
        told = dict(gpu.known_faults("cuda", 2**28))
    assert told["NaN in a matrix"] == ""
    assert "right only by the next solver: gram-eigh-f64 rejected" in told["64 × 40², top 4, call 4"]


SMALL = ((24, 24, 3, torch.float32), (16, 40, 2, torch.bfloat16))

PARTS = (
    "float64 product",
    "values, 24² × 3",
    "values + top 30, 16×40 × 2, bf16",
    "factored rank 4 on 64² × 3, bf16, top 30",
    "torch float64 Gram matrix + eigvalsh",
    "torch float64 Gram matrix + eigh",
    "svdvals float64, gesvdj",
    "svdvals float32, gesvd",
    "top 30 by Lanczos after the values, 64², decaying",
    "top 30 by eigh, 64², Gaussian",
    "eigvalsh float64, 16² × 16, in turn",
    "eigvalsh float64, 16² × 16, as a batch",
    "eigvalsh float64, 16² × 16, on 4 streams",
    "SVD of 3 cores of 4², float64, on the device",
    "SVD of 3 cores of 4², float64, on the CPU",
    "--device cpu, top 30",
    "profile",
)


def sizes():
    from benchmarks.gpu_timings import Sizes, Work

    return Sizes(works=tuple(Work(*small) for small in SMALL), square=64, rank=4, modules=3, layers=1)


def test_one_call_on_a_card_times_everything_and_misuses_nothing(monkeypatch):
    """Except for what only a card has: its library's drivers, which are asked for."""
    from benchmarks import gpu_timings

    asked = []

    def svdvals(right, matrix, driver=None):
        asked.append(driver)
        return right(matrix)

    with card_of(monkeypatch, faults={"linalg_svdvals": svdvals}) as card:
        lines = dict(gpu_timings.timings("cuda", 2**28, sizes()))
    assert card.misuses == []
    assert {None, *gpu_timings.DRIVERS} == set(asked)
    undone = {name.split(",")[0] for name, said in lines.items() if "not done" in said}
    assert undone == {"top 30 by Lanczos after the values"}, "30 of 64 are too many for it"
    assert [part for part in PARTS if not any(part in name for name in lines)] == []
    assert "% of a product's rate" in lines["values, 24² × 3"]


def test_one_call_checks_times_and_keeps_it_all(monkeypatch, tmp_path):
    from benchmarks import gpu

    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path), "--layers", "3"])
    monkeypatch.setattr(gpu, "described", lambda device: f"a card called {device}, 80 GiB")
    monkeypatch.setattr(gpu, "faults", lambda *_: [("a check", "")])
    monkeypatch.setattr(gpu, "timings", lambda device, _, asked: [(f"{device}, {asked.layers} layers", "1 s")])
    monkeypatch.setattr(gpu, "processes", lambda device, layers: [(f"process on {device}, {layers} layers", "2 s")])
    gpu.main()
    text = (tmp_path / "gpu.md").read_text() + (tmp_path / "gpu-processes.md").read_text()
    assert text.count("a card called cuda") == 2
    assert "| cuda, 3 layers | 1 s |" in text
    assert "| process on cuda, 3 layers | 2 s |" in text
    monkeypatch.setattr(gpu, "faults", lambda *_: [("a check", "values off")])
    with pytest.raises(SystemExit, match="not timed: 1 checks failed"):
        gpu.main()


def test_processes_are_ours_and_the_plain_loop_on_the_same_card(monkeypatch):
    from benchmarks import gpu_timings
    from benchmarks.measure import Sample

    commands = []

    def process(*arguments):
        commands.append(arguments)
        return lambda: Sample(1.0 if "spectra" in arguments else 3.0)

    monkeypatch.setattr(gpu_timings, "process", process)
    monkeypatch.setattr(gpu_timings.inputs, "write_pair", lambda *_: ("base", "tuned"))
    monkeypatch.setattr(gpu_timings.inputs, "write_lora", lambda *_, **__: "adapter")
    lines = list(gpu_timings.processes("cuda", 32))
    assert [said for _, said in lines] == ["1.00 s, torch.linalg on the same device 3.00 s: 3.00×"] * 2
    assert [command[-4:] for command in commands if "spectra" not in command] == [
        ("benchmarks.peers", "pair", "base", "tuned", "cuda")[-4:],
        ("-m", "benchmarks.peers", "lora", "adapter", "cuda")[-4:],
    ]


def test_the_plain_loops_run_on_a_card(monkeypatch, tmp_path):
    import json

    from safetensors.torch import save_file

    from benchmarks import inputs, peers

    for side in ("base", "tuned"):
        (tmp_path / side).mkdir()
        save_file({"a.weight": torch.randn(6, 5).bfloat16()}, tmp_path / side / "one.safetensors")
    (tmp_path / "base/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a.weight": "one.safetensors"}})
    )
    monkeypatch.setattr(inputs, "LLAMA_7B", {"self_attn.q_proj": (8, 8)})
    adapter = inputs.write_lora(tmp_path / "lora", rank=2, layers=2)
    with card_of(monkeypatch) as card:
        peers.pair_script(str(tmp_path / "base"), str(tmp_path / "tuned"), "cuda")
        peers.lora_script(str(adapter), "cuda", top=3)
    assert card.misuses == []
    assert [name for name, *_ in card.solved].count("linalg_svd") == 1 + 2


def test_what_a_card_cannot_do_is_a_line_and_the_next_follows(monkeypatch):
    from benchmarks import gpu_timings

    def refused(right, *_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nand more")

    with card_of(monkeypatch, faults={"linalg_svdvals": refused}):
        lines = list(gpu_timings.timings("cuda", 2**28, sizes()))
    said = dict(lines)["torch svdvals float64, gesvd, 64²"]
    assert said == "not done: OutOfMemoryError: CUDA out of memory. Tried"
    assert lines[-1][0].startswith("profile")


def test_streams_give_what_one_after_another_gives(monkeypatch):
    from benchmarks import gpu_timings

    with card_of(monkeypatch) as card:
        matrices = [torch.randn(9, 9).to("cuda") for _ in range(6)]
        found = gpu_timings.on_streams("cuda", matrices, lambda m: m @ m)
        order = {start: matrices[start::4] for start in range(4)}
        alone = [(m @ m).cpu() for start in range(4) for m in order[start]]
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
        del matrices, order
    assert card.misuses == []


def test_what_was_measured_stays_if_the_rest_cannot_be(tmp_path):
    from benchmarks import gpu

    def lines():
        yield "first", "1 s"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gpu.keep(tmp_path / "card" / "gpu.md", "a card", lines())
    assert (tmp_path / "card" / "gpu.md").read_text().endswith("| first | 1 s |\n")


def test_tools_that_are_not_there_are_named_with_what_gets_them(monkeypatch):
    from benchmarks import programs

    monkeypatch.setattr(programs, "find_spec", lambda module: module == "peft" or None)
    monkeypatch.delenv(programs.MERGEKIT, raising=False)
    assert [case.peer.split("'")[0] for case in programs.cases()] == ["PEFT"]
    told = list(programs.missing())
    assert [line.split(":")[0] for line in told] == ["modeldelta", "weightwatcher", "mergekit-extract-lora"]
    assert all("pip install" in line for line in told)


def test_cores_or_the_clock(tmp_path):
    from benchmarks.measure import Sample, compare, process

    ours, peer = Sample(1.0, cpu=4.0), Sample(3.0, cpu=2.0)
    assert compare("a", "b", 1.0, lambda: ours, lambda: peer, 1).ratio == 3.0
    assert compare("a", "b", 1.0, lambda: ours, lambda: peer, 1, by="cpu").ratio == 0.5
    sample = process("-c", "sum(range(10**6))")()
    assert sample.cpu > 0
    assert sample.mebibytes > 1


def test_the_gpu_script_sees_a_fault():
    from dataclasses import replace

    from benchmarks import gpu, inputs
    from spectra import WeightDelta

    delta = WeightDelta.from_tensor("a", inputs.gaussian(20, 10))
    (found,) = gpu.on_device([delta], "cpu", 2**30, 2)
    assert gpu.fault_of(delta, found, 2) == ""
    assert "values off" in gpu.fault_of(delta, replace(found, S=found.S * 1.01), 2)
    assert "sin θ" in gpu.fault_of(delta, replace(found, U=found.U[::-1].copy()), 2)


def test_the_table_holds_what_was_measured(tmp_path):
    from benchmarks import __main__ as table
    from benchmarks.measure import Sample, compare

    outcome = compare("work", "peer", 2.0, lambda: Sample(1.0), lambda: Sample(3.0), repeats=3)
    table.write_table(tmp_path, [outcome])
    (row,) = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert (float(row["ratio"]), float(row["ours_s"]), float(row["peer_s"])) == (3.0, 1.0, 3.0)
    text = (tmp_path / "table.md").read_text()
    assert "| work | peer | 2× | 3.00× | 3.00–3.00 | 3 |" in text
    assert text.endswith("|\n")
    assert "torch" in text.splitlines()[0]


def test_the_rounding_table_counts_what_is_there(tmp_path):
    from benchmarks import rounding

    lines = list(rounding.by_storage(96, range(1), None, tmp_path))
    assert lines[2] == "| bf16 base, merged in bf16 | 8 | 8 |"
    assert len(lines) == 2 + 11
    assert rounding.cell([(8, 8), (8, 8)]) == "8"
    assert rounding.cell([(9, 8), (8, 8)]) == "**9, 8** (8, 8)"
