"""Runs the tests of the Triton kernels under Triton's interpreter, in a process of its own.

Triton takes TRITON_INTERPRET when it is imported, which other tests have done by now; and in a process that has it,
nothing can be compiled, and a backend that is to be refused on the CPU is not.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest


def interpreted(_folder: Path) -> tuple[list[object], dict[str, str]]:
    """The tests that have a `device`."""
    suites = [
        Path(__file__).with_name(f"test_triton_{name}.py")
        for name in ("exact", "quantize", "momentum", "cut", "update", "second_moment", "tiles", "tiny", "gemm")
    ]
    command = [sys.executable, "-m", "pytest", *suites, "-m", "not gpu", "-p", "no:cacheprovider"]
    return command, {**os.environ, "TRITON_INTERPRET": "1"}


@pytest.mark.background(command=interpreted)
def test_triton_kernels_interpreted_equal_reference_bitwise(background):
    pytest.importorskip("triton")
    result, _ = background(interpreted)
    assert result.returncode == 0, result.stdout + result.stderr
    # Every test ran: a suite that skips itself would prove nothing.
    assert re.search(r"\d\d passed", result.stdout), result.stdout
    assert "skipped" not in result.stdout, result.stdout
