"""Damaged files of every format: no crash, hang or unbounded allocation. The long run is in CONTRIBUTING."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_kept_cases_and_a_few_fresh_ones():
    command = [sys.executable, "-W", "ignore", "-m", "support.fuzz", "--cases", "fuzz_cases.txt", "--count", "5"]
    result = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " cases: " in result.stdout
