"""The kernels' divisions by fused multiply-adds against numpy's, bit for bit; test_interpreted.py runs this file too.

Triton's interpreter runs the kernels' code with a fused multiply-add that is rounded once, as on a GPU.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.bitwise import assert_bitwise
from helpers.momentum_steps import Both
from muon8bit_kernels import reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_interpreted.py runs it under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from triton.runtime import interpreter

from benchmarks.robustness import exact_divisions
from benchmarks.robustness.exact_divisions import (
    COLS,
    ROWS,
    fused,
    hard_pairs,
    num_wrong_over,
    num_wrong_over_linear_max,
    over,
    over_linear_max,
    random_pairs,
    true_fma,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TILE = ROWS * COLS
INF, NAN = np.inf, np.nan


@pytest.fixture
def device():
    """The suite's name for where kernels run: here, whatever GPU is there."""
    return torch.device("cpu")


def test_emulated_fma_equals_libm():
    """All kinds of numbers, and sums that cancel down to the last bits of the product."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    rng = np.random.default_rng(0)
    x, y, z = rng.integers(-(2**31), 2**31, (3, 12_000), dtype=np.int64).astype(np.int32).view(np.float32)
    z[4000:] = -(x[4000:] * y[4000:])
    x[8000:], y[8000:] = x[8000:] * np.float32(2**-70), np.float32(2**-40)  # subnormal products
    z[8000:] = rng.integers(0, 2**24, 4000).astype(np.int32).view(np.float32)
    expected = np.float32([fmaf(*numbers) for numbers in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)])
    np.testing.assert_array_equal(true_fma(x, y, z), expected)
    assert (x.astype(np.float32) * y + z != expected).any()


@pytest.mark.parametrize("exponent", [0, 127])
def test_every_mantissa_is_divided_by_127_exactly(exponent):
    """Exponent 0: the subnormal numbers."""
    patterns = np.arange(exponent << 23, (exponent + 1) << 23, dtype=np.int32)
    assert num_wrong_over_linear_max(patterns.view(np.float32)) == 0
    assert num_wrong_over_linear_max(-patterns[:TILE].view(np.float32)) == 0


def test_subnormal_quotients_by_127_are_exact():
    """Of normal numbers up to 127 times the least, an odd stride of all; the benchmark takes every one."""
    patterns = np.arange(1 << 23, 9 << 23, 61, dtype=np.int32)
    assert num_wrong_over_linear_max(patterns[: len(patterns) // TILE * TILE].view(np.float32)) == 0


def test_random_and_hard_pairs_are_divided_exactly():
    rng = np.random.default_rng(1)
    for _ in range(5):
        assert num_wrong_over(*random_pairs(rng, 2048)) == 0
    assert num_wrong_over(*hard_pairs(rng, 1024)) == 0


def test_scales_at_the_ends_of_the_range_are_divided_by_exactly():
    """The floor and its neighbours, the largest numbers, and the scales where the power of two changes."""
    rng = np.random.default_rng(2)
    values, _ = random_pairs(rng, ROWS)
    scales = np.float32([2.0**-126, 2.0**-64, 2.0**64, 1.0, np.finfo(np.float32).max])
    patterns = scales.view(np.int32)[:, None] + np.arange(-20, 32)
    patterns = patterns[(patterns >= 1 << 23) & (patterns < 255 << 23)]
    scales = np.resize(patterns, ROWS).astype(np.int32).view(np.float32)
    values = scales[:, None] * (rng.random(values.shape) * 1.001).astype(np.float32).clip(max=1)
    assert num_wrong_over(values, scales) == 0


def test_zeros_and_what_is_no_number_are_divided_as_by_the_reference():
    special = np.float32([0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, 2.0**-149, -(2.0**-140)])
    products = np.resize(special, (ROWS, COLS))
    np.testing.assert_array_equal(over_linear_max(products), products / np.float32(127))
    scales = np.resize(np.float32([0.0, INF, NAN]), ROWS)
    expected = products / np.where(scales == 0, INF, scales).astype(np.float32)[:, None]
    finite = np.where(np.isfinite(products) & (scales[:, None] == 0), products * np.float32(2.0**-126), products)
    np.testing.assert_array_equal(over(finite, scales), np.where(scales[:, None] == 0, finite / INF, expected))


def test_a_fused_multiply_add_that_is_rounded_twice_is_found_out():
    def twice(_self, x, y, z):
        return interpreter.TensorHandle(x.data * y.data + z.data, z.dtype.scalar)

    rng = np.random.default_rng(3)
    with mock.patch.object(exact_divisions, "_create_fma", twice):
        assert num_wrong_over_linear_max(np.arange(127 << 23, (127 << 23) + TILE, dtype=np.int32).view(np.float32)) > 0
        assert num_wrong_over(*random_pairs(rng, ROWS)) > 0
        assert num_wrong_over(*hard_pairs(rng, ROWS)) > 0


@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
def test_kernels_with_fused_operations_equal_reference_bitwise(triton_kernels, device, hard_matrix, codebook):
    options = {"codebook": codebook, "block_size": 128}
    values = hard_matrix(128 + 37)
    with fused():
        codes, scales = triton_kernels.quantize(values, **options)
        decoded = triton_kernels.dequantize(codes, scales, **options)
    expected = reference.quantize(values, **options)
    assert_bitwise(codes, expected[0])
    assert_bitwise(scales, expected[1])
    assert_bitwise(decoded, reference.dequantize(*expected, **options))
    with fused():
        both = Both(triton_kernels, device, [values[None, :7]], **options, nesterov=True, beta=0.95)
        for seed in (1, 2):
            grads = [hard_matrix(128 + 37, seed)[7 * (seed % 2) :][:7].clamp(-1e36, 1e36)[None]]
            both.check_apply(grads, both.check_stats(grads))
