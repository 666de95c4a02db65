"""What a compiler may do to the arithmetic of record, looked for in the code for a GPU that need not be there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = [
    "quantize-linear-wide",
    "quantize-dynamic-wide",
    "dequantize-linear-wide",
    "dequantize-dynamic-wide",
    *(f"momentum_stats-{codebook}-wide" for codebook in ("linear", "dynamic", None)),
    *(f"momentum_apply-{codebook}-{shape}" for codebook in ("linear", "dynamic", None) for shape in ("wide", "narrow")),
]
UPDATES = [f"update_param-{name}" for name in ("float32-nearest", "bfloat16-nearest", "bfloat16-stochastic")]
ROUNDING = "round_stochastic-bfloat16-stochastic"
CODE_OUTPUTS = [name for name in KERNELS if name.startswith(("quantize-linear", "momentum_apply-linear"))]
# Without a division, which ptxas expands into exact fused operations of its own.
UNDIVIDED = ["dequantize-dynamic-wide", "momentum_stats-dynamic-wide", "momentum_stats-None-wide", *UPDATES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as the wrappers launch them on bf16 gradients, compiled for sm_90."""
    folder = tmp_path_factory.mktemp("compiled")
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    subprocess.run([sys.executable, script, folder, "90"], env=environment, check=True)
    return folder


def instructions(text: str, pattern: str) -> list[int]:
    """The places of the instructions whose name matches."""
    return [
        match.start() for match in re.finditer(rf"^\s*(?:/\*\w+\*/)?\s*(?:@!?\S+ )?\s*{pattern}", text, re.MULTILINE)
    ]


@pytest.mark.parametrize("name", [*KERNELS, *UPDATES])
def test_ptx_rounds_every_operation_by_itself(folder, name):
    ptx = (folder / name).with_suffix(".ptx").read_text()
    assert not re.findall(r"\bfma\S*|\bmad\.\S*f32|\bdiv\.(?:full|approx)\S*|\brcp\S*|\S*\.ftz\S*", ptx)
    names = set(re.findall(r"\b(?:add|sub|mul|div)\.\S*f32", ptx))
    assert names - {"add.f32"} <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}  # add.f32: sums over threads
    assert len(instructions(ptx, r"mul\.rn\.f32")) > 0


@pytest.mark.parametrize("name", UNDIVIDED)
def test_machine_code_has_no_fused_multiply_add(folder, name):
    sass = (folder / name).with_suffix(".sass").read_text()
    assert len(instructions(sass, "FMUL")) > 0
    assert not instructions(sass, "FFMA")


@pytest.mark.parametrize("name", CODE_OUTPUTS)
def test_rounding_to_nearest_even_is_not_folded_away(folder, name):
    ptx = (folder / name).with_suffix(".ptx").read_text()
    added, taken = len(re.findall("0f4B400000", ptx)), len(re.findall("0fCB400000", ptx))
    assert added == taken > 0


@pytest.mark.parametrize("name", [*(name for name in KERNELS if name.startswith("momentum_apply")), *UPDATES])
def test_what_is_written_in_place_is_written_only_after_every_thread_has_read_it(folder, name):
    ptx = (folder / name).with_suffix(".ptx").read_text()
    loads, stores = instructions(ptx, r"ld\.global"), instructions(ptx, r"st\.global")
    assert any(loads[-1] < barrier < stores[0] for barrier in instructions(ptx, r"bar\.sync"))


@pytest.mark.parametrize("name", [*KERNELS, *UPDATES, ROUNDING])
def test_codes_gradients_and_parameters_move_16_bytes_at_a_time(folder, name):
    ptx = (folder / name).with_suffix(".ptx").read_text()
    widths = set(re.findall(r"\b(?:ld|st)\.global\.(\S+)", ptx))
    assert widths <= {"v4.b32", "b32"}  # b32: scales, the map, the norm
    assert len(instructions(ptx, r"(?:ld|st)\.global\.v4\.b32")) >= 3


@pytest.mark.parametrize("name", [*UPDATES, ROUNDING])
def test_update_spills_nothing_and_rounds_on_the_bits(folder, name):
    """No local memory; and no conversion to bf16 of the hardware's, which would hide what the integers did."""
    ptx = (folder / name).with_suffix(".ptx").read_text()
    assert not re.findall(r"\b(?:ld|st)\.local", ptx)
    assert not instructions((folder / name).with_suffix(".sass").read_text(), r"(?:LDL|STL)\b")
    assert not instructions(ptx, r"cvt\.\S*bf16")
