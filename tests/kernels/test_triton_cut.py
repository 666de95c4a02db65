"""The Triton step of some columns against the torch reference, bit for bit; test_interpreted.py runs this file too."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.bitwise import assert_bitwise, on
from helpers.layouts import laid_out
from helpers.momentum_steps import random_stacks, state_of
from muon8bit_kernels import num_blocks, reference

from benchmarks.gpu import first_cases
from benchmarks.gpu.first_cases import compare

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("no GPU: test_interpreted.py runs it under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
CODEBOOKS = ["linear", "dynamic", None]
# In the interpreter a product of bf16 is garbage.
CASES = [case for case in first_cases.CASES if not case.name.startswith("product bf16")]


def step(kernels, device, codes, scales, grads, norms, flag, *, first_col, out_layout="rows", **options):
    """Both phases on copies on the device: sums, maxima, codes, scales and output, on the CPU."""
    codes, grads = [on(device, stack) for stack in codes], [on(device, grad) for grad in grads]
    scales = None if scales is None else [on(device, stack) for stack in scales]
    sums, maxima = kernels.momentum_stats_cut(codes, scales, grads, first_col=first_col, **options)
    new_scales = None
    if scales is not None:  # what other ranks found: larger here and there, and of the blocks that lie elsewhere
        new_scales = torch.cat(scales).mul(0.5).add(0.25)
        first = first_col // options["block_size"]
        touched = new_scales[..., first : first + maxima.shape[-1]]
        touched.copy_(torch.where(torch.arange(touched.shape[1], device=device)[:, None] % 2 == 0, maxima, maxima * 2))
    out = laid_out(torch.full((len(norms), *codes[0].shape[1:]), 3.0), out_layout)
    out, norms, skip = on(device, out), norms.to(device), None if flag is None else torch.tensor(flag, device=device)
    kernels.momentum_apply_cut(codes, scales, grads, new_scales, norms, out, first_col=first_col, skip=skip, **options)
    return sums.cpu(), [t.cpu() for t in (maxima, *codes, *(scales or []), out)]


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(
    ("cols", "first", "width", "block_size", "layout", "out_layout", "flag"),
    [
        (150, 0, 150, 64, "rows", "rows", None),  # all of them
        (300, 100, 130, 64, "rows", "rows", 0.0),  # within a block at both ends
        (1000, 272, 48, 256, "rows", "columns", None),  # a part of two blocks, less than a tile
        (300, 65, 3, 64, "sliced", "rows", 1.0),  # of one block; nothing is written
        (500, 129, 300, 256, "columns", "rows", None),  # in pieces of columns
        (300, 64, 64, 64, "row piece", "rows", float("nan")),
        (300, 100, 130, 64, "rows", "rows", [0.0, 1.0, 0.0]),  # of the second matrix nothing is written
    ],
)
def test_some_columns_equal_the_reference_bitwise(
    triton_kernels, device, codebook, cols, first, width, block_size, layout, out_layout, flag
):
    counts, rows, span = [1, 2], 19 if layout == "columns" else 5, slice(first, first + width)
    options = {"codebook": codebook, "block_size": block_size, "nesterov": block_size == 64, "beta": 0.9}
    codes, scales = state_of(random_stacks(counts, rows, cols), codebook=codebook, block_size=block_size)
    codes = [stack[..., span].contiguous() for stack in codes]
    grads = random_stacks(counts, rows, width, torch.bfloat16, layout, seed=1)
    norms = torch.tensor([2.0, 0.5, 3.0])
    arguments = codes, scales, grads, norms, flag
    options |= {"first_col": first, "out_layout": out_layout}
    sums, found = step(triton_kernels, device, *arguments, **options)
    their_sums, expected = step(reference, torch.device("cpu"), *arguments, **options)
    assert sums.shape == (3, rows, num_blocks(first + width, block_size) - first // block_size)
    torch.testing.assert_close(sums, their_sums, rtol=2 * block_size * 2**-24, atol=0)
    for ours, theirs in zip(found, expected, strict=True):
        assert_bitwise(ours, theirs)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_a_non_finite_gradient_shows_in_its_part_of_a_block_alone(triton_kernels, device, codebook):
    codes, scales = state_of([torch.ones(1, 4, 200)], codebook=codebook, block_size=64)
    grad, expected = torch.ones(1, 4, 100), torch.ones(1, 4, 3, dtype=torch.bool)
    for row, col, block, bad in ((0, 0, 0, torch.nan), (1, 28, 1, torch.inf), (3, 92, 2, -torch.inf)):
        grad[0, row, col], expected[0, row, block] = bad, False
    ours = [on(device, codes[0][..., 100:200].contiguous())], None if scales is None else [on(device, scales[0])]
    options = {"first_col": 100, "beta": 0.0, "nesterov": True, "codebook": codebook, "block_size": 64}
    sums, _ = triton_kernels.momentum_stats_cut(*ours, [on(device, grad)], **options)
    assert torch.equal(sums.isfinite().cpu(), expected)


def test_tensors_of_other_shapes_are_refused(triton_kernels, device):
    codes, scales = state_of([torch.ones(1, 4, 200)], codebook="linear", block_size=64)
    tensors = [on(device, codes[0])], [on(device, scales[0])], [torch.ones(1, 4, 200, device=device)]
    options = {"first_col": 0, "beta": 0.9, "nesterov": True, "codebook": "linear", "block_size": 64}
    out, norms = torch.empty(1, 4, 200, device=device), torch.ones(1, device=device)
    with pytest.raises(ValueError, match=r"new_scales \(1, 4, 3\) must be \(1, 4, 4\)"):
        triton_kernels.momentum_apply_cut(*tensors, torch.ones(1, 4, 3, device=device), norms, out, **options)
    with pytest.raises(ValueError, match="must be of 1 matrices"):
        triton_kernels.momentum_apply_cut(*tensors, torch.ones(1, 4, 4, device=device), norms, out[..., 1:], **options)
    with pytest.raises(ValueError, match="power of two"):
        triton_kernels.momentum_stats_cut(*tensors, **{**options, "block_size": 100})


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_cases_of_the_first_call_on_a_gpu_agree(triton_kernels, device, case):
    """With tiny shapes: what that call compares is right in the interpreter too."""
    compare(case.run(triton_kernels, device, True), case.run(reference, torch.device("cpu"), True))
