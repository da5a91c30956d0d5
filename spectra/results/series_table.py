"""The table of a series: its columns, where its directory keeps the steps, and the medians of roles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from spectra import naming
from spectra.results.tables import Row

TABLE = "series.csv"
MEASURED = ("norm", "relative_norm", "stable_rank", "top_1_share", "effective_rank")
COMPARED = ("phi_to_last", "phi_to_previous", "start_left", "start_right")  # each with its chance level
LEVELS = tuple(column for name in COMPARED for column in (name, f"{name}_chance"))
COLUMNS = ("step", "checkpoint", "name", "role", "layer", "status", *MEASURED, "k", *LEVELS, "reason", "note")
_STEPS = "checkpoints"
_FOLDER = "step-"


def stored_steps(directory: Path) -> dict[int, Path]:
    """Step → the results directory of its checkpoint, for those that a series' directory holds."""
    folders = (folder for folder in directory.glob(f"{_STEPS}/{_FOLDER}*") if (folder / "spectra").is_dir())
    numbered = {folder.name.removeprefix(_FOLDER): folder for folder in folders}
    return {int(number): numbered[number] for number in sorted(numbered, key=len) if number.isdigit()}


def step_folder(directory: Path, step: int) -> Path:
    """Where a series' directory keeps the spectra of a step."""
    return directory / _STEPS / f"{_FOLDER}{step}"


def is_series(directory: str | Path) -> bool:
    """Whether a series was stored there, with its table."""
    return Path(directory, TABLE).is_file() and Path(directory, _STEPS).is_dir()


def by_role(rows: Sequence[Row], columns: Sequence[str] = (*MEASURED, *LEVELS)) -> list[Row]:
    """One row per step and role: how many matrices, and the median of each column over those that have a value.

    Roles stand in the model's order.

    Example:
        >>> rows = [{"step": 1, "role": "q_proj", "status": "ok", "norm": norm} for norm in (1.0, 2.0, 6.0)]
        >>> found = by_role(rows)[0]
        >>> found["step"], found["role"], found["matrices"], found["norm"], found["phi_to_last"]
        (1, 'q_proj', 3, 2.0, None)
    """
    groups: dict[tuple[int, str], list[Row]] = {}
    for line in rows:
        if line["status"] == "ok":
            groups.setdefault((line["step"], line["role"]), []).append(line)
    roles = naming.in_model_order(role for _, role in groups)
    return [
        {"step": step, "role": role, "matrices": len(groups[step, role])}
        | {name: _median(line.get(name) for line in groups[step, role]) for name in columns}
        for step, role in sorted(groups, key=lambda group: (group[0], roles.index(group[1])))
    ]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.median(known)) if known else None
