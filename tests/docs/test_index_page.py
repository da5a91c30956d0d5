"""The page of a package index: what pyproject.toml takes from the README, without what would lead nowhere there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def page():
    """The page as hatch-fancy-pypi-readme makes it: https://github.com/hynek/hatch-fancy-pypi-readme."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    made = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = ""
    for piece in made["fragments"]:
        if "text" in piece:
            text += piece["text"]
            continue
        whole = (ROOT / piece["path"]).read_text()
        start, end = piece.get("start-after", ""), piece["end-before"]
        assert whole.count(end) == 1
        assert start == "" or whole.count(start) == 1
        text += whole.partition(end)[0].partition(start)[2] if start else whole.partition(end)[0]
    for change in made["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    return text


def test_an_index_shows_all_of_the_page():
    text = page()
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert all(target.startswith("https://") for target in targets)
    assert "![" not in text
    assert "make demo" not in text
    assert "spectra svd ckpt/ --base llama-7b" in text
    assert "`pip install torch weight-spectra`" in text
    assert text.count("```") == 2
