"""The codebooks against bitsandbytes, whose decoding ours equals bit for bit."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest
import torch
from muon8bit_kernels import CODE_DTYPES, codebooks, dynamic_map, reference, unsigned_dynamic_map, zero_code
from muon8bit_kernels.codebooks import dynamic_guesses, dynamic_midpoints

# Of the 256 fp32 values, little-endian: codes in checkpoints mean these.
UNSIGNED_MAP = "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"
BLOCK_SIZES = [64, 128, 256, 512, 1024, 2048, 4096]


@pytest.fixture(scope="module")
def bitsandbytes():
    return pytest.importorskip("bitsandbytes.functional")


def test_dynamic_map_equals_bitsandbytes_bitwise(bitsandbytes):
    theirs = bitsandbytes.create_dynamic_map(signed=True)
    assert torch.equal(dynamic_map().view(torch.int32), theirs.view(torch.int32))


def test_unsigned_dynamic_map_equals_bitsandbytes_bitwise(bitsandbytes):
    theirs = bitsandbytes.create_dynamic_map(signed=False)
    assert torch.equal(unsigned_dynamic_map().view(torch.int32), theirs.view(torch.int32))


def test_unsigned_dynamic_map_is_what_the_checkpoint_format_says():
    """Decade d of 7 has 2^(d+1) levels: the means of neighbours of that many and one even steps from 0.1 to 1, times
    10^(d-6); in float64, to a unit of fp32 in each boundary."""
    values = unsigned_dynamic_map()
    decades = [np.linspace(0.1, 1, 2 ** (d + 1) + 1) * 10.0 ** (d - 6) for d in range(7)]
    exact = np.sort(np.concatenate([[0.0, 1.0], *((edges[:-1] + edges[1:]) / 2 for edges in decades)]))
    assert values.shape == exact.shape == (256,)
    np.testing.assert_allclose(values.double().numpy(), exact, rtol=2**-22, atol=0)
    assert sha256(values.numpy().tobytes()).hexdigest() == UNSIGNED_MAP


def test_dynamic_map_is_what_the_checkpoint_format_says():
    values = dynamic_map()
    assert values.shape == (256,)
    assert values.dtype == torch.float32
    assert bool((values.diff() > 0).all())
    assert values[-1] == 1.0
    assert values[0] == pytest.approx(-0.99297, abs=5e-6)
    assert torch.equal(values[:127].flip(0), -values[128:255])  # symmetric but for 1.0
    assert values[zero_code("dynamic")] == 0.0
    assert zero_code("linear") == 0
    assert (CODE_DTYPES["linear"], CODE_DTYPES["dynamic"]) == (torch.int8, torch.uint8)


def test_dynamic_map_ignores_the_default_dtype_and_device():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            unsigned_values = codebooks._dynamic_values(signed=False)
            values, midpoints = codebooks._dynamic_values(), codebooks._dynamic_midpoints()
            guesses = codebooks._dynamic_guesses()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(values, dynamic_map())
    assert torch.equal(unsigned_values, unsigned_dynamic_map())
    assert torch.equal(midpoints, dynamic_midpoints())
    assert all(map(torch.equal, guesses, dynamic_guesses()))
    assert values.dtype == midpoints.dtype == torch.float32


def test_midpoints_are_exact_means_rounded_once():
    values = dynamic_map().numpy().astype(np.float64)
    expected = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    assert np.array_equal(dynamic_midpoints().numpy(), np.append(expected, np.float32(np.inf)))


def test_guesses_leave_at_most_one_midpoint_to_compare():
    midpoints = dynamic_midpoints().numpy()[:-1]
    prefix = np.arange(65536, dtype=np.uint32) << 16
    ends = np.stack([prefix, prefix | 0xFFFF]).view(np.float32)
    inside = (np.abs(ends) <= 1).all(0)
    ends = np.sort(ends[:, inside], axis=0)
    lowest = np.searchsorted(midpoints, ends[0], side="left")  # midpoints below the interval's lower end
    highest = np.searchsorted(midpoints, ends[1], side="left")
    codes, above = (np.roll(table.numpy(), 32768) for table in dynamic_guesses())  # by the unsigned upper bits
    assert np.array_equal(codes[inside], lowest)
    assert np.array_equal(above[inside], dynamic_midpoints().numpy()[lowest])
    assert int((highest - lowest).max()) == 1


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantize_equals_bitsandbytes_bitwise_on_all_codes_and_scales(bitsandbytes, block_size):
    all_codes = (torch.arange(max(256, block_size)) % 256).to(torch.uint8).view(-1, block_size)
    scales = torch.tensor([1.0, 0.3, 3e-38, 1.1754944e-38, 3.4028235e38, 0.0, 7e5, 1 / 3])
    codes = all_codes.repeat(len(scales), 1)
    scales = scales.repeat_interleave(len(all_codes))
    theirs = bitsandbytes.dequantize_blockwise(codes, absmax=scales, code=dynamic_map(), blocksize=block_size)
    ours = reference.dequantize(codes, scales[:, None], codebook="dynamic", block_size=block_size)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_linear_dequantize_equals_the_formula_bitwise_on_all_codes_and_scales():
    codes = torch.arange(-127, 128, dtype=torch.int8).repeat(7, 1)
    scales = torch.tensor([1.0, 0.3, 3e-38, 1.1754944e-38, 2e36, 0.0, 1 / 3])[:, None]
    ours = reference.dequantize(codes, scales, codebook="linear", block_size=256)
    formula = (codes.numpy().astype(np.float32) * scales.numpy()) / np.float32(127)
    assert np.array_equal(ours.numpy(), formula)
    step = scales.numpy().astype(np.float64) / 127  # and the format: code / 127 of the scale, to fp32 rounding
    assert np.allclose(ours.numpy(), codes.numpy() * step, rtol=2**-22, atol=2e-45)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("spread", [0.0, 2.0], ids=["gaussian", "log-normal"])
def test_dynamic_error_of_a_block_is_at_most_that_of_bitsandbytes(bitsandbytes, block_size, spread):
    generator = torch.Generator().manual_seed(block_size)
    values = torch.randn(2**15 // block_size, block_size, generator=generator)
    values *= (spread * torch.randn(values.shape, generator=generator)).exp()
    codes, scales = reference.quantize(values, codebook="dynamic", block_size=block_size)
    ours = reference.dequantize(codes, scales, codebook="dynamic", block_size=block_size)
    their_codes, state = bitsandbytes.quantize_blockwise(values, code=dynamic_map(), blocksize=block_size)
    theirs = bitsandbytes.dequantize_blockwise(their_codes, state)
    assert torch.equal(scales.flatten(), state.absmax)
    our_error, their_error = ((decoded.double() - values.double()).square().sum(1) for decoded in (ours, theirs))
    # Both decode with equal bits, so the error can exceed theirs by rounding alone: a tie, or one unit of m / s.
    assert bool((our_error <= their_error * (1 + 1e-6)).all())
