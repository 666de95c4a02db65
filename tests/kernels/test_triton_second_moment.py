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


def stored(codes, offsets, width):
    """Codes [1, rows, cols] each as columns of wider rows, from its own offset on, and these rows."""
    wide = [torch.full((1, code.shape[1], width), 7, dtype=code.dtype, device=code.device) for code in codes]
    views = [w[..., at : at + code.shape[2]] for w, code, at in zip(wide, codes, offsets, strict=True)]
    for view, code in zip(views, codes, strict=True):
        view.copy_(code)
    return views, wide


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    param_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    across=st.booleans(),
    quantized=st.booleans(),
    clamped=st.booleans(),
    factors=st.sampled_from([None, "row", "column", "matrix"]),
    skip=st.sampled_from([None, 0.0, 1.0, [0.0, 1.0, torch.nan], [1.0, 0.0, 0.0]]),
    first_col=st.sampled_from([0, 37, 128]),
    extra=st.sampled_from([0, 3, 24]),
    cautious=st.booleans(),
)
def test_second_moments_and_updates(
    device,
    triton_kernels,
    shape,
    dtype,
    param_dtype,
    across,
    quantized,
    clamped,
    factors,
    skip,
    first_col,
    extra,
    cautious,
):
    """Also where the codes are some columns of wider rows, of which one matrix is aligned and the next is not."""
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
    params = torch.randn(batch, rows, cols, generator=generator).to(device, param_dtype)
    flags = None if skip is None else torch.tensor(skip[:batch] if isinstance(skip, list) else skip, device=device)
    found = []
    for kernels in (reference, triton_kernels):
        offsets = [min(extra, 3) * (matrix % 2) for matrix in range(batch)]
        views, wide = stored([code.to(device) for code in codes], offsets, cols + extra)
        updated, stats = params.clone(), None
        moment = ElementMoment(views, steps, 0.95, 1e-8, clamped, size, first_col)
        if first_col == 0:
            stats = kernels.second_moment_stats(O, moment)
        how = {"decay": 0.9, "scale": 0.1, "cautious": cautious, "skip": flags, "factors": factor, "inverses": inverses}
        kernels.update_params([updated], O, moment=moment, **how)
        found.append((updated, views, wide, stats))
    (wanted, _, wanted_wide, wanted_stats), (updated, views, wide, stats) = found
    if stats is not None:
        torch.testing.assert_close(stats, wanted_stats, rtol=1e-5, atol=0.0)
    for ours, theirs in zip([updated, *wide], [wanted, *wanted_wide], strict=True):
        assert_bitwise(ours, theirs)
    each = [0.0] * batch if flags is None else flags.expand(batch).tolist()
    for flag, view, code, new, param in zip(each, views, codes, updated, params, strict=True):
        assert torch.equal(view.cpu(), code) == torch.equal(new, param) == (flag != 0), flag


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
