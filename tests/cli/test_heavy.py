"""Importing torch without the garbage collector: it is back afterwards, whatever happened."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from spectra.cli.heavy import heavy_imports


@pytest.mark.parametrize("problem", [None, ImportError])
def test_the_collector_is_off_inside_and_on_afterwards(problem):
    try:
        with heavy_imports():
            assert not gc.isenabled()
            if problem:
                raise problem
    except ImportError:
        assert problem
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_what_draws_is_loaded_beside_and_a_failure_is_left_to_whoever_draws():
    code = (
        "import sys; from spectra.cli.heavy import load_drawing\n"
        "sys.modules.update({'matplotlib': None} if 'broken' in sys.argv else {})\n"
        "load_drawing().join(); print('matplotlib.backends.backend_pdf' in sys.modules)"
    )
    for given, there in (["whole", "True"], ["broken", "False"]):
        done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=True)
        assert (done.stdout.strip(), done.stderr) == (there, "")
