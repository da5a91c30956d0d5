"""What a page's table must look like, from the csv."""

from __future__ import annotations

import re

TEXTS = ("name", "role", "status", "method", "reason", "note", "rounding")


def ordered(rows: list[dict[str, str]], key: str, descending: bool) -> list[dict[str, str]]:
    """The rows sorted by a column: numbers by value, texts with their numbers in numerical order, empty cells last."""

    def value(row: dict[str, str]) -> object:
        if key in TEXTS:
            return [
                (0, int(piece), "") if piece.isdigit() else (1, 0, piece.lower())
                for piece in re.split(r"(\d+)", row[key])
            ]
        return float(row[key])

    present = sorted((row for row in rows if row[key]), key=value, reverse=descending)
    return present + [row for row in rows if not row[key]]
