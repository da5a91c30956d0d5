"""Every snapshot that is there as tables; what was measured once is kept, since a snapshot does not change."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import NotFoundError
from spectra.reproduce.long.directions import against_base, along
from spectra.reproduce.long.measure import energy_shares, measure
from spectra.reproduce.long.pairs import compare_runs, run_pairs
from spectra.reproduce.long.plan import START, LongPlan, LongRun
from spectra.reproduce.long.sequences import TASKS
from spectra.reproduce.long.train import losses_of
from spectra.results.writing import write

if TYPE_CHECKING:
    import pandas as pd

Say = Callable[[str], None]
_KEPT = "measured"


@dataclass(frozen=True)
class Numbers:
    """What the figures and the page are made of.

    Attributes:
        matrices: run × step × matrix, the columns of `measure`.
        summary: run × step: held-out loss, and means over the matrices.
        pairs: run × compared_to × step: means over the matrices of the columns of `compare_runs`.
        losses: run × step × task.
        shares: run × part × index, at each run's last step, the columns of `energy_shares`.
        directions: run × step: the columns of `against_base` and `along`.
    """

    matrices: pd.DataFrame
    summary: pd.DataFrame
    pairs: pd.DataFrame
    losses: pd.DataFrame
    shares: pd.DataFrame
    directions: pd.DataFrame

    def save(self, pictures: Path) -> None:
        """As csv files; the one of all matrices is compressed."""
        for name in ("summary", "pairs", "losses", "shares", "directions"):
            table: pd.DataFrame = getattr(self, name)
            write(pictures / f"{name}.csv", table.to_csv(index=False, float_format="%.6g").encode())
        self.matrices.to_csv(pictures / "snapshots.csv.gz", index=False, float_format="%.6g",
                             compression={"method": "gzip", "mtime": 0})  # fmt: skip

    @classmethod
    def load(cls, pictures: Path) -> Numbers:
        """What `save` wrote."""
        import pandas as pd

        names = ("snapshots.csv.gz", "summary.csv", "pairs.csv", "losses.csv", "shares.csv", "directions.csv")
        return cls(*(pd.read_csv(pictures / name) for name in names))


def steps_there(run: LongRun, plan: LongPlan, directory: Path) -> list[int]:
    """Snapshots of the run that are whole."""
    return [step for step in plan.snapshots if losses_of(directory, run.name, step).is_file()]


def gather(plan: LongPlan, directory: Path, say: Say = lambda line: None) -> Numbers:
    """Measure and compare whatever is there.

    Raises:
        NotFoundError: no run has a snapshot after its start.
    """
    import pandas as pd

    there = {run: steps_there(run, plan, directory) for run in plan.runs()}
    moved = [(run, step) for run, steps in there.items() for step in steps if step > START]
    if not moved:
        raise NotFoundError(
            f"{directory} holds no run that has come to step {plan.first}: train first, without --so-far"
        )
    matrices, shares, pairs = [], [], []
    for run, step in moved:
        say(f"  {run.name}, step {step}")
        matrices.append(_kept(directory, f"{run.name}-{step}", partial(measure, run, step, plan, directory)))
        if step == there[run][-1]:
            name = f"{run.name}-{step}-shares"
            shares.append(_kept(directory, name, partial(energy_shares, run, step, plan, directory)))
    for a, b in run_pairs(plan):
        for step in there[a]:
            if step > START and step in there[b]:
                name = f"{a.name}-to-{b.name}-{step}"
                pairs.append(_kept(directory, name, partial(compare_runs, a, b, step, plan, directory)))
    every = pd.concat(matrices, ignore_index=True)
    directions = [_directions(run, [step for step in steps if step > START], plan, directory, say)
                  for run, steps in there.items() if steps and steps[-1] > START]  # fmt: skip
    compared = pd.concat(pairs, ignore_index=True) if pairs else pd.DataFrame(columns=["run", "compared_to", "step"])
    return Numbers(
        matrices=every,
        summary=_summary(there, every, directory),
        pairs=compared.groupby(["run", "compared_to", "step"], sort=False).mean(numeric_only=True).reset_index(),
        losses=_losses(there, directory),
        shares=pd.concat(shares, ignore_index=True),
        directions=pd.concat(directions, ignore_index=True),
    )


def _directions(run: LongRun, steps: list[int], plan: LongPlan, directory: Path, say: Say) -> pd.DataFrame:
    """A row per step of one run."""
    import pandas as pd

    say(f"  {run.name}, directions")
    of_steps = [
        _kept(directory, f"{run.name}-{step}-directions", partial(against_base, run, step, plan, directory))
        for step in steps
    ]
    last = _kept(directory, f"{run.name}-until-{steps[-1]}", partial(along, run, steps, plan, directory))
    return pd.concat(of_steps, ignore_index=True).merge(last, on=["run", "step"])


def _kept(directory: Path, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    path = directory / _KEPT / f"{name}.csv"
    if not path.is_file():
        write(path, make().to_csv(index=False).encode())
    return pd.read_csv(path)


def _record(directory: Path, run: LongRun, step: int) -> dict[str, Any]:
    losses: dict[str, Any] = json.loads(losses_of(directory, run.name, step).read_text())
    return losses


def _summary(there: Mapping[LongRun, list[int]], matrices: pd.DataFrame, directory: Path) -> pd.DataFrame:
    import pandas as pd

    means = matrices.groupby(["run", "step"]).mean(numeric_only=True).drop(columns="layer")
    rows = []
    for run, steps in there.items():
        for step in steps:
            record = _record(directory, run, step)
            known = means.loc[(run.name, step)].to_dict() if step > START else {}
            rows.append({"run": run.name, "label": run.label, "step": step, "lr": run.lr, "init_seed": run.init_seed,
                         "data_seed": run.data_seed, "loss": record["loss"], "seconds": record["seconds"],
                         **known})  # fmt: skip
    return pd.DataFrame(rows)


def _losses(there: Mapping[LongRun, list[int]], directory: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([
        {"run": run.name, "step": step, "task": " ".join(task), "loss": loss}
        for run, steps in there.items()
        for step in steps
        for task, loss in zip(TASKS, _record(directory, run, step)["by_task"], strict=True)
    ])  # fmt: skip
