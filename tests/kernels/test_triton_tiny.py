"""The one-launch step of small matrices against the torch reference: state bit for bit, parameters by a bound.

Without a GPU, test_interpreted.py runs this file under TRITON_INTERPRET=1. The reference is always on the CPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers.layouts import laid_out
from hypothesis import given, settings, strategies as st
from muon8bit_kernels import CODE_DTYPES, num_blocks, reference, rounding_key
from muon8bit_kernels.reference import tiny

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("no GPU: test_interpreted.py runs it under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
triton_tiny = pytest.importorskip("muon8bit_kernels.triton.tiny")

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
MIXED = ((4.0848, -6.8946, 2.9270), (1.5, -0.5, 0.0))
CODEBOOKS = ["linear", "dynamic", None]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["rows", "columns", "sliced"]
KEY = rounding_key(2**40 + 1, 17, 3)


def integers(tensor):
    """The bits of a tensor, on the CPU."""
    return tensor.cpu().contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


def on(device, tensor):
    """The same values and strides on a device; never the tensor itself."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def random_stacks(counts, rows, cols, generator, dtype=torch.float32, layout="rows"):
    """One stack [count, rows, cols] a count; rows differ in size, one of each matrix is zero where there are many."""
    stacks = []
    for count in counts:
        size = torch.randn(count, rows, 1, generator=generator).exp()
        size[:, rows // 2] *= rows < 9
        stacks.append(laid_out((torch.randn(count, rows, cols, generator=generator) * size).to(dtype), layout))
    return stacks


class Problem:
    """A state with gradients and parameters, here and on the device, stepped alike."""

    def __init__(self, device, counts, rows, cols, *, codebook, block_size, seed=0, params="rows", dtype=torch.float32):
        self.device, self.counts, self.shape = device, counts, (rows, cols)
        self.generator = torch.Generator().manual_seed(seed)
        self.options = {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": block_size}
        self.codes, self.scales = random_stacks(counts, rows, cols, self.generator), None
        if codebook is not None:
            blocks = num_blocks(cols, block_size)
            self.scales = [torch.zeros(count, rows, blocks) for count in counts]
            momentum, self.codes = self.codes, [s.new_zeros(s.shape, dtype=CODE_DTYPES[codebook]) for s in self.codes]
            for stack, codes, scales in zip(momentum, self.codes, self.scales, strict=True):
                for number, matrix in enumerate(stack):
                    pair = reference.quantize(matrix, codebook=codebook, block_size=block_size)
                    codes[number], scales[number] = pair
        self.params = random_stacks(counts, rows, cols, self.generator, dtype, params)
        self.our_codes, self.our_params = ([on(device, s) for s in stacks] for stacks in (self.codes, self.params))
        self.our_scales = None if self.scales is None else [on(device, stack) for stack in self.scales]

    def step(self, *, grads="rows", dtype=torch.float32, steps=JORDAN, decay=0.9, scale=0.5, **options):
        """One step of both, from the same norms; compares the state."""
        new = random_stacks(self.counts, *self.shape, self.generator, dtype, grads)
        sumsq = reference.momentum_stats(self.codes, self.scales, new, **self.options)
        norms = sumsq.sum((1, 2)).sqrt().clamp(min=1e-7)
        factors = {"decay": decay, "scale": scale}
        tiny.step_tiny(
            self.codes, self.scales, new, self.params, norms, **self.options, **factors, steps=steps, **options
        )
        factors = {name: on(self.device, f) if isinstance(f, torch.Tensor) else f for name, f in factors.items()}
        options = {name: on(self.device, f) if isinstance(f, torch.Tensor) else f for name, f in options.items()}
        triton_tiny.step_tiny(
            self.our_codes, self.our_scales, [on(self.device, grad) for grad in new], self.our_params,
            norms.to(self.device), **self.options, **factors, steps=steps, **options,
        )  # fmt: skip
        for ours, theirs in zip(self.our_codes, self.codes, strict=True):
            assert torch.equal(integers(ours), integers(theirs))
        for ours, theirs in zip(self.our_scales or [], self.scales or [], strict=True):
            assert torch.equal(integers(ours), integers(theirs))

    def assert_params_close(self, scale=0.5):
        """Both directions have the bound of test_tiny_reference against float64, and singular values up to 1.3; where
        parameters are rounded further, that may move them by one unit."""
        rows, cols = self.shape
        bound = 2 * (5e-4 if rows == cols else 2e-5) * abs(scale) * 1.3 * min(rows, cols) ** 0.5
        unit = 0.0 if self.params[0].dtype == torch.float32 else torch.finfo(self.params[0].dtype).eps
        for ours, theirs in zip(self.our_params, self.params, strict=True):
            difference = (ours.cpu().float() - theirs.float()).abs()
            beyond = (difference - unit * theirs.float().abs()).clamp(min=0)
            # one of an fp32 unit for the parameter itself
            assert bool((beyond.flatten(1).norm(dim=1) <= bound + 2**-23 * theirs.flatten(1).float().norm(dim=1)).all())

    def assert_params_bitwise(self):
        for ours, theirs in zip(self.our_params, self.params, strict=True):
            assert torch.equal(integers(ours), integers(theirs))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    small=st.one_of(st.integers(1, 16), st.integers(17, 64)),
    long=st.integers(1, 200),
    wide=st.booleans(),
    block_size=st.sampled_from([64, 128]),
    codebook=st.sampled_from(CODEBOOKS),
    nesterov=st.booleans(),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)
def test_state_is_bitwise_and_parameters_close_on_any_shape(
    device, small, long, wide, block_size, codebook, nesterov, dtypes, layouts
):
    shape = (small, long) if wide else (long, small)
    problem = Problem(device, [1], *shape, codebook=codebook, block_size=block_size, params=layouts[0], dtype=dtypes[0])
    problem.options["nesterov"] = nesterov
    problem.step(grads=layouts[1], dtype=dtypes[1], steps=MIXED)
    problem.assert_params_close()


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(
    ("rows", "cols", "block_size"),
    [
        (1, 1, 64),
        (3, 20, 2048),  # a row shorter than a tile
        (300, 3, 64),
        (16, 300, 64),  # a tile no longer than a block
        (13, 700, 512),  # two tiles a block; the last block of one
        (600, 16, 2048),  # three tiles
        (64, 200, 128),
        (70, 64, 4096),
    ],
)
def test_three_steps_are_bitwise_in_the_state_at_every_way_of_tiling(device, rows, cols, block_size, codebook):
    problem = Problem(device, [1], rows, cols, codebook=codebook, block_size=block_size)
    for _ in range(3):
        problem.step()
    problem.assert_params_close(3 * 0.5)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_stacks_of_many_storages_go_together(device, codebook):
    problem = Problem(device, [2, 1, 3], 5, 40, codebook=codebook, block_size=64, dtype=torch.bfloat16)
    problem.step(keys=[KEY, 0, -1, 5, 6, 7], firsts=[0, 1, 2**31, 2**32 - 7, 2**40 + 3, 9], pitch=1000)
    problem.assert_params_close()


@pytest.mark.parametrize("shape", [(5, 40), (130, 16)])
def test_cautious_decay_is_that_of_the_reference(device, shape):
    """A wrong mask moves an element by half of itself, a thousand times the bound."""
    problem = Problem(device, [2], *shape, codebook="linear", block_size=64)
    for _ in range(2):
        problem.step(decay=0.5, scale=0.3, cautious=True)
    problem.assert_params_close(2 * 0.3)


@pytest.mark.parametrize("keys", [None, [KEY, -KEY]])
@pytest.mark.parametrize("shape", [(4, 90), (90, 4)])
def test_without_a_direction_parameters_are_bitwise(device, shape, keys):
    """scale 0: what remains is decay and rounding, whose random bits show which element takes which."""
    problem = Problem(device, [2], *shape, codebook="linear", block_size=64, dtype=torch.bfloat16, params="sliced")
    options = {"keys": keys, "firsts": [3, 2**33] if keys else None, "pitch": 200 if keys else None}
    problem.step(scale=0.0, **options)
    problem.assert_params_bitwise()
    before = problem.our_params[0].clone()
    before[0, 0, 0] = problem.our_params[0][0, 0, 0] = -0.0
    problem.step(scale=0.0, decay=1.0, **options)
    assert torch.equal(integers(problem.our_params[0]), integers(before))


def test_factors_may_be_tensors_and_a_skip_of_zero_is_none(device):
    problem = Problem(device, [2], 9, 50, codebook="linear", block_size=64)
    problem.step(decay=torch.tensor(0.9), scale=torch.tensor(0.5), skip=torch.tensor(0.0))
    problem.assert_params_close()


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_skip_leaves_everything(device, codebook):
    problem = Problem(device, [2], 9, 50, codebook=codebook, block_size=64)
    before = [stack.clone() for stack in [*problem.our_codes, *(problem.our_scales or []), *problem.our_params]]
    problem.step(skip=torch.tensor(2.0))
    after = [*problem.our_codes, *(problem.our_scales or []), *problem.our_params]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_flags_leave_the_matrices_that_they_are_of(device):
    problem = Problem(device, [1, 2], 9, 50, codebook="linear", block_size=64)
    before = [torch.cat(stacks) for stacks in (problem.our_codes, problem.our_scales, problem.our_params)]
    problem.step(skip=torch.tensor([0.0, 2.0, 0.0]))
    problem.assert_params_close()
    for old, new in zip(before, (problem.our_codes, problem.our_scales, problem.our_params), strict=True):
        assert [torch.equal(*pair) for pair in zip(old, torch.cat(new), strict=True)] == [False, True, False]


def test_what_lies_between_the_matrices_is_left_alone(device):
    """Every second matrix of larger stacks; the others, and what the strides leave out, keep their values."""
    whole = [torch.full((4, 5, 70), 7, dtype=torch.int8), torch.full((4, 5, 2), 7.0), torch.full((4, 11, 75), 7.0)]
    codes, scales, params = (tensor.to(device) for tensor in whole)
    views = codes[1::2], scales[1::2], params[1::2, 3:8, 2:72]
    options = {"beta": 0.9, "nesterov": True, "codebook": "linear", "block_size": 64, "steps": JORDAN}
    grads, norms = torch.randn(2, 5, 70).to(device), torch.full((2,), 100.0, device=device)
    triton_tiny.step_tiny([views[0]], [views[1]], [grads], [views[2]], norms, **options, decay=0.5, scale=1.0)
    for tensor, view in zip((codes, scales, params), views, strict=True):
        assert bool((view != 7).any())
        view.fill_(7)
        assert bool((tensor == 7).all())


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter, which is numpy
def test_a_zero_momentum_with_a_norm_that_has_no_reciprocal_moves_nothing(device):
    zero, params = torch.zeros(1, 4, 20, device=device), torch.ones(1, 4, 20, device=device)
    options = {"beta": 0.9, "nesterov": True, "codebook": None, "block_size": 64, "steps": JORDAN}
    norms = torch.full((1,), 1e-45, device=device)
    triton_tiny.step_tiny([zero.clone()], None, [zero], [params], norms, **options, decay=1.0, scale=1.0)
    assert bool((params == 1).all())


@pytest.mark.parametrize("shape", [(0, 4, 20), (2, 0, 20), (2, 4, 0)])
def test_nothing_to_do_is_done(device, shape):
    stack, norms = torch.zeros(shape, device=device), torch.ones(shape[0], device=device)
    options = {"beta": 0.9, "nesterov": True, "codebook": None, "block_size": 64, "steps": JORDAN}
    triton_tiny.step_tiny([stack], None, [stack], [stack], norms, **options, decay=1.0, scale=1.0)
    assert stack.numel() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(1, 65, 70)}, r"a side of at most 64, not \[65, 70\]"),
        ({"steps": JORDAN * 2}, "cannot carry the steps"),
        ({"steps": ()}, "cannot carry the steps"),
        ({"block_size": 96}, "power of two from 64 on for step_tiny, not 96"),
        ({"block_size": 32}, "power of two from 64 on for step_tiny, not 32"),
        ({"codes": torch.zeros(1, 20, 4).mT}, "codes must be contiguous"),
        ({"keys": [1]}, "stochastic rounding is for bfloat16"),
        ({"norms": torch.ones(2)}, "2 norms for"),
        ({"grads": torch.zeros(2, 4, 20)}, "1 norms for"),
        ({"grads": torch.zeros(1, 4, 21)}, "grads"),
        ({"params": torch.zeros(1, 5, 20)}, "params"),
    ],
)
def test_what_it_cannot_do_raises(device, change, message):
    arguments = {name: torch.zeros(1, 4, 20) for name in ("codes", "grads", "params")} | {"norms": torch.ones(1)}
    options = {"steps": JORDAN, "block_size": 64, "keys": None}
    arguments |= {name: value for name, value in change.items() if name in arguments}
    options |= {name: value for name, value in change.items() if name in options}
    codes, grads, params, norms = (arguments[name].to(device) for name in ("codes", "grads", "params", "norms"))
    with pytest.raises(ValueError, match=message):
        triton_tiny.step_tiny(
            [codes], None, [grads], [params], norms, beta=0.9, nesterov=True, codebook=None, **options,
            decay=1.0, scale=1.0,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.decisive
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "cols"), [(16, 2048), (2048, 16), (8, 5000), (14336, 16), (32, 4096), (3000, 32), (64, 14336), (4096, 64)]
)
def test_compiled_steps_are_bitwise_in_the_state_on_adapters(device, rows, cols, dtype, codebook):
    if device.type != "cuda":
        pytest.skip("the interpreter is slow")
    problem = Problem(device, [1] * 6, rows, cols, codebook=codebook, block_size=2048, dtype=dtype)
    for _ in range(10):
        problem.step(dtype=dtype)
    problem.assert_params_close(10 * 0.5)
