"""What a stored run was made of, opened again: for what it does not hold."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from spectra.deltas.source import Source
from spectra.errors import SpectraError, StoreError
from spectra.results import fingerprint, run_file
from spectra.results.collection import Spectra
from spectra.sources import open_source


def recorded_source(run: Spectra, top: int) -> Source:
    """The source that a stored run was made from, with the run's matrices, if its files are as they were.

    Args:
        run: what `load` gives.
        top: how many vectors are wanted of it, for the command in the message.

    Raises:
        StoreError: the run does not say what it was made of, or that is gone or has changed; the message has the
            command that makes it anew.
    """
    inputs = run.run.get("inputs", {})
    if not inputs.get("tuned"):
        raise StoreError(
            f"{run.directory} holds no singular vectors and does not say what it was made of: "
            f"make it again with decompose(…, top={top}, out=…) (spectra svd … --top {top} --out …)"
        )
    command = command_for(run, inputs, top)
    try:
        source = open_source(inputs["tuned"], inputs.get("base"), **run_file.options_of(inputs))
        source = source.select(list(run.names))
    except SpectraError as problem:
        raise StoreError(
            f"{run.directory} holds no singular vectors, and what it was made of cannot be read ({problem}); "
            f"where it is, run: {command}"
        ) from None
    before = [(Path(path).name, file) for path, file in inputs.get("files", {}).items()]
    for path, file in fingerprint.of_files(source).items():
        if not any(name == Path(path).name and fingerprint.same(old, file) for name, old in before):
            raise StoreError(
                f"{run.directory} holds no singular vectors, and {path} is not what it was made of any more: "
                f"make it again in another directory: {command}"
            )
    return source


def command_for(run: Spectra, inputs: dict[str, Any], top: int) -> str:
    """The command that makes a run again, with vectors."""
    options = run_file.options_of(inputs)
    words = ["spectra", "svd", "--tuned", inputs["tuned"]]
    words += ["--base", inputs["base"]] if inputs.get("base") else []
    words += ["--heads", str(options["heads"])] if options.get("heads", "mean") != "mean" else []
    words += ["--scale", f"{options['scale']:g}"] if options.get("scale") is not None else []
    words += [] if options.get("split", True) else ["--no-split"]
    return shlex.join([*words, "--top", str(top), "--out"]) + " DIR"
