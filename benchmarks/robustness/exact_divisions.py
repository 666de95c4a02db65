"""Divide by the kernels' fused multiply-adds and by numpy, and count the quotients that differ: none may.

    TRITON_INTERPRET=1 python -m benchmarks.robustness.exact_divisions --pairs 1000000000 --out FILE.json

The code of the kernels runs in Triton's interpreter, whose own fused multiply-add rounds twice: `true_fma` takes its
place. Divided by 127: every number, up to the power of two. By a scale: random pairs, and pairs whose quotient lies as
near to the middle of two numbers as one can. A minute for each 100 million pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from muon8bit_kernels.triton import exact
from triton.runtime import interpreter

ROWS, COLS = 64, 1024  # of a program
LEAST_EXACT = 2.0**-38  # quotients below are only as small
Array = np.ndarray[Any, Any]


def true_fma(x: Array, y: Array, z: Array) -> Array:
    """Return x * y + z of fp32 arrays, rounded once.

    The product is exact in fp64. The sum is rounded to odd: the last bit is set where something was cut off, so that
    rounding to fp32, which has fewer than half as many bits, gives what it would give of the exact sum.
    """
    product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + z
    back = total - product
    error = (product - (total - back)) + (z - back)  # exact: Knuth's two-sum
    bits = total.view(np.int64)
    is_cut = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    bits += is_cut * np.where((error > 0) == (total > 0), 1, -1)
    return total.astype(np.float32)


def _create_fma(_self: Any, x: Any, y: Any, z: Any) -> Any:
    broadcast = np.broadcast_arrays(x.data, y.data, z.data)
    return interpreter.TensorHandle(true_fma(*map(np.ascontiguousarray, broadcast)), z.dtype.scalar)


def _create_minnumf(_self: Any, x: Any, y: Any) -> Any:
    return interpreter.TensorHandle(np.fmin(x.data, y.data), x.dtype.scalar)


@contextmanager
def fused() -> Iterator[None]:
    """Let the interpreter run what is compiled for a GPU: fused multiply-adds, rounded once, and minima without NaN."""
    with (
        mock.patch.object(exact, "INTERPRETED", tl.constexpr(False)),
        mock.patch.object(interpreter.InterpreterBuilder, "create_fma", _create_fma),
        mock.patch.object(interpreter.InterpreterBuilder, "create_minnumf", _create_minnumf),
        np.errstate(all="ignore"),
    ):
        yield


@triton.jit
def _over_kernel(values, scales, out, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    place = row * COLS + tl.arange(0, COLS)[None, :]
    scale = tl.load(scales + row)
    tl.store(out + place, exact.over_scale(tl.load(values + place), scale, True))


@triton.jit
def _over_linear_max_kernel(products, out, ROWS: tl.constexpr, COLS: tl.constexpr):
    place = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]) * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out + place, exact.times_over_linear_max(tl.load(products + place), tl.full([ROWS, 1], 1.0, tl.float32)))


def over_linear_max(products: Array) -> Array:
    """Return fp32 products [rows, 1024], rows a multiple of 256, over 127 by the kernels' steps."""
    out = torch.empty(products.shape)
    with fused():
        _over_linear_max_kernel[(len(products) // ROWS,)](torch.from_numpy(products), out, ROWS=ROWS, COLS=COLS)
    return out.numpy()


def over(values: Array, scales: Array) -> Array:
    """Return fp32 values [rows, 1024], rows a multiple of 256, over scales [rows] by the kernels' steps."""
    out = torch.empty(values.shape)
    with fused():
        tensors = torch.from_numpy(values), torch.from_numpy(scales), out
        _over_kernel[(len(values) // ROWS,)](*tensors, ROWS=ROWS, COLS=COLS)
    return out.numpy()


def num_wrong_over_linear_max(products: Array) -> int:
    """Return how many fp32 products over 127 differ from numpy's quotient in a bit."""
    products = products.reshape(-1, COLS)
    with np.errstate(all="ignore"):
        expected = products / np.float32(127)
    return int((over_linear_max(products).view(np.int32) != expected.view(np.int32)).sum())


def num_wrong_over(values: Array, scales: Array) -> int:
    """Return how many quotients of values [rows, 1024] and scales [rows] differ from numpy's in a bit.

    Those below LEAST_EXACT only have to be small.
    """
    with np.errstate(all="ignore"):
        expected, found = values / scales[:, None], over(values, scales)
    small = np.abs(expected) < LEAST_EXACT
    return int(np.where(small, np.abs(found) >= 2 * LEAST_EXACT, found.view(np.int32) != expected.view(np.int32)).sum())


def random_pairs(rng: np.random.Generator, num_rows: int) -> tuple[Array, Array]:
    """Return values [rows, 1024] and scales [rows] at least as large: scales of every exponent and all mantissas."""
    exponents, mantissas = rng.integers(1, 255, num_rows), rng.integers(0, 2**23, num_rows)
    scales = (exponents << 23 | mantissas).astype(np.int32)
    scales[rng.random(num_rows) < 0.05] |= 0x7FFFFF
    scales[rng.random(num_rows) < 0.05] &= 0x7F800000
    # Patterns of magnitudes are ordered as the magnitudes are: down to 2**-24 of the scale, and some down to zero.
    depth = np.where(rng.random((num_rows, COLS)) < 0.02, 255 << 23, 24 << 23)
    patterns = scales[:, None] - (depth * rng.random((num_rows, COLS)) ** 3).astype(np.int64)
    values = np.maximum(patterns, 0).astype(np.int32).view(np.float32)
    return values * rng.choice(np.float32([-1, 1]), values.shape), scales.view(np.float32)


def hard_pairs(rng: np.random.Generator, num_rows: int) -> tuple[Array, Array]:
    """Return values [rows, 1024] and scales [rows] whose quotients lie nearest to the middle of two numbers.

    With an odd 24-bit b and x = -+1 / b modulo 2**25, a = (x b +- 1) / 2**25 is an integer, and a / b is x / 2**25, 25
    bits that end in a one, but for 1 / (2**25 b). Each b has two such x, times a power of two.
    """
    scales = rng.integers(2**23, 2**24, num_rows) | 1
    inverse = scales.copy()
    for _ in range(5):  # Newton, modulo a power of two: the number of right bits doubles from 3 on
        inverse = inverse * (2 - scales * inverse) & (2**25 - 1)
    numerators = np.stack([(x * scales + sign) >> 25 for sign, x in ((1, 2**25 - inverse), (-1, inverse))], axis=1)
    powers = 2.0 ** -rng.integers(1, 30, (num_rows, COLS // 2))
    values = (numerators[:, :, None] * powers[:, None, :]).reshape(num_rows, COLS)
    shifts = 2.0 ** rng.integers(-100, 100, num_rows)
    return (values * shifts[:, None]).astype(np.float32), (scales * shifts).astype(np.float32)


def main() -> None:
    """Print how many quotients of each kind were tried and how many were wrong; exit with 1 if any was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10**8, help="number of random pairs, and of hard ones")
    parser.add_argument("--out", type=Path, help="write the counts there as JSON")
    args = parser.parse_args()
    if not triton.knobs.runtime.interpret:
        sys.exit("set TRITON_INTERPRET=1: the kernels' code runs in the interpreter")
    step, rng = 2**23, np.random.default_rng(0)
    # Up to 127 times the smallest normal, whose quotients are subnormal, and one power of two more.
    kinds = [(f"over 127, exponent {e}", e) for e in range(10)] + [("over 127, exponent 127", 127)]
    record: dict[str, Any] = {"numpy": np.__version__, "triton": triton.__version__, "tried": {}, "wrong": {}}
    for name, exponent in kinds:
        patterns = np.arange(exponent << 23, (exponent + 1) << 23, dtype=np.int32)
        record["tried"][name], record["wrong"][name] = step, num_wrong_over_linear_max(patterns.view(np.float32))
    for name, make in (("random pairs", random_pairs), ("hard pairs", hard_pairs)):
        record["tried"][name] = record["wrong"][name] = 0
        while record["tried"][name] < args.pairs:
            record["wrong"][name] += num_wrong_over(*make(rng, step // COLS))
            record["tried"][name] += step
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    if any(record["wrong"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
