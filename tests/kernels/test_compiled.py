"""What a compiler may do to the arithmetic of record, looked for in the code for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

NVIDIA = ["sm_80", "sm_90", "sm_100"]
# Without a division, which the assembler expands into exact fused operations of its own.
UNDIVIDED = ["stats-dynamic", "stats-None", "update-fp32", "update-bf16", "update-bf16-stochastic"]


@dataclass
class Kernel:
    record: dict[str, Any]  # of compile_kernels.Compiled
    texts: dict[str, str]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function of a target: its kernels as the wrappers launch them, by name; compiled once, out of this process."""
    folder, targets = tmp_path_factory.mktemp("compiled"), {}

    def kernels(target: str) -> dict[str, Kernel]:
        if target not in targets:
            script = Path(__file__).with_name("compile_kernels.py")
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            subprocess.run([sys.executable, script, folder, target], env=environment, check=True)
            targets[target] = {
                record["name"]: Kernel(
                    record,
                    {path.suffix[1:]: path.read_text() for path in (folder / target).glob(f"{record['name']}.*")},
                )
                for record in json.loads((folder / f"{target}.json").read_text())
            }
            assert set(targets[target]) >= {
                *UNDIVIDED,
                "stats-linear",
                *(f"apply-{c}" for c in ("linear", "dynamic", None)),
            }
        return targets[target]

    return kernels


def instructions(text: str, pattern: str) -> list[int]:
    """The places of the instructions whose name matches."""
    return [
        match.start() for match in re.finditer(rf"^\s*(?:/\*\w+\*/)?\s*(?:@!?\S+ )?\s*{pattern}", text, re.MULTILINE)
    ]


@pytest.mark.parametrize("target", [*NVIDIA, "gfx942"])
def test_no_kernel_spills_a_register(compiled, target):
    assert {name: k.record["spilled_bytes"] for name, k in compiled(target).items()} == dict.fromkeys(
        compiled(target), 0
    )


@pytest.mark.parametrize("target", [*NVIDIA, "gfx942"])
def test_every_target_has_the_registers_and_shared_memory_for_a_thousand_threads(compiled, target):
    """So that loads of many programs are under way at once: 64 Ki registers and 64 KiB and more to a multiprocessor."""
    for name, kernel in compiled(target).items():
        programs = 1024 // (kernel.record["num_warps"] * (64 if target == "gfx942" else 32))
        assert 0 < kernel.record["registers"] <= 80, name
        assert kernel.record["shared_bytes"] * programs <= 64 * 2**10, name


@pytest.mark.parametrize("target", NVIDIA)
def test_ptx_rounds_every_operation_by_itself_and_adds_in_a_fixed_order(compiled, target):
    for name, kernel in compiled(target).items():
        ptx = kernel.texts["ptx"]
        assert not re.findall(r"\bfma\S*|\bmad\.\S*f32|\bdiv\.(?:full|approx)\S*|\brcp\S*|\S*\.ftz\S*", ptx), name
        assert not re.findall(r"\b(?:atom|red)\.\S*", ptx), name
        names = set(re.findall(r"\b(?:add|sub|mul|div)\.\S*f32", ptx))
        # add.f32: sums over threads
        assert names - {"add.f32"} <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}, name
        assert name == "round-stochastic" or len(instructions(ptx, r"mul\.rn\.f32")) > 0, name


@pytest.mark.parametrize("target", NVIDIA)
def test_machine_code_without_divisions_has_no_fused_multiply_add(compiled, target):
    for name in UNDIVIDED:
        counts = compiled(target)[name].record["instructions"]
        assert sum(count for kind, count in counts.items() if kind.startswith("FMUL")) > 0, name
        assert not [kind for kind in counts if kind.startswith("FFMA")], name


def test_amd_code_without_divisions_has_no_fused_multiply_add(compiled):
    for name in UNDIVIDED:
        counts = compiled("gfx942")[name].record["instructions"]
        assert [kind for kind in counts if re.match(r"v_(?:pk_)?mul_f32", kind)], name
        assert not [kind for kind in counts if re.match(r"v_(?:pk_)?(?:fma|mac|mad)\w*_f32", kind)], name


@pytest.mark.parametrize("target", NVIDIA)
def test_what_is_written_in_place_is_written_only_after_every_thread_has_read_it(compiled, target):
    for name, kernel in compiled(target).items():
        if name.startswith(("apply", "update")):
            ptx = kernel.texts["ptx"]
            loads, stores = instructions(ptx, r"ld\.global"), instructions(ptx, r"st\.global")
            assert any(loads[-1] < barrier < stores[0] for barrier in instructions(ptx, r"bar\.sync")), name


@pytest.mark.parametrize("target", NVIDIA)
def test_codes_gradients_and_parameters_move_16_bytes_at_a_time(compiled, target):
    for name, kernel in compiled(target).items():
        widths = re.findall(r"\b(?:ld|st)\.global\.(\S+)", kernel.texts["ptx"])
        # b32: scales, map, norms, flag; b64: the table. Of pieces a thread has 8 elements, and 8 bytes of codes.
        assert set(widths) <= {"v4.b32", "b32", "b64", *(["v2.b32"] if "across" in name else [])}, name
        assert widths.count("v4.b32") >= (1 if name == "stats-linear-across" else 3), name


def test_codes_and_gradients_move_16_bytes_at_a_time_on_amd(compiled):
    for name, kernel in compiled("gfx942").items():
        counts = kernel.record["instructions"]
        loads = {kind for kind in counts if re.match(r"(?:global|buffer)_load", kind)}
        assert [kind for kind in loads if kind.endswith("dwordx4")], (name, loads)


@pytest.mark.parametrize("target", NVIDIA)
def test_update_rounds_on_the_bits(compiled, target):
    """No conversion to bf16 of the hardware's, which would hide what the integers did."""
    for name, kernel in compiled(target).items():
        if name.startswith(("update", "round")):
            assert not instructions(kernel.texts["ptx"], r"cvt\.\S*bf16"), name
