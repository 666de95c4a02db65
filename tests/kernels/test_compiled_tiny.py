"""The one-launch step of small matrices in the code for GPUs that need not be there."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
from helpers.background import compile_kernels

from benchmarks.compile.cases import COMPILED_FOR

pytestmark = pytest.mark.background(command=compile_kernels)
# Of every kernel the small side and the elements of a tile.
SIZES = {
    **{("tiny-wide-16", target): (16, 4096) for target in ("sm_80", "sm_90", "sm_100")},
    **{("tiny-tall-64", target): (64, 4096) for target in ("sm_80", "sm_90", "sm_100")},
    ("tiny-tall-16", "sm_90"): (16, 4096),
    ("tiny-wide-32", "sm_90"): (32, 4096),
    ("tiny-tall-32", "sm_90"): (32, 4096),
    ("tiny-wide-64", "sm_90"): (64, 4096),
    ("tiny-wide-16-dynamic-stochastic", "sm_90"): (16, 4096),
    ("tiny-tall-64-dynamic-stochastic", "sm_90"): (64, 4096),
    ("tiny-wide-64-cautious", "sm_90"): (64, 4096),
    ("tiny-wide-64-None-fp32", "sm_90"): (64, 4096),
    ("tiny-wide-16-block-64-flags", "sm_90"): (16, 1024),
}
CASES = {case: sizes for case, sizes in SIZES.items() if case[1] in COMPILED_FOR}


def places(ptx: str, pattern: str) -> list[int]:
    """Where the instructions stand whose name matches."""
    return [match.start() for match in re.finditer(rf"^\s*(?:@!?\S+ )?\s*{pattern}", ptx, re.MULTILINE)]


def test_every_case_is_looked_at(compiled):
    assert {job for job in compiled.records if job[0].startswith("tiny")} == set(CASES)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_fits_into_registers_and_shared_memory(compiled, case):
    record = compiled.records[case]
    assert record.spilled_bytes == 0
    assert record.registers <= 224
    assert record.shared_bytes <= 48 * 1024  # what a launch gets everywhere without asking for more


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_only_products_and_divisions_multiply_and_add_in_one_and_in_fp32(compiled, case):
    """As many fused operations as these have, and nothing else; no product on tensor cores, in TF32."""
    ptx, (small, tile) = compiled.text(*case, "ptx"), CASES[case]
    threads = 32 * compiled.records[case].num_warps
    found = len(places(ptx, r"fma\.rn\.f32 ")) + 2 * len(places(ptx, r"fma\.rn\.f32x2 "))
    # In the code R and O stand once, the square products five times: R^2 before and in the loop, ZR, (ZR)Z, ZQ.
    products = (2 * small * tile + 5 * small**3) // threads
    # Of 16 elements a thread decodes linear codes twice, by 2 each; a quotient takes 3, a scale 1, a dynamic guess 7.
    divisions = 0 if "None" in case[0] else 16 * (3 + 7) + 1 if "dynamic" in case[0] else 16 * (2 * 2 + 3) + 1
    assert found == products + divisions
    others = set(re.findall(r"\b(?:fma|mad)\.\S*f\S+", ptx)) - {"fma.rn.f32", "fma.rn.f32x2"}
    assert not others
    assert not re.findall(r"\bw?g?mma\S*|\btcgen05\S*|\bdiv\.(?:full|approx)\S*|\brcp\S*|\S*\.ftz\S*", ptx)
    assert set(re.findall(r"\b(?:sub|mul|div)\.\S*f32", ptx)) <= {"sub.rn.f32", "mul.rn.f32", "div.rn.f32"}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_matrices_move_16_bytes_at_a_time(compiled, case):
    """Codes and gradients twice, parameters once, each at least one load a thread."""
    ptx = compiled.text(*case, "ptx")
    widths = set(re.findall(r"\b(?:ld|st)\.global\.(\S+)", ptx))
    assert widths <= {"v4.b32", "b32", "nc.b32", "b64"}  # b32: scales, maxima, the flag; nc: the map; b64: the table
    assert len(places(ptx, r"ld\.global\.v4\.b32")) >= (14 if "None" in case[0] else 8)
    assert len(places(ptx, r"st\.global\.v4\.b32")) >= 3


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_what_is_written_in_place_is_written_only_after_every_thread_has_read_it(compiled, case):
    ptx = compiled.text(*case, "ptx")
    loads, stores = places(ptx, r"ld\.global\.v4\.b32"), places(ptx, r"st\.global\.v4\.b32")
    assert any(loads[-1] < barrier < stores[0] for barrier in places(ptx, r"bar\.sync"))
