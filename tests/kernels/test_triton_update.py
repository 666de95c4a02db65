"""The Triton update of a parameter against the torch reference, bit for bit; test_interpreted.py runs this file.

The kernel rounds to bf16 on integer bits, so that stores are exact and the interpreter's truncation shows nothing.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from layouts import laid_out
from muon8bit_kernels import reference, rounding_key

from muon8bit import Muon8bit

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("no GPU: test_interpreted.py runs it under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

# The interpreter is numpy, which tells of infinity times zero.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

KEY = rounding_key(2**40 + 1, 17, 3)
LAYOUTS = ["rows", "columns", "sliced"]


def bits(tensor):
    """On the CPU, as integers; one bit pattern for all NaN."""
    tensor = torch.where(tensor.isnan(), torch.nan, tensor).cpu().contiguous()
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


def on(device, tensor):
    """The same values and strides on a device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def check(kernels, device, param, direction, decay=0.99, scale=0.013, **options):
    ours = on(device, param)
    reference.update_param(param, direction, decay=decay, scale=scale, **options)
    factors = [f.to(device) if isinstance(f, torch.Tensor) else f for f in (decay, scale)]
    kernels.update_param(ours, on(device, direction), decay=factors[0], scale=factors[1], **options)
    assert ours.dtype == param.dtype
    assert torch.equal(bits(ours), bits(param))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "key"),
    [(torch.float32, None), (torch.float16, None), (torch.bfloat16, None), (torch.bfloat16, KEY)],
)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 5), (9, 1), (33, 65), (2, 2049), (700, 3)])
def test_update_equals_reference_bitwise(triton_kernels, device, rows, cols, dtype, key, layout):
    generator = torch.Generator().manual_seed(rows)
    param, direction = (torch.randn(rows, cols, generator=generator) for _ in range(2))
    other = LAYOUTS[LAYOUTS.index(layout) - 1]
    for direction_dtype in (torch.float32, torch.bfloat16):
        check(
            triton_kernels,
            device,
            laid_out(param.to(dtype), layout),
            laid_out(direction.to(direction_dtype), other),
            key=key,
        )


@pytest.mark.parametrize("first", [1, 16, 2**31 - 40, 2**32 - 40, 2**40 + 7])
@pytest.mark.parametrize("pitch", [None, 1, 2**31 + 3])
def test_global_indices_are_those_of_the_reference(triton_kernels, device, first, pitch):
    torch.manual_seed(0)
    param, direction = torch.randn(5, 40).bfloat16(), torch.randn(5, 40)
    check(triton_kernels, device, param, direction, key=KEY, first=first, pitch=pitch)


@pytest.mark.parametrize("key", [None, 0, 1, 16, -1, KEY])
def test_every_bf16_number_and_every_special_value(triton_kernels, device, key):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(32, 2048)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((32, 2048)).astype(np.float32))
    check(triton_kernels, device, every.clone(), noise * every.float().nan_to_num(), key=key, scale=2**-9)
    for one, zero in ((1.0, 0.0), (torch.tensor(1.0), torch.tensor(0.0))):
        param = on(device, every)
        triton_kernels.update_param(param, on(device, -noise.abs()), decay=one, scale=zero, key=key)
        assert torch.equal(bits(param), bits(every))


def test_factors_may_be_tensors(triton_kernels, device):
    torch.manual_seed(0)
    param, direction = torch.randn(5, 40).bfloat16(), torch.randn(5, 40)
    check(triton_kernels, device, param, direction, torch.tensor(0.9), torch.tensor(0.1), key=KEY)


@pytest.mark.parametrize("key", [None, KEY])
def test_nan_stays_nan_whatever_its_low_bits(triton_kernels, device, key):
    payloads = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -(2**23) + 1], dtype=torch.int32)
    direction = payloads.view(torch.float32).repeat(2, 40)
    param = torch.zeros(direction.shape, dtype=torch.bfloat16, device=device)
    triton_kernels.update_param(param, direction.to(device), decay=1.0, scale=-1.0, key=key)
    assert param.isnan().all()
    if key is not None:
        assert triton_kernels.round_stochastic(direction.to(device), key=key).isnan().all()


@pytest.mark.parametrize("first", [0, 2**32 - 2100])
@pytest.mark.parametrize("shape", [(), (1,), (5000,), (3, 4, 7), (0, 3)])
def test_round_stochastic_equals_reference_bitwise(triton_kernels, device, shape, first):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rounded = triton_kernels.round_stochastic(values.to(device), key=KEY, first=first)
    assert rounded.shape == values.shape
    assert torch.equal(bits(rounded), bits(reference.round_stochastic(values, key=KEY, first=first)))


def test_a_key_for_another_dtype_raises(triton_kernels, device):
    with pytest.raises(ValueError, match="stochastic rounding is for bfloat16"):
        triton_kernels.update_param(
            torch.zeros(2, 2, device=device), torch.ones(2, 2, device=device), decay=1.0, scale=1.0, key=0
        )


def test_the_optimizer_rounds_alike_by_either_backend(device):
    """The AdamW part whole; the Muon part from one direction, since the norm differs by the order of a sum."""
    results = []
    for backend, where in (("reference", torch.device("cpu")), ("triton", device)):
        params = [torch.full((40, 60), 1.0, dtype=torch.bfloat16, device=where, requires_grad=True) for _ in range(2)]
        params[1] = params[1].detach().t().contiguous().t().requires_grad_()  # strided
        groups = [{"params": params, "algorithm": "adamw", "lr": 2e-4}]
        optimizer = Muon8bit(groups, backend=backend, param_rounding="stochastic")
        for step in range(3):
            for param in params:
                param.grad = torch.full_like(param, 1.0 + step)
            optimizer.step()
        results.append([bits(param.detach()) for param in params])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
    assert not torch.equal(*results[0])
