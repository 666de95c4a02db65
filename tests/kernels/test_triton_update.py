"""The Triton update of a parameter against the torch reference, bit for bit; test_interpreted.py runs this file.

The kernel rounds to bf16 on integer bits, so that stores are exact and the interpreter's truncation shows nothing.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from helpers.bitwise import assert_bitwise, bits, on
from helpers.layouts import laid_out
from hypothesis import given, settings, strategies as st
from muon8bit_kernels import reference, rounding_key

from muon8bit import Muon8bit

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("no GPU: test_interpreted.py runs it under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

# The interpreter is numpy, which tells of infinity times zero.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

KEY = rounding_key(2**40 + 1, 17, 3)
LAYOUTS = ["rows", "columns", "sliced", "row piece", "column piece"]


def random_stacks(counts, rows, cols, dtype=torch.float32, layout="rows", seed=0):
    """One stack [count, rows, cols] a count."""
    generator = torch.Generator().manual_seed(seed)
    return [laid_out(torch.randn(n, rows, cols, generator=generator).to(dtype), layout) for n in counts]


def check(kernels, device, params, directions, decay=0.99, scale=0.013, skip=None, **options):
    """Update both, and compare what lies between the rows and around them too."""
    whole = [p.as_strided((p.untyped_storage().nbytes() // p.itemsize,), (1,), 0) for p in params]
    our_whole = [storage.to(device, copy=True) for storage in whole]
    ours = [w.as_strided(p.shape, p.stride(), p.storage_offset()) for w, p in zip(our_whole, params, strict=True)]
    reference.update_params(params, directions, decay=decay, scale=scale, skip=skip, **options)
    decay, scale, skip = (f.to(device) if isinstance(f, torch.Tensor) else f for f in (decay, scale, skip))
    kernels.update_params(ours, on(device, directions), decay=decay, scale=scale, skip=skip, **options)
    for left, right in zip(our_whole, whole, strict=True):
        assert_bitwise(left, right)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    counts=st.sampled_from([[1], [3], [1, 1], [2, 1]]),
    rows=st.one_of(st.integers(1, 5), st.integers(1, 70)),
    cols=st.one_of(st.integers(1, 5), st.integers(1, 300)),
    kind=st.sampled_from(
        [(torch.float32, False), (torch.float16, False), *[(torch.bfloat16, r) for r in (False, True)]]
    ),
    layout=st.sampled_from(LAYOUTS),
    direction_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    direction_layout=st.sampled_from(LAYOUTS),
    cautious=st.booleans(),
)
def test_update_equals_reference_bitwise_on_any_stacks(
    triton_kernels, device, counts, rows, cols, kind, layout, direction_dtype, direction_layout, cautious
):
    dtype, stochastic = kind
    params = random_stacks(counts, rows, cols, dtype, layout)
    (directions,) = random_stacks([sum(counts)], rows, cols, direction_dtype, direction_layout, seed=1)
    keys = [rounding_key(1, 2, index) for index in range(sum(counts))] if stochastic else None
    check(triton_kernels, device, params, directions, keys=keys, cautious=cautious)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (9, 1), (2100, 1), (1, 600), (700, 3), (2, 257)])
def test_update_equals_reference_bitwise_on_narrow_shapes(triton_kernels, device, rows, cols):
    params = random_stacks([1, 1], rows, cols, torch.bfloat16)
    (directions,) = random_stacks([2], rows, cols, seed=1)
    check(triton_kernels, device, params, directions, keys=[KEY, 3])


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("flag", [0.0, 1.0, torch.nan])
def test_a_flag_that_is_not_zero_keeps_parameters_as_they_are(triton_kernels, device, layout, flag):
    params = random_stacks([2], 40, 150, torch.bfloat16, layout)
    before = params[0].clone()
    check(triton_kernels, device, params, torch.ones(2, 40, 150), skip=torch.tensor(flag), keys=[KEY, KEY])
    assert torch.equal(params[0], before) == (flag != 0)


@pytest.mark.parametrize("keys", [None, [KEY, 1, 2, 3]])
def test_flags_keep_the_matrices_that_they_are_of_as_they_are(triton_kernels, device, keys):
    """By the place in the batch: the second matrix is not aligned, and goes by itself."""
    params = random_stacks([1, 1, 2], 5, 40, torch.bfloat16)
    params[1] = torch.randn(201).bfloat16()[1:].view(1, 5, 40)
    before = torch.cat(params)
    skip = torch.tensor([1.0, 0.0, 0.0, torch.nan])
    check(triton_kernels, device, params, torch.ones(4, 5, 40), skip=skip, keys=keys)
    assert [torch.equal(*pair) for pair in zip(before, torch.cat(params), strict=True)] == [True, False, False, True]


@pytest.mark.parametrize("first", [1, 16, 2**31 - 40, 2**32 - 40, 2**40 + 7])
@pytest.mark.parametrize("pitch", [None, 1, 2**31 + 3])
def test_global_indices_are_those_of_the_reference(triton_kernels, device, first, pitch):
    params, (directions,) = random_stacks([1, 2], 5, 40, torch.bfloat16), random_stacks([3], 5, 40, seed=1)
    check(triton_kernels, device, params, directions, keys=[KEY, 1, -1], firsts=[first, 0, first + 200], pitch=pitch)


@pytest.mark.parametrize("key", [None, -1, KEY])
def test_every_bf16_number_and_every_special_value(triton_kernels, device, key):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(1, 256, 256)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 256, 256)).astype(np.float32))
    keys = None if key is None else [key]
    directions = noise * every.float().nan_to_num()
    for cautious in (False, True):
        check(triton_kernels, device, [every.clone()], directions, keys=keys, scale=2**-9, cautious=cautious)
    check(triton_kernels, device, [every.clone()], every.float().flip(2), keys=keys, decay=-0.5, cautious=True)
    for one, zero in ((1.0, 0.0), (torch.tensor(1.0), torch.tensor(0.0))):
        param, factors = on(device, every), [f.to(device) if isinstance(f, torch.Tensor) else f for f in (one, zero)]
        triton_kernels.update_params([param], on(device, -noise.abs()), decay=factors[0], scale=factors[1], keys=keys)
        assert_bitwise(param, every)


@pytest.mark.parametrize("factors", [(torch.tensor(0.9), torch.tensor(0.1)), (0.9, torch.tensor(0.1))])
def test_factors_may_be_tensors(triton_kernels, device, factors):
    for cautious in (False, True):
        params, (directions,) = random_stacks([1, 2], 5, 40, torch.bfloat16), random_stacks([3], 5, 40, seed=1)
        check(triton_kernels, device, params, directions, *factors, keys=[KEY] * 3, cautious=cautious)


@pytest.mark.parametrize("key", [None, KEY])
def test_nan_stays_nan_whatever_its_low_bits(triton_kernels, device, key):
    payloads = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -(2**23) + 1], dtype=torch.int32)
    directions = payloads.view(torch.float32).repeat(1, 2, 40)
    param, keys = torch.zeros(directions.shape, dtype=torch.bfloat16, device=device), None if key is None else [key]
    triton_kernels.update_params([param], directions.to(device), decay=1.0, scale=-1.0, keys=keys)
    assert param.isnan().all()
    if key is not None:
        assert triton_kernels.round_stochastic(directions.to(device), key=key).isnan().all()


@pytest.mark.parametrize("first", [0, 2**32 - 2100])
@pytest.mark.parametrize("shape", [(), (1,), (5000,), (3, 4, 7), (0, 3)])
def test_round_stochastic_equals_reference_bitwise(triton_kernels, device, shape, first):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rounded = triton_kernels.round_stochastic(values.to(device), key=KEY, first=first)
    assert rounded.shape == values.shape
    assert torch.equal(bits(rounded), bits(reference.round_stochastic(values, key=KEY, first=first)))


def test_what_one_launch_cannot_take_raises(triton_kernels, device):
    ones = torch.ones(2, 3, 4, device=device)
    for params, directions, options, message in (
        ([ones], ones, {"keys": [0, 0]}, "stochastic rounding is for bfloat16"),
        ([ones[:1], ones[1:].half()], ones, {}, "params: a stack"),
        ([ones[:1], laid_out(ones[1:], "columns")], ones, {}, "params: a stack"),
        ([ones], ones[:1], {}, "directions"),
        ([ones], ones.mT, {}, "directions"),
        ([ones], ones, {"skip": torch.zeros(1, device=device)}, "must be 0-d, or contiguous and of 2 matrices"),
        ([ones.bfloat16()], ones, {"keys": [0]}, "shorter|longer|argument"),
        ([ones.bfloat16()], ones, {"keys": [0, 0], "firsts": [0]}, "shorter|longer|argument"),
    ):
        with pytest.raises(ValueError, match=message):
            triton_kernels.update_params(params, directions, decay=1.0, scale=1.0, **options)


@pytest.mark.parametrize("cautious", [False, True])
def test_the_optimizer_rounds_alike_by_either_backend(device, cautious):
    """The AdamW part whole; the Muon part from one direction, since the norm differs by the order of a sum."""
    results = []
    for backend, where in (("reference", torch.device("cpu")), ("triton", device)):
        params = [torch.full((40, 60), 1.0, dtype=torch.bfloat16, device=where, requires_grad=True) for _ in range(2)]
        params[1] = params[1].detach().t().contiguous().t().requires_grad_()  # strided
        groups = [{"params": params, "algorithm": "adamw", "lr": 2e-4, "weight_decay": 50.0 if cautious else 0.1}]
        optimizer = Muon8bit(groups, backend=backend, param_rounding="stochastic", cautious_weight_decay=cautious)
        for step in range(3):
            for param in params:
                param.grad = torch.full_like(param, 1.0 + step)
            optimizer.step()
        results.append([bits(param.detach()) for param in params])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
    assert not torch.equal(*results[0])


def test_maximize_and_a_scale_are_a_step_of_the_gradient_that_they_stand_for(device):
    results = []
    for factor, options in ((-8.0, {"maximize": True}), (1.0, {})):
        params = [torch.full((40, 60), 1.0, device=device, requires_grad=True) for _ in range(2)]
        groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw", "lr": 2e-4}]
        optimizer = Muon8bit(groups, backend="triton", **options)
        for step in range(2):
            for param in params:
                param.grad = factor * torch.linspace(-1, 2 + step, param.numel(), device=device).view_as(param)
            if factor != 1.0:
                optimizer.grad_scale, optimizer.found_inf = (torch.tensor(x, device=device) for x in (8.0, 0.0))
            optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        results.append([tensor.detach().clone() for tensor in [*params, *states]])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
    assert not torch.equal(results[0][0], torch.ones_like(results[0][0]))


@pytest.mark.gpu
@pytest.mark.decisive
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize(("dtype", "keys"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, [KEY, 5])])
@pytest.mark.parametrize(("rows", "cols"), [(512, 2048), (1000, 768), (4096, 16), (333, 5001)])
def test_compiled_updates_equal_reference_bitwise_on_large_shapes(
    triton_kernels, device, layout, dtype, keys, rows, cols
):
    if device.type != "cuda":
        pytest.skip("the interpreter is slow")
    params = random_stacks([1, 1], rows, cols, dtype)
    (directions,) = random_stacks([2], rows, cols, torch.bfloat16, layout, seed=1)
    check(triton_kernels, device, params, directions, keys=keys)


@pytest.mark.parametrize("scale", [1e-46, torch.tensor(1e-46, dtype=torch.float64).float()])
def test_a_scale_that_is_0_in_fp32_keeps_the_sign_of_a_zero(triton_kernels, device, scale):
    params = [torch.tensor([[[-0.0, 0.0, 1.0]]])]
    check(triton_kernels, device, params, torch.tensor([[[-1.0, 1.0, 1.0]]]), decay=1.0, scale=scale)
    assert bits(params[0]).tolist() == bits(torch.tensor([[[-0.0, 0.0, 1.0]]])).tolist()
