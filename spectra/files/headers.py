"""The headers of files of safetensors or torch, by their suffix; those of one model on a server all at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from spectra.errors import NotFoundError, SourceError
from spectra.files import safetensors_file, training_state
from spectra.files.choice import WEIGHT_SUFFIXES
from spectra.files.far import is_remote
from spectra.files.header import Header
from spectra.files.storage import Place

_LANES = 16  # headers are small: each is a few round trips and no bytes to speak of


def read_headers(files: Sequence[Place]) -> list[Header | SourceError]:
    """The header of every file, or what is wrong with it; from a server side by side, since each is a wait."""

    def one(file: Place) -> Header | SourceError:
        try:
            return read_header(file)
        except SourceError as problem:
            return problem

    if len(files) < 2 or not is_remote(files[0]):
        return [one(file) for file in files]
    with ThreadPoolExecutor(min(len(files), _LANES)) as pool:
        return list(pool.map(one, files))


def read_header(file: Place) -> Header:
    """The header of one file of safetensors or torch, by its suffix.

    Raises:
        NotFoundError: there is no such file.
        SourceError: its kind is not known, or it is broken.
    """
    if is_remote(file):
        file.stamp()  # which says why there is none
    if not file.is_file():
        raise NotFoundError(f"{file} does not exist; the download may be incomplete")
    state = training_state.what(file.name)
    if state:
        raise SourceError(f"{file} is {state}")
    if file.suffix == ".safetensors":
        return safetensors_file.read_header(file)
    if file.suffix in WEIGHT_SUFFIXES:
        if is_remote(file):
            raise SourceError(
                f"{file} is a torch file, of which no part can be read alone: download the model (--download), or use "
                "its safetensors"
            )
        from spectra.files import torch_file  # needs torch, which the other headers do without

        return torch_file.read_header(file)
    raise SourceError(f"{file} is not a weights file: known suffixes are {', '.join(WEIGHT_SUFFIXES)}")
