"""What became of the symmetric product's tilings in machine code for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from muon8bit_kernels.gemm_tilings import TILINGS

# Shared memory that a program may have, in bytes.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """What compile_gemm.py prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, Path(__file__).with_name("compile_gemm.py")]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def test_every_tiling_is_compiled_for_both_orders(records):
    found = {(record["target"], *record["name"].split("-")[1:4]) for record in records}
    for capability in (80, 90, 100):
        for tiling in TILINGS[capability]:
            sizes = f"{tiling.block_m}x{tiling.block_n}x{tiling.block_k}"
            for rest in (("bfloat16", "flat"), ("float16", "tall")):
                assert (f"sm_{capability}", sizes, *rest) in found


def test_nothing_is_spilled_and_shared_memory_suffices(records):
    for record in records:
        assert record["local_bytes"] == 0, record
        assert not {"LDL", "STL"} & set(record["instructions"]), record
        assert 0 < record["registers"] <= 255, record
        assert 0 < record["shared_bytes"] <= SHARED_LIMIT[record["target"]], record


def test_tilings_of_other_architectures_fit_into_99_kib(records):
    sizes = [f"{tiling.block_m}x{tiling.block_n}x{tiling.block_k}" for tiling in TILINGS[None]]
    shared = [r["shared_bytes"] for r in records if r["target"] == "sm_80" and r["name"].split("-")[1] in sizes]
    assert len(shared) >= 2 * len(sizes)
    assert max(shared) <= 99 * 1024


def test_half_precision_runs_on_the_widest_tensor_core_instruction(records):
    for record in records:
        count = record["instructions"]
        if "float32" in record["name"]:  # neither TF32 nor halves
            assert not set(TENSOR_CORE.values()) & set(count), record
            assert count["FFMA"] >= 64 * 64 * 32 // 128, record
        else:
            assert count[TENSOR_CORE[record["target"]]] > 0, record
            assert set(TENSOR_CORE.values()) & set(count) == {TENSOR_CORE[record["target"]]}, record


def test_operands_and_results_move_16_bytes_at_a_time_or_by_tma(records):
    for record in records:
        count = record["instructions"]
        if record["name"].endswith("-tma"):
            assert count["UTMALDG"] > 0, record
            assert "LDGSTS.128" not in count, record
        else:
            assert count["LDGSTS.128"] > 0, record
        assert count["LDG.128"] > 0, record  # D
        assert count["STG.128"] > 0, record
        assert not {"LDG", "STG", "LDGSTS"} & set(count), record
