"""Tables that a command keeps beside its results, read again: json with its rows under `matrices`, or csv."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectra.errors import StoreError
from spectra.results.shelf import number_of

Document = Mapping[str, Any]
_LARGEST = 512 * 2**20


def read_document(path: Path) -> Document:
    """What a table says, with its rows under `matrices`; of a csv these and its name, None where a cell is empty.

    Raises:
        StoreError: it is damaged.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is larger than any table")
        if path.suffix == ".csv":
            import pandas as pd

            rows = pd.read_csv(path, keep_default_na=False, na_values=[""]).to_dict("records")
            return {"kind": path.stem, "matrices": [{str(k): _known(v) for k, v in row.items()} for row in rows]}
        document = json.loads(path.read_text(encoding="utf-8"), parse_int=number_of)
        if not isinstance(document, dict) or not all(isinstance(row, dict) for row in document.get("matrices", [0])):
            raise ValueError("it holds no rows of matrices")
        return document
    except (OSError, ValueError, RecursionError) as problem:
        raise damaged(path, problem) from None


def damaged(path: Path, why: object) -> StoreError:
    """The error that tells of a table which is not as it was written."""
    return StoreError(f"{path} is damaged ({why}); the command that made it writes it anew")


def _known(value: Any) -> Any:
    if isinstance(value, int) and abs(value) >= 2**63:
        return number_of(str(value))
    return None if isinstance(value, float) and math.isnan(value) else value
