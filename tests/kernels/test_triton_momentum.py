"""The batched Triton momentum step against the torch reference, bit for bit: compiled on CUDA, or interpreted.

Without a GPU, test_interpreted.py runs this file under TRITON_INTERPRET=1. The reference is always on the CPU: the
arithmetic of record.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers.bitwise import assert_bitwise, on
from helpers.layouts import laid_out
from helpers.momentum_steps import Both, random_stacks, state_of
from hypothesis import given, settings, strategies as st
from muon8bit_kernels import CODE_DTYPES, reference

from muon8bit import Muon8bit

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("no GPU: test_interpreted.py runs it under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

# The interpreter is numpy, which tells of the overflows and infinities that some inputs are meant to cause.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

BLOCK_SIZES = [64, 128, 256, 512, 1024, 2048, 4096]
CODEBOOKS = ["linear", "dynamic", None]
LAYOUTS = ["rows", "columns", "sliced", "row piece", "column piece"]


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_steps_equal_reference_bitwise_at_every_block_size(triton_kernels, device, hard_matrix, codebook, block_size):
    cols = block_size + 37
    momentum = hard_matrix(cols)[:7]  # gradients of every kind, onto a momentum of a few
    options = {"codebook": codebook, "block_size": block_size, "nesterov": block_size != 128, "beta": 0.95}
    both = Both(triton_kernels, device, [momentum[None]], **options)
    for seed in (1, 2):
        # not beyond what a linear code can give back: (code * s) / 127 overflows in its product
        grads = [hard_matrix(cols, seed)[7 * (seed % 2) :][:7].clamp(-1e36, 1e36)[None]]
        both.check_apply(grads, both.check_stats(grads))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    counts=st.sampled_from([[1], [2], [1, 1], [2, 1]]),
    rows=st.one_of(st.integers(1, 5), st.integers(1, 40)),
    cols=st.one_of(st.integers(1, 5), st.integers(1, 200)),
    block_size=st.sampled_from([64, 128, 256]),
    codebook=st.sampled_from(CODEBOOKS),
    nesterov=st.booleans(),
    beta=st.sampled_from([0.95, 0.9, 0.0, 0, 1 / 3]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layout=st.sampled_from(LAYOUTS),
    state_layout=st.sampled_from(["rows", "row piece"]),
    out_dtype=st.sampled_from([torch.float32, torch.float16]),
    out_layout=st.sampled_from(LAYOUTS),
)
def test_steps_equal_reference_bitwise_on_any_stacks(
    triton_kernels, device, counts, rows, cols, block_size, codebook, nesterov, beta, dtype, layout, state_layout,
    out_dtype, out_layout,
):  # fmt: skip
    options = {"codebook": codebook, "block_size": block_size, "nesterov": nesterov, "beta": beta}
    both = Both(triton_kernels, device, random_stacks(counts, rows, cols), layout=state_layout, **options)
    grads = random_stacks(counts, rows, cols, dtype, layout, seed=1)
    both.check_apply(grads, both.check_stats(grads), out_dtype=out_dtype, out_layout=out_layout)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2100, 1), (1, 64), (70, 3)])
def test_steps_equal_reference_bitwise_on_narrow_shapes(triton_kernels, device, codebook, rows, cols):
    options = {"codebook": codebook, "block_size": 64, "nesterov": True, "beta": 0.95}
    both = Both(triton_kernels, device, random_stacks([1, 2], rows, cols), **options)
    grads = random_stacks([1, 2], rows, cols, seed=1)
    both.check_apply(grads, both.check_stats(grads))


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("cols", [96, 72])
def test_matrices_that_are_not_aligned_go_by_themselves_and_are_stepped_alike(triton_kernels, device, codebook, cols):
    """The gradients of the first and third of four, and the codes of the third, begin an element into a storage."""
    options = {"codebook": codebook, "block_size": 64, "nesterov": True, "beta": 0.95}
    both = Both(triton_kernels, device, random_stacks([1] * 4, 5, cols), **options)
    grads, norms = random_stacks([1] * 4, 5, cols, seed=1), torch.tensor([1.0, 2.0, 3.0, 4.0])

    def placed(stacks, odd):
        storages = [torch.empty(stack.numel() + 1, dtype=stack.dtype, device=device) for stack in stacks]
        views = [storage[n in odd :][: 5 * cols].view(1, 5, cols) for n, storage in enumerate(storages)]
        return [view.copy_(stack) for view, stack in zip(views, stacks, strict=True)]

    our_codes, our_grads = placed(both.codes, {2}), placed(grads, {0, 2})
    skip = torch.tensor([0.0, 1.0, 0.0, 0.0])  # by the place in the batch, not in the launch
    sumsq = triton_kernels.momentum_stats(our_codes, both.our_scales, our_grads, **options)
    expected = reference.momentum_stats(both.codes, both.scales, grads, **options)
    torch.testing.assert_close(sumsq.cpu(), expected, rtol=2 * 64 * 2**-24, atol=0)
    out, our_out = torch.zeros(4, 5, cols), torch.zeros(4, 5, cols, device=device)
    reference.momentum_apply(both.codes, both.scales, grads, norms, out, **options, skip=skip)
    options["skip"] = skip.to(device)
    triton_kernels.momentum_apply(our_codes, both.our_scales, our_grads, norms.to(device), our_out, **options)
    assert_bitwise(our_out, out)
    for ours, theirs in zip([*our_codes, *(both.our_scales or [])], [*both.codes, *(both.scales or [])], strict=True):
        assert_bitwise(ours, theirs)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(
    ("block_size", "layout", "out_layout"),
    [(128, "columns", "rows"), (128, "rows", "columns"), (512, "columns", "columns")],
)
def test_steps_equal_reference_bitwise_where_a_tensor_lies_column_by_column(
    triton_kernels, device, codebook, block_size, layout, out_layout
):
    """The tile is worked on in pieces: several of them to a block, and a tail in the last."""
    options = {"codebook": codebook, "block_size": block_size, "nesterov": True, "beta": 0.95}
    both = Both(triton_kernels, device, random_stacks([1], 35, block_size + 70), **options)
    grads = random_stacks([1], 35, block_size + 70, torch.bfloat16, layout, seed=1)
    both.check_apply(grads, both.check_stats(grads), out_layout=out_layout)


@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_codes_equal_reference_bitwise_after_a_hundred_steps(triton_kernels, device, codebook, block_size):
    """One tile, so that a step is one program; the reference is looked at at the end alone, as a difference stays."""
    options = {"codebook": codebook, "block_size": block_size, "nesterov": True, "beta": 0.95}
    rows = max(1, 256 // block_size)
    codes, scales = state_of(random_stacks([1], rows, block_size - 3), codebook=codebook, block_size=block_size)
    ours = [tensor.to(device, copy=True) for tensor in (codes[0], scales[0])]
    norms, out = torch.ones(1), torch.empty(1, rows, block_size - 3)
    our_norms, our_out = norms.to(device), out.to(device, copy=True)
    generator = torch.Generator().manual_seed(1)
    for step in range(100):
        grad = torch.randn(out.shape, generator=generator) * 2.0 ** (step % 7)
        reference.momentum_apply(codes, scales, [grad], norms, out, **options)
        triton_kernels.momentum_apply(ours[:1], ours[1:], [grad.to(device)], our_norms, our_out, **options)
    assert_bitwise(ours[0], codes[0])
    assert_bitwise(ours[1], scales[0])
    assert_bitwise(our_out, out)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(("layout", "beta"), [("rows", 0.95), ("rows", 0.0), ("columns", 0.95)])
def test_a_non_finite_gradient_shows_in_its_block_alone(triton_kernels, device, codebook, layout, beta):
    options = {"codebook": codebook, "block_size": 64}
    codes, scales = state_of([torch.ones(2, 4, 150)], **options)
    codes, scales = [codes[0].to(device)], None if scales is None else [scales[0].to(device)]
    for nesterov, bad in ((False, float("nan")), (True, float("nan")), (True, float("inf")), (False, float("-inf"))):
        grad, expected = torch.ones(2, 4, 150), torch.ones(2, 4, 3, dtype=torch.bool)
        for matrix, row, col in [(0, 0, 0), (0, 1, 63), (0, 2, 64), (1, 0, 127), (1, 1, 128), (1, 2, 149), (1, 3, 140)]:
            grad[matrix, row, col] = bad
            expected[matrix, row, col // 64] = False
        grad = on(device, laid_out(grad, layout))
        sumsq = triton_kernels.momentum_stats(codes, scales, [grad], beta=beta, nesterov=nesterov, **options)
        assert torch.equal(sumsq.isfinite().cpu(), expected)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(("layout", "flag"), [("rows", 0.0), ("rows", 1.0), ("columns", 1.0), ("rows", torch.nan)])
def test_a_flag_that_is_not_zero_keeps_everything_from_being_written(triton_kernels, device, codebook, layout, flag):
    options = {"codebook": codebook, "block_size": 64, "nesterov": True, "beta": 0.95}
    both = Both(triton_kernels, device, random_stacks([2], 40, 150), layout="row piece", **options)
    before = [stack.clone() for stack in [*both.codes, *(both.scales or [])]]
    grads = random_stacks([2], 40, 150, torch.bfloat16, layout, seed=1)
    both.check_apply(grads, torch.ones(2), skip=torch.tensor(flag))
    same = [torch.equal(old, new) for old, new in zip(before, [*both.codes, *(both.scales or [])], strict=True)]
    assert same == [flag != 0] * len(before)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_flags_keep_the_matrices_that_they_are_of_from_being_written(triton_kernels, device, codebook, layout):
    options = {"codebook": codebook, "block_size": 128, "nesterov": True, "beta": 0.95}
    both = Both(triton_kernels, device, random_stacks([1, 3], 35, 150), **options)
    before = [torch.cat(stacks) for stacks in (both.codes, both.scales) if stacks is not None]
    grads = random_stacks([1, 3], 35, 150, torch.bfloat16, layout, seed=1)
    both.check_apply(grads, torch.ones(4), skip=torch.tensor([0.0, 1.0, 0.0, torch.nan]))
    for old, new in zip(before, (both.codes, both.scales), strict=False):
        assert [torch.equal(*pair) for pair in zip(old, torch.cat(new), strict=True)] == [False, True, False, True]
    with pytest.raises(ValueError, match=r"skip \(3,\) must be 0-d, or contiguous and of 4 matrices"):
        both.check_apply(grads, torch.ones(4), skip=torch.zeros(3))


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_codes_and_scales_alone_are_those_that_come_beside_an_output(triton_kernels, device, codebook, layout):
    """Both without an output against the reference with one; gradients that are eighths of columns are hinted at."""
    options = {"codebook": codebook, "block_size": 128, "nesterov": True, "beta": 0.95}
    both = Both(triton_kernels, device, random_stacks([1, 2], 6, 200), **options)
    grads = random_stacks([1, 2], 6, 200, torch.bfloat16, layout, seed=1)
    copies = [[stack.clone() for stack in stacks] for stacks in (both.codes, both.scales or [])]
    reference.momentum_apply(copies[0], copies[1] or None, grads, None, None, **options)
    our_grads = [on(device, grad) for grad in grads]
    triton_kernels.momentum_apply(both.our_codes, both.our_scales, our_grads, None, None, **options)
    reference.momentum_apply(both.codes, both.scales, grads, torch.ones(3), torch.empty(3, 6, 200), **options)
    expected = [*both.codes, *(both.scales or [])]
    for ours, ours_here, theirs in zip(
        [*copies[0], *copies[1]], [*both.our_codes, *(both.our_scales or [])], expected, strict=True
    ):
        assert_bitwise(ours, theirs)
        assert_bitwise(ours_here, theirs)


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


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 8, 0)])
def test_stacks_without_elements_pass_through(triton_kernels, device, shape):
    options = {"codebook": "linear", "block_size": 64, "beta": 0.9, "nesterov": True}
    codes = torch.empty(shape, dtype=torch.int8, device=device)
    scales = torch.empty(*shape[:2], min(shape[2], 1), device=device)
    grads, norms = torch.empty(shape, device=device), torch.ones(shape[0], device=device)
    assert triton_kernels.momentum_stats([codes], [scales], [grads], **options).shape == scales.shape
    triton_kernels.momentum_apply([codes], [scales], [grads], norms, torch.empty_like(grads), **options)


def test_stacks_that_one_launch_cannot_take_raise(triton_kernels, device):
    codes, scales = torch.zeros(2, 4, 6, dtype=torch.int8, device=device), torch.zeros(2, 4, 1, device=device)
    grads, norms = torch.zeros(2, 4, 6, device=device), torch.ones(2, device=device)
    good = {"codes": [codes], "scales": [scales], "grads": [grads], "norms": norms, "out": torch.empty_like(grads)}
    options = {"codebook": "linear", "block_size": 64, "beta": 0.9, "nesterov": True}
    for name, value, message in (
        ("codes", [codes.mT.contiguous().mT], "codes must be contiguous"),
        ("codes", [laid_out(codes, "column piece")], "codes must be contiguous"),
        ("codes", [codes[:1], codes[1:].to(torch.uint8)], "codes: a stack"),
        ("scales", [scales[:, :3]], "scales: a stack"),
        ("scales", [scales[:1]], r"shorter|longer|argument"),
        ("grads", [grads[:1], laid_out(grads[1:], "columns")], "grads: a stack"),
        ("grads", [grads[:1], grads[1:].half()], "grads: a stack"),
        ("grads", [grads[:, :, :5]], "grads: a stack"),
        ("norms", norms[:1], "norms"),
        ("out", grads[:1], "out"),
        ("block_size", 48, "power of two"),
    ):
        with pytest.raises(ValueError, match=message):
            triton_kernels.momentum_apply(**{**good, **options, name: value})
    for kernels in (triton_kernels, reference):
        for name in ("norms", "out"):
            with pytest.raises(ValueError, match="norms and out go together"):
                kernels.momentum_apply(**{**good, **options, name: None})


@pytest.mark.gpu
@pytest.mark.decisive
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize(("rows", "cols"), [(512, 2048), (1000, 768), (4096, 16), (333, 5001)])
def test_compiled_steps_equal_reference_bitwise_on_large_shapes(
    triton_kernels, device, codebook, out_dtype, layout, rows, cols
):
    if device.type != "cuda":
        pytest.skip("the interpreter truncates bf16 and is slow")
    options = {"codebook": codebook, "block_size": 2048, "nesterov": True, "beta": 0.95}
    both = Both(triton_kernels, device, random_stacks([2, 1], rows, cols), **options)
    for seed in range(1, 11):
        grads = random_stacks([2, 1], rows, cols, torch.bfloat16, layout, seed)
        both.check_apply(grads, both.check_stats(grads), out_dtype=out_dtype)


@pytest.mark.gpu
@pytest.mark.decisive
def test_more_matrices_than_a_grid_axis_has_places(triton_kernels, device):
    if device.type != "cuda":
        pytest.skip("the interpreter is slow")
    options = {"codebook": "dynamic", "block_size": 64, "nesterov": True, "beta": 0.95}
    both = Both(triton_kernels, device, random_stacks([70_000], 2, 8), **options)
    grads = random_stacks([70_000], 2, 8, seed=1)
    both.check_apply(grads, both.check_stats(grads))


@pytest.mark.gpu
@pytest.mark.decisive
@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
def test_compiled_step_equals_reference_bitwise_beyond_two_to_the_31_elements(triton_kernels, device, codebook):
    if device.type != "cuda" or torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs a CUDA GPU of 24 GiB")
    rows, cols, last = 2**19 + 5, 4096, 3
    options = {"codebook": codebook, "block_size": 2048, "nesterov": True, "beta": 0.9}
    codes = torch.zeros(1, rows, cols, dtype=CODE_DTYPES[codebook], device=device)
    scales = torch.zeros(1, rows, 2, device=device)
    grad = torch.zeros(1, rows, cols, dtype=torch.bfloat16, device=device)
    small = state_of(random_stacks([1], last, cols), codebook=codebook, block_size=2048)
    small_grad = random_stacks([1], last, cols, torch.bfloat16, seed=1)[0]
    for whole, part in ((codes, small[0][0]), (scales, small[1][0]), (grad, small_grad)):
        whole[:, -last:] = part.to(device)
    out, norms, expected = torch.empty_like(grad), torch.tensor([3.7]), torch.empty_like(small_grad)
    sumsq = triton_kernels.momentum_stats([codes], [scales], [grad], **options)[:, -last:].cpu()
    torch.testing.assert_close(sumsq, reference.momentum_stats(*small, [small_grad], **options), rtol=2.5e-4, atol=0)
    triton_kernels.momentum_apply([codes], [scales], [grad], norms.to(device), out, **options)
    reference.momentum_apply(*small, [small_grad], norms, expected, **options)
    assert_bitwise(out[:, -last:], expected)
    assert_bitwise(codes[:, -last:], small[0][0])
    assert_bitwise(scales[:, -last:], small[1][0])
