"""Second moments by Triton against the torch reference: sums within a bound, what is written bit for bit.

`test_interpreted.py` runs this file.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers.bitwise import assert_bitwise
from hypothesis import given, settings, strategies as st
from muon8bit_kernels import ElementMoment, reference

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("no GPU: test_interpreted.py runs it under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

SHAPES = [(2, 10, 200, 64), (3, 33, 70, 64), (1, 3, 2100, 2048), (2, 1, 5, 64), (1, 70, 9, 256)]


def directions(batch, rows, cols, dtype, across, device):
    values = torch.randn(batch, rows, cols, generator=torch.Generator().manual_seed(rows)).to(device, dtype) * 0.1
    values[0, 0] = 0.0
    return values.mT.contiguous().mT if across else values


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    across=st.booleans(),
    quantized=st.booleans(),
    clamped=st.booleans(),
    factors=st.sampled_from([None, "row", "column", "matrix"]),
    skip=st.sampled_from([None, 0.0, 1.0]),
    first_col=st.sampled_from([0, 37]),
    cautious=st.booleans(),
)
def test_second_moments_and_updates(
    device, triton_kernels, shape, dtype, across, quantized, clamped, factors, skip, first_col, cautious
):
    batch, rows, cols, size = shape
    O = directions(batch, rows, cols, dtype, across, device)  # noqa: E741
    generator = torch.Generator().manual_seed(1)
    blocks = -(-(first_col + cols) // size)
    codes = [
        torch.randint(0, 256, (1, rows, cols), generator=generator, dtype=torch.uint8)
        if quantized
        else torch.rand(1, rows, cols, generator=generator) * 0.01
        for _ in range(batch)
    ]
    steps = torch.rand(batch, rows, blocks, generator=generator).to(device) / 255 if quantized else None
    inverses = torch.rand(batch, rows, blocks, generator=generator).to(device) * 300 if quantized else None
    factor = {"row": (batch, rows, 1), "column": (batch, 1, cols), "matrix": (batch, 1, 1), None: None}[factors]
    factor = None if factor is None else torch.rand(factor, generator=generator).to(device)
    params = torch.randn(batch, rows, cols, generator=generator).to(device, dtype)
    made = []
    for kernels in (reference, triton_kernels):
        stored, updated = [code.to(device, copy=True) for code in codes], params.clone()
        moment = ElementMoment(stored, steps, 0.95, 1e-8, clamped, size, first_col)
        if first_col == 0:
            made.append(kernels.second_moment_stats(O, moment))
        how = {
            "decay": 0.9,
            "scale": 0.1,
            "cautious": cautious,
            "skip": None if skip is None else torch.tensor(skip, device=device),
        }
        kernels.update_params([updated], O, moment=moment, factors=factor, inverses=inverses, **how)
        made.append(torch.cat([updated, *stored]) if not quantized else updated)
        made += stored
    half = len(made) // 2
    if first_col == 0:
        torch.testing.assert_close(made[0], made[half], rtol=1e-5, atol=0.0)
    for ours, wanted in zip(made[half + (first_col == 0) :], made[first_col == 0 : half], strict=True):
        assert_bitwise(ours, wanted)
    if skip == 1.0:
        assert all(torch.equal(left.cpu(), right) for left, right in zip(made[-batch:], codes, strict=True))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_sums_of_rows_and_columns(device, triton_kernels, columns, across):
    for batch, rows, cols, _ in SHAPES:
        O = directions(batch, rows, cols, torch.bfloat16, across, device)  # noqa: E741
        wanted = O.double().square().sum(1 if columns else 2)
        for kernels in (reference, triton_kernels):
            torch.testing.assert_close(
                kernels.direction_squares(O, columns=columns).double(), wanted, rtol=1e-5, atol=0.0
            )
