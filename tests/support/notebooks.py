"""Notebooks: run from top to bottom in a fresh kernel.

cd tests
python -m support.notebooks          # runs all and writes their outputs into the files
python -m support.notebooks tour     # those with "tour" in their name
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
_SECONDS = 300  # for one cell


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs that it gives now, run in its own folder; the file is not touched.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=_SECONDS,
        kernel_name=_KERNEL["name"],
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    with tempfile.TemporaryDirectory() as profile:
        client.execute(env=_environment(profile))
    notebook.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": {"name": "python"}})
    return notebook


def _environment(profile: str) -> dict[str, str]:
    """What the kernel sees: no start-up files of the user, no other drawing backend, no device of this machine."""
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return {**kept, "IPYTHONDIR": profile, "CUDA_VISIBLE_DEVICES": ""}


def main(word: str = "") -> None:
    """Run the notebooks whose name holds the word and write them with their outputs."""
    for path in PATHS:
        if word in path.name:
            nbformat.write(executed(path), path)


if __name__ == "__main__":
    main(*sys.argv[1:])
