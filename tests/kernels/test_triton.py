"""The Triton kernels against the torch reference, bit for bit: compiled on CUDA, or on the CPU if TRITON_INTERPRET=1.

Without a GPU, test_interpreted.py runs this file. The reference is always on the CPU: the arithmetic of record.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out
from muon8bit_kernels import CODE_DTYPES, reference
from muon8bit_kernels.codebooks import dynamic_midpoints

from muon8bit import Muon8bit

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("no GPU: test_interpreted.py runs it under TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
_tile = pytest.importorskip("muon8bit_kernels.triton_kernels")._tile

# The interpreter is numpy, which tells of the overflows that some inputs are meant to cause.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

BLOCK_SIZES = [64, 128, 256, 512, 1024, 2048, 4096]
CODEBOOKS = ["linear", "dynamic", None]


def bits(tensor):
    """On the CPU, as integers, so that -0.0 differs from 0.0; one bit pattern for all NaN."""
    tensor = torch.where(tensor.isnan(), torch.nan, tensor).cpu() if tensor.is_floating_point() else tensor.cpu()
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def assert_bitwise(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.equal(bits(actual), bits(expected))


def check_quantize(kernels, device, values, block_size):
    for codebook in ("linear", "dynamic"):
        options = {"codebook": codebook, "block_size": block_size}
        expected_codes, expected_scales = reference.quantize(values, **options)
        codes, scales = kernels.quantize(values.to(device), **options)
        assert_bitwise(codes, expected_codes)
        assert_bitwise(scales, expected_scales)
        assert_bitwise(
            kernels.dequantize(codes, scales, **options), reference.dequantize(codes.cpu(), scales.cpu(), **options)
        )


def check_steps(
    kernels, device, momentum, grads, *, codebook, block_size, nesterov, beta=0.95, out_dtype=torch.float32
):
    """Run both from the same momentum over `grads`, in whatever strides those have, and compare everything."""
    codes, scales = momentum.clone(), None
    if codebook is not None:
        codes, scales = reference.quantize(momentum, codebook=codebook, block_size=block_size)
    our_codes, our_scales = codes.to(device, copy=True), None if scales is None else scales.to(device, copy=True)
    options = {"beta": beta, "nesterov": nesterov, "codebook": codebook, "block_size": block_size}
    for grad in grads:
        out = laid_out(torch.zeros(grad.shape, dtype=out_dtype), "sliced")
        our_grad = torch.empty_strided(grad.shape, grad.stride(), dtype=grad.dtype, device=device).copy_(grad)
        our_out = torch.empty_strided(out.shape, out.stride(), dtype=out_dtype, device=device)
        absmax, sumsq = reference.momentum_stats(codes, scales, grad, **options)
        our_absmax, our_sumsq = kernels.momentum_stats(our_codes, our_scales, our_grad, **options)
        assert_bitwise(our_absmax, absmax)
        # Two sums of the same n squares, each within n / 2**24 of the true one.
        torch.testing.assert_close(our_sumsq.cpu(), sumsq, rtol=2 * block_size * 2**-24, atol=0, equal_nan=True)
        norm = sumsq.sum().sqrt().clamp(1e-7, 1e18)  # so that a sum that overflowed leaves something of u
        reference.momentum_apply(codes, scales, grad, absmax, norm, out, **options)
        kernels.momentum_apply(our_codes, our_scales, our_grad, our_absmax, norm.to(device), our_out, **options)
        assert_bitwise(our_out, out)
        assert_bitwise(our_codes, codes)
        assert codebook is None or torch.equal(bits(our_scales), bits(scales))


def random_steps(rows, cols, dtype, layout, steps=3, seed=0):
    """A momentum and gradients whose rows differ in size, one row zero."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(rows, 1, generator=generator).exp()
    size[rows // 2] = float(rows == 1)
    matrices = [torch.randn(rows, cols, generator=generator) * size for _ in range(steps + 1)]
    return matrices[0], [laid_out(grad.to(dtype), layout) for grad in matrices[1:]]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_quantize_and_dequantize_equal_reference_bitwise(triton_kernels, device, hard_matrix, block_size):
    check_quantize(triton_kernels, device, hard_matrix(block_size + 37), block_size)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 5), (9, 1), (3000, 1), (1025, 2), (33, 65), (3, 64), (17, 129)])
def test_quantize_equals_reference_on_narrow_and_ragged_shapes(triton_kernels, device, rows, cols):
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, cols, generator=generator) * (3 * torch.randn(rows, 1, generator=generator)).exp()
    check_quantize(triton_kernels, device, values, 64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["columns", "sliced"])
def test_quantize_takes_any_float_dtype_and_strides(triton_kernels, device, dtype, layout):
    values = torch.randn(9, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    for codebook in ("linear", "dynamic"):
        codes, scales = triton_kernels.quantize(laid_out(values, layout).to(device), codebook=codebook, block_size=64)
        expected = reference.quantize(values, codebook=codebook, block_size=64)
        assert_bitwise(codes, expected[0])
        assert_bitwise(scales, expected[1])


def test_dynamic_codes_equal_reference_at_every_midpoint_and_its_neighbours(triton_kernels, device):
    midpoints = dynamic_midpoints().numpy()[:-1]
    near = [midpoints]
    for towards in (-2, 2):
        near += [np.nextafter(midpoints, np.float32(towards)), midpoints * np.float32(1 + towards * 2e-7)]
    values = torch.from_numpy(np.stack([np.concatenate([[np.float32(1)], row]) for row in near]))
    check_quantize(triton_kernels, device, values, 256)


def test_dynamic_codes_equal_reference_all_over_the_unit_interval(triton_kernels, device):
    """Every 4096th fp32 number of magnitude up to one: the closed form has no gap between the midpoints either."""
    patterns = torch.arange(0, 0x3F800000, 4096, dtype=torch.int32)
    patterns = patterns[patterns > 0x33000000 if device.type == "cpu" else patterns >= 0]
    magnitudes = patterns.view(torch.float32)
    values = torch.stack([magnitudes, -magnitudes]).view(-1)
    values = torch.cat([values, values.new_zeros(-len(values) % 4095)]).view(-1, 4095)
    check_quantize(triton_kernels, device, torch.cat([torch.ones(len(values), 1), values], 1), 4096)


def test_linear_ties_go_to_the_even_code(triton_kernels, device):
    values = torch.arange(-253, 255, 2)[None] * 2.0**-8  # (k + 1/2) / 128 of a scale of 127 / 128, from -126.5 to 126.5
    values = torch.cat([torch.tensor([[127 / 128]]), values], 1)
    codes, _ = triton_kernels.quantize(values.to(device), codebook="linear", block_size=256)
    assert codes.cpu().tolist() == [[127, *(round(k / 2) for k in range(-253, 255, 2))]]


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 2e36, 1e-30])
def test_quantize_gives_all_codes_back(triton_kernels, device, scale):
    for codebook, codes in {
        "linear": torch.arange(-127, 128).to(torch.int8)[None],
        "dynamic": torch.arange(256).to(torch.uint8)[None],
    }.items():
        scales = torch.tensor([[scale]], device=device)
        values = triton_kernels.dequantize(codes.to(device), scales, codebook=codebook, block_size=256)
        if codebook == "linear":
            values[0, -1] = scale  # (127 * s) / 127 may be one unit off
        again, scales_again = triton_kernels.quantize(values, codebook=codebook, block_size=256)
        assert_bitwise(again, codes)
        assert_bitwise(scales_again, scales.cpu())


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_steps_equal_reference_bitwise_at_every_block_size(triton_kernels, device, hard_matrix, codebook, block_size):
    cols = block_size + 37
    momentum = hard_matrix(cols)[:7]  # gradients of every kind, onto a momentum of a few
    # not beyond what a linear code can give back: (code * s) / 127 overflows in its product
    grads = [hard_matrix(cols, seed)[7 * (seed % 2) :][:7].clamp(-1e36, 1e36) for seed in (1, 2)]
    check_steps(
        triton_kernels, device, momentum, grads, codebook=codebook, block_size=block_size, nesterov=block_size != 128
    )


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 300),
    block_size=st.sampled_from([64, 128]),
    codebook=st.sampled_from(CODEBOOKS),
    nesterov=st.booleans(),
    beta=st.sampled_from([0.95, 0.9, 0.0, 0, 1 / 3]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layout=st.sampled_from(["rows", "columns", "sliced"]),
    out_dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_steps_equal_reference_bitwise_on_any_shape(
    triton_kernels, device, rows, cols, block_size, codebook, nesterov, beta, dtype, layout, out_dtype
):
    momentum, grads = random_steps(rows, cols, dtype, layout)
    options = {"codebook": codebook, "block_size": block_size, "nesterov": nesterov, "beta": beta}
    check_steps(triton_kernels, device, momentum, grads, **options, out_dtype=out_dtype)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2100, 1), (1, 64), (70, 3)])
def test_steps_equal_reference_bitwise_on_narrow_shapes(triton_kernels, device, codebook, rows, cols):
    momentum, grads = random_steps(rows, cols, torch.float32, "rows")
    check_steps(triton_kernels, device, momentum, grads, codebook=codebook, block_size=64, nesterov=True)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_forty_steps_equal_reference_bitwise(triton_kernels, device, codebook):
    momentum, grads = random_steps(3, 100, torch.float32, "rows", steps=40)
    check_steps(triton_kernels, device, momentum, grads, codebook=codebook, block_size=64, nesterov=True)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_gradient_shows_in_its_block_alone(triton_kernels, device, codebook, bad):
    state, scales = torch.ones(7, 150, device=device), None
    options = {"codebook": codebook, "block_size": 64}
    if codebook is not None:
        state, scales = triton_kernels.quantize(state, **options)
    places = [(0, 0), (1, 63), (2, 64), (3, 127), (4, 128), (5, 149), (6, 140)]
    grad = torch.ones(7, 150, device=device)
    expected = torch.ones(7, 3, dtype=torch.bool)
    for row, col in places:
        grad[row, col] = bad
        expected[row, col // 64] = False
    absmax, sumsq = triton_kernels.momentum_stats(state, scales, grad, beta=0.95, nesterov=True, **options)
    assert torch.equal(absmax.isfinite().cpu(), expected)
    assert torch.equal(sumsq.isfinite().cpu(), expected)
    assert_bitwise(
        absmax, reference.momentum_stats(
            state.cpu(), None if scales is None else scales.cpu(), grad.cpu(), beta=0.95, nesterov=True, **options
        )[0],
    )  # fmt: skip


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_absmax_of_a_block_of_nan_is_nan(triton_kernels, device, codebook):
    state, scales = torch.zeros(2, 70, device=device), None
    if codebook is not None:
        state, scales = triton_kernels.quantize(state, codebook=codebook, block_size=64)
    grad = torch.full((2, 70), torch.nan, device=device)
    absmax, _ = triton_kernels.momentum_stats(
        state, scales, grad, beta=0.9, nesterov=False, codebook=codebook, block_size=64
    )
    assert bool(absmax.isnan().all())


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_what_lies_past_the_end_of_the_rows_is_left_alone(triton_kernels, device, codebook):
    """The matrix is the middle of larger buffers; the guards around it keep their values."""
    rows, cols, guard = 5, 70, 64

    def guarded(shape, dtype):
        size = shape[0] * shape[1]
        buffer = torch.full((guard + size + guard,), 77, dtype=dtype, device=device)
        return buffer, buffer[guard : guard + size].view(shape)

    state = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    options = {"codebook": codebook, "block_size": 64}
    code_dtype = torch.float32 if codebook is None else CODE_DTYPES[codebook]
    buffers = [
        guarded((rows, cols), code_dtype),
        guarded((rows, 2), torch.float32),
        guarded((rows, cols), torch.float32),
    ]
    (_, codes), (_, scales), (_, out) = buffers
    if codebook is None:
        codes.copy_(state)
    else:
        for ours, made in zip((codes, scales), reference.quantize(state, **options), strict=True):
            ours.copy_(made)
    grad = torch.ones(rows, cols, device=device)
    absmax = torch.ones(rows, 2, device=device)
    norm = torch.ones((), device=device)
    triton_kernels.momentum_apply(
        codes, None if codebook is None else scales, grad, absmax, norm, out, beta=0.9, nesterov=True, **options
    )
    for buffer, inner in buffers:
        assert bool((buffer[:guard] == 77).all())
        assert bool((buffer[guard + inner.numel() :] == 77).all())


@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((3, 16, 25), {"split_sizes": (5, 11)}),  # rows of codes that start at odd addresses
        ((2, 8, 120), {"split_sizes": (40, 80), "split_dim": -1}),
        ((6, 9, 3, 3), {"flatten": True}),
    ],
)
def test_steps_of_stacks_and_pieces_equal_those_with_the_reference(device, shape, group, codebook):
    """State bitwise; parameters after two steps by the rounding of the sums of squares and of the products."""
    generator, results = torch.Generator().manual_seed(0), []
    start, grads = torch.randn(shape, generator=generator), torch.randn(2, *shape, generator=generator)
    for backend, place in (("triton", device), ("reference", "cpu")):
        param = torch.nn.Parameter(start.to(place))
        options = {"block_size": 64, "codebook": codebook, "backend": backend, "ns_dtype": torch.float32}
        optimizer = Muon8bit([{"params": [param], **group}], lr=1.0, **options)
        for grad in grads:
            param.grad = grad.to(place)
            optimizer.step()
        results.append((param.detach().cpu(), optimizer.state[param]))
    (ours, our_state), (theirs, their_state) = results
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for key, value in their_state.items():
        assert_bitwise(our_state[key], value)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_matrices_without_elements_pass_through(triton_kernels, device, shape):
    options = {"codebook": "linear", "block_size": 64}
    codes, scales = triton_kernels.quantize(torch.empty(shape, device=device), **options)
    assert codes.shape == shape
    assert scales.shape == (shape[0], min(shape[1], 1))
    assert triton_kernels.dequantize(codes, scales, **options).shape == shape
    grad, norm = torch.empty(shape, device=device), torch.ones((), device=device)
    absmax, _ = triton_kernels.momentum_stats(codes, scales, grad, beta=0.9, nesterov=True, **options)
    triton_kernels.momentum_apply(
        codes, scales, grad, absmax, norm, torch.empty_like(grad), beta=0.9, nesterov=True, **options
    )


def test_what_the_kernels_cannot_do_raises(triton_kernels, device):
    codes, scales = torch.zeros(4, 6, dtype=torch.int8, device=device), torch.zeros(4, 1, device=device)
    with pytest.raises(ValueError, match="codes must be contiguous"):
        triton_kernels.dequantize(codes.t().contiguous().t(), scales, codebook="linear", block_size=64)
    with pytest.raises(ValueError, match="power of two"):
        triton_kernels.dequantize(codes, scales, codebook="linear", block_size=48)


@triton.jit
def offsets_kernel(offsets, rows, cols, col_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, col, _, _, _ = _tile(rows, cols, ROWS, BLOCK)
    places = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(offsets + places, row * cols + col * col_stride)


def test_offsets_beyond_two_to_the_31_are_computed_in_64_bits(device):
    offsets = torch.empty(256, 16, dtype=torch.int64, device=device)
    offsets_kernel[(1,)](offsets, 256, 2**30 + 16, 2**28, ROWS=256, BLOCK=16)
    expected = torch.arange(256)[:, None] * (2**30 + 16) + torch.arange(16) * 2**28
    assert int(expected.max()) > 2**37
    assert torch.equal(offsets.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "cols"), [(512, 2048), (1000, 768), (4096, 16), (333, 5001)])
def test_compiled_steps_equal_reference_bitwise_on_large_shapes(
    triton_kernels, device, codebook, out_dtype, rows, cols
):
    if device.type != "cuda":
        pytest.skip("the interpreter truncates bf16 and is slow")
    momentum, grads = random_steps(rows, cols, torch.bfloat16, "rows", steps=20)
    options = {"codebook": codebook, "block_size": 2048, "nesterov": True}
    check_steps(triton_kernels, device, momentum, grads, **options, out_dtype=out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
def test_compiled_step_equals_reference_bitwise_beyond_two_to_the_31_elements(triton_kernels, device, codebook):
    if device.type != "cuda" or torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs a CUDA GPU of 24 GiB")
    rows, cols, last = 2**19 + 5, 4096, 3
    momentum, grads = random_steps(last, cols, torch.bfloat16, "rows", steps=1)
    options = {"codebook": codebook, "block_size": 2048}
    codes = torch.zeros(rows, cols, dtype=CODE_DTYPES[codebook], device=device)
    scales = torch.zeros(rows, 2, device=device)
    grad = torch.zeros(rows, cols, dtype=torch.bfloat16, device=device)
    small = reference.quantize(momentum, **options)
    codes[-last:], scales[-last:], grad[-last:] = small[0].to(device), small[1].to(device), grads[0].to(device)
    out, norm = torch.empty_like(grad), torch.tensor(3.7)
    absmax, _ = triton_kernels.momentum_stats(codes, scales, grad, beta=0.9, nesterov=True, **options)
    triton_kernels.momentum_apply(codes, scales, grad, absmax, norm.to(device), out, beta=0.9, nesterov=True, **options)
    expected = torch.empty(last, cols, dtype=torch.bfloat16)
    small_absmax, _ = reference.momentum_stats(*small, grads[0], beta=0.9, nesterov=True, **options)
    reference.momentum_apply(*small, grads[0], small_absmax, norm, expected, beta=0.9, nesterov=True, **options)
    assert_bitwise(out[-last:], expected)
    assert_bitwise(codes[-last:], small[0])
    assert_bitwise(scales[-last:], small[1])
