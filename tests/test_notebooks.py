"""The notebooks run as they are committed, and what they show is what the code gives."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from support import notebooks

README = (notebooks.FOLDER.parent / "README.md").read_text()
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:work|tmp|home|root|Users|usr|opt|var|mnt|data)/|\b[A-Z]:\\\\")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")

every_notebook = pytest.mark.parametrize("path", notebooks.PATHS, ids=lambda path: path.stem)


@cache
def committed(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: streams by name, results by their formats."""
    return [output.get("name") or sorted(output.get("data", ())) for output in cell.outputs]


def text(cell):
    """The plain text of a cell's outputs."""
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def test_there_are_notebooks():
    assert "first-tour" in [path.stem for path in notebooks.PATHS]


@every_notebook
def test_it_runs_and_shows_what_is_committed(path, real_pair):
    before, after = code(committed(path)), code(notebooks.executed(path))
    for old, new in zip(before, after, strict=True):
        assert kinds(old) == kinds(new), f"{old.source}\n\nrun `python -m support.notebooks` in tests/"
        assert NUMBER.sub("0", text(old)).split() == NUMBER.sub("0", text(new)).split(), old.source
        numbers = [[float(number) for number in NUMBER.findall(text(cell))] for cell in (old, new)]
        assert numbers[1] == pytest.approx(numbers[0], rel=0.02, abs=0.002), old.source


@every_notebook
def test_it_is_committed_as_run_from_top_to_bottom(path):
    notebook = committed(path)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) > len(cells) / 2
    assert notebook.metadata.kernelspec.name == "python3"
    assert all("execution" not in cell.metadata for cell in cells), "no time stamps"


@every_notebook
def test_its_outputs_are_clean_and_small(path):
    for cell in code(committed(path)):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", cell.source
            assert " at 0x" not in text(cell), cell.source
    assert path.stat().st_size < 600_000


@every_notebook
def test_it_names_no_path_of_one_machine(path):
    notebook = committed(path)
    for cell in code(notebook):
        for output in cell.outputs:
            shown = {kind: data for kind, data in output.get("data", {}).items() if not kind.startswith("image/")}
            assert not ABSOLUTE.search(json.dumps(shown) + output.get("text", "")), cell.source
    for cell in notebook.cells:
        assert not ABSOLUTE.search(cell.source)


@every_notebook
def test_it_defines_nothing_that_the_library_should_have(path):
    for cell in code(committed(path)):
        tree = ast.parse(TransformerManager().transform_cell(cell.source))
        defined = [
            node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        ]
        assert not defined, cell.source


@every_notebook
def test_the_readme_names_it(path):
    assert f"notebooks/{path.name}" in README
