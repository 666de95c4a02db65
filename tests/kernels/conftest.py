"""Where the Triton kernels run in these tests: interpreted on the CPU, or compiled where there is a CUDA GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.background import compile_kernels
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU under Triton's interpreter, or CUDA with compiled kernels: a process has either."""
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA GPU, and TRITON_INTERPRET unset")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("test_interpreted.py runs it under TRITON_INTERPRET=1")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def triton_kernels() -> ModuleType:
    """The module under test."""
    pytest.importorskip("triton")
    from muon8bit_kernels.triton import kernels

    return kernels


@dataclass(frozen=True)
class CompiledKernels:
    """Every shipped kernel compiled for GPUs that need not be there: records by name and target, and their code."""

    folder: Path
    records: Mapping[tuple[str, str], Any]
    table: str

    def text(self, name: str, target: str, suffix: str) -> str:
        return (self.folder / target / f"{name}.{suffix}").read_text()


@pytest.fixture(scope="session")
def compiled(background) -> CompiledKernels:
    """What `background.compile_kernels` compiles, for tests with that mark."""
    pytest.importorskip("triton")
    from benchmarks.compile import compiling, table

    result, made = background(compile_kernels)
    assert result.returncode == 0, result.stdout + result.stderr
    folder = table.CACHE / f"compiled-{table.sources_key()}"
    return CompiledKernels(folder, compiling.load(folder), (made / "table.md").read_text())


@pytest.fixture(scope="session")
def hard_matrix() -> object:
    """A function of (cols, seed=0): fp32 [14, cols], every row another kind of block."""

    def make(cols: int, seed: int = 0) -> Tensor:
        rng = np.random.default_rng(seed)
        normal = rng.standard_normal((14, cols))
        f32 = np.finfo(np.float32)
        rows = normal.copy()
        rows[1] = np.exp(4 * normal[1]) * np.sign(rng.standard_normal(cols))  # log-normal
        rows[2] = 0.3  # constant
        rows[3] = -7.0  # all at -1 times the scale
        rows[4] = 0.0
        rows[5] = 0.0
        rows[5, cols // 2] = -2.5  # a single element
        rows[6] = normal[6] * 1e-40  # subnormal: stored as zero
        rows[7] = np.clip(normal[7] / 3, -1, 1) * float(f32.max)
        rows[8] = np.where(normal[8] > 0, 1, -1) * float(f32.max)
        rows[9] = np.clip(normal[9], -4, 4) * float(f32.tiny)  # scales just above the floor, values below it
        rows[10] = float(f32.tiny)  # the floor itself
        rows[11] = np.nextafter(f32.tiny, np.float32(0))  # the largest subnormal
        rows[12] = rng.integers(-127, 128, cols) / 127 + rng.choice([-0.5, 0.0, 0.5], cols) / 127  # around ties
        rows[13] = np.where(normal[13] > 0, -0.0, 0.0)
        return torch.from_numpy(rows.astype(np.float32))

    return make
