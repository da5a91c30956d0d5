"""The campaign's judges: each finds a fault that is planted for it, and says nothing where there is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from campaign import judges
from campaign.__main__ import modules
from campaign.case import Case, HarmError
from campaign.children import Ended
from campaign.journal import Journal, Line
from support.spectra_runs import matrices
from support.warm import TESTS, Warm

import spectra

# A fault, and the cases that have to find it.
FAULTS = {
    "a loader that ignores the checksum": (
        "from spectra.results import shelf\n"
        "shelf.Shelf._piece = lambda self, name, only: shelf.read_piece(self.path(name), only, verify=False)",
        [f"flip/svd/1-{number}" for number in range(8)],
    ),
    "partial files that nobody removes": (
        "from spectra.results import writing\nwriting._sweep = lambda folder: None",
        [f"kill/svd/1-{number}" for number in range(8)],
    ),
    "a reader that is off by one": (
        "from spectra.files.tensors import TensorRef\n"
        "read = TensorRef.read\n"
        "TensorRef.read = lambda self, device='cpu': read(self, device).roll(1)",
        [f"readers/lora/1-{number}" for number in range(8)],
    ),
    "a reader that never ends": (
        "from campaign.areas import AREAS\n"
        "import campaign.readers\n"
        "def endless(path):\n"
        "    while True:\n"
        "        pass\n"
        "campaign.readers.open_folder = endless\n"
        "AREAS['readers'].seconds = 1",
        ["readers/raw-safetensors/1-0"],
    ),
    "a command that takes more than its memory": (
        "import torch\n"
        "from spectra.deltas.delta import WeightDelta\n"
        "read = WeightDelta.read\n"
        "def greedy(self, device='cpu'):\n"
        "    if self.shape[0] > 8 and '.0.' in self.name:\n"
        "        torch.ones(500 * 2**20, dtype=torch.uint8).sum()\n"
        "    return read(self, device)\n"
        "WeightDelta.read = greedy",
        ["memory/svd/1-0"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def warm():
    with Warm("campaign.areas", *modules()) as processes:
        yield processes


def campaign(warm: Warm, fault: str, cases: list[str], place: Path) -> str:
    """What the campaign prints of cases in a library with a fault."""
    code = f"import sys\nfrom campaign.__main__ import main\n{fault}\nsys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": "1"}
    words = ["--keep", str(place), "--case", *cases]
    done = warm.run(code, words, into=place.with_name("said"), environment=environment)
    assert done.stderr == ""
    assert (done.returncode == 1) == ("FAILED" in done.stdout)
    return done.stdout


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, warm, tmp_path):
    fault, cases = FAULTS[name]
    said = campaign(warm, fault, cases, tmp_path / "kept")
    assert "FAILED" in said, said
    kept = sorted((tmp_path / "kept" / "failed").iterdir())
    assert kept
    assert (kept[0] / "why.txt").read_text().startswith("python -m campaign --case ")


def test_nothing_is_found_where_there_is_no_fault(warm, tmp_path):
    cases = [cases[0] for _, cases in FAULTS.values()]
    assert "FAILED" not in campaign(warm, "", list(dict.fromkeys(cases)), tmp_path / "kept")
    assert not (tmp_path / "kept" / "failed").exists()


def test_a_case_is_its_name():
    case = Case.parse("kill/svd/4711-3")
    assert (case.area, case.kind, case.seed, case.number, str(case)) == ("kill", "svd", 4711, 3, "kill/svd/4711-3")
    assert case.rng.random() == Case("kill", "svd", 4711, 3).rng.random()
    assert case.rng.random() != Case("kill", "svd", 4711, 4).rng.random()


@pytest.mark.parametrize(
    ("status", "err", "fine"),
    [
        (0, "", True), (1, "Error: out is full; make room", True), (-11, "", False), (91, "x", False), (1, "", False),
        (1, "Error: this and that went wrong\nError: and something else, too", False), (1, "Error: ", False),
        (0, "Traceback (most recent call last):\n  …", False), (2, "Usage: …\nError: No such option: --x", False),
    ],
)  # fmt: skip
def test_one_message(status, err, fine):
    ended = Ended(status, "", err, 1.0, 0)
    if fine:
        judges.one_message(ended)
    else:
        with pytest.raises(HarmError):
            judges.one_message(ended)


def test_late_is_not_ended():
    with pytest.raises(HarmError, match="not done after"):
        judges.one_message(Ended(0, "", "", 1.0, 0, late=True))


def test_folders_are_the_same_but_for_the_times_of_a_run(tmp_path):
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "table.csv").write_text("same")
        said = {"started": number, "finished": number, "checksum": number, "inputs": {}}
        (tmp_path / name / "run.json").write_text(json.dumps(said))
    judges.same_folders(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / ".x.partial").write_text("")
    with pytest.raises(HarmError, match=r"too many files: \['.x.partial'\]"):
        judges.same_folders(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / ".x.partial").unlink()
    (tmp_path / "a" / "table.csv").write_text("sane")
    with pytest.raises(HarmError, match=r"table.csv is not as"):
        judges.same_folders(tmp_path / "a", tmp_path / "b")


def test_a_wrong_array_is_wrong_and_a_damaged_one_missing(tmp_path):
    kept = list(matrices())
    spectra.save(kept, tmp_path / "right")
    spectra.save(kept, tmp_path / "found")
    assert judges.never_wrong(tmp_path / "found", tmp_path / "right") == 0
    file = sorted((tmp_path / "found" / "spectra").iterdir())[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert judges.never_wrong(tmp_path / "found", tmp_path / "right") == 1
    kept[1].S[0] += 1e-12
    spectra.save(kept[1:], tmp_path / "other")
    with pytest.raises(HarmError, match="a wrong S of"):
        judges.never_wrong(tmp_path / "other", tmp_path / "right")


def test_a_campaign_that_was_stopped_goes_on(tmp_path):
    journal = Journal.of(tmp_path / "12", 12, 30)
    journal.write(Line("kill/svd/12-0", "killed", 2.0, 5))
    journal.write(Line("flip/svd/12-0", "FAILED", 1.0, 7, failed=True))
    with (tmp_path / "12" / "cases.jsonl").open("a") as file:
        file.write('\n{"case": "kill/svd/12-1", "outc')  # killed while it wrote
    assert Journal.unfinished(tmp_path, 60) is None
    seed, again = Journal.unfinished(tmp_path, 30)
    assert (seed, again.seconds(), again.seconds("kill/")) == (12, 3.0, 2.0)
    assert again.counts() == {"kill/svd": 1, "flip/svd": 1}
    assert [line.case for line in again.failures] == ["flip/svd/12-0"]
    again.write(Line("kill/svd/12-1", "killed", 1800.0, 5))
    assert len(Journal(tmp_path / "12").lines) == 3
    assert Journal.unfinished(tmp_path, 30) is None
    kill, flip = again.table(["kill", "flip"]).splitlines()[1:]
    assert kill.split() == ["kill", "2", "0", "1802", "0", "MiB", "2", "killed"]
    assert flip.split() == ["flip", "1", "1", "1", "0", "MiB", "1", "FAILED"]
