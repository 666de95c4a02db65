"""Triton's quantize and dequantize against the torch reference, bit for bit: compiled on CUDA, or interpreted.

Without a GPU, test_interpreted.py runs this file under TRITON_INTERPRET=1. The reference is always on the CPU: the
arithmetic of record.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from helpers.bitwise import assert_bitwise
from helpers.layouts import laid_out
from muon8bit_kernels import reference
from muon8bit_kernels.codebooks import dynamic_midpoints
from muon8bit_kernels.self_check import self_check

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("no GPU: test_interpreted.py runs it under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

# The interpreter is numpy, which tells of the overflows that some inputs are meant to cause.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

BLOCK_SIZES = [64, 128, 256, 512, 1024, 2048, 4096]


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


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_matrices_without_elements_pass_through(triton_kernels, device, shape):
    options = {"codebook": "linear", "block_size": 64}
    codes, scales = triton_kernels.quantize(torch.empty(shape, device=device), **options)
    assert codes.shape == shape
    assert scales.shape == (shape[0], min(shape[1], 1))
    assert triton_kernels.dequantize(codes, scales, **options).shape == shape


def test_what_the_kernels_cannot_do_raises(triton_kernels, device):
    codes, scales = torch.zeros(4, 6, dtype=torch.int8, device=device), torch.zeros(4, 1, device=device)
    with pytest.raises(ValueError, match="codes must be contiguous"):
        triton_kernels.dequantize(codes.t().contiguous().t(), scales, codebook="linear", block_size=64)
    with pytest.raises(ValueError, match="power of two"):
        triton_kernels.dequantize(codes, scales, codebook="linear", block_size=48)


def test_self_check_passes(triton_kernels, device):
    """What runs once before the first step on a device."""
    self_check(triton_kernels, device)
