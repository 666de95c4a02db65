"""What is kept between steps never belongs to tensors of before: parameters, gradients and state may all be swapped."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from helpers.bitwise import assert_bitwise

from muon8bit import Muon8bit

SHAPES = [[(24, 72), (24, 72), (72, 24), (24, 72)], [(12, 5, 3, 3), (16, 4, 3, 3)], [(40,), (9, 30)]]
KEYS = [{}, {"flatten": True, "nesterov": False}, {"algorithm": "adamw", "lr": 0.01}]


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def _swap_data(optimizer):
    """Other storages, every other matrix column by column, so that those of one shape no longer lie alike."""
    for index, param in enumerate(params_of(optimizer)):
        param.data = param.data.mT.contiguous().mT if param.ndim == 2 and index % 2 else param.data.clone()


def _swap_dtype(dtype):
    def swap(optimizer):
        for param in params_of(optimizer):
            param.data = param.data.to(dtype)

    return swap


def _swap_param(*, moves_state):
    """As FSDP's wrappers do, which put their own tensors into the groups."""

    def swap(optimizer):
        for group in optimizer.param_groups:
            old, new = group["params"][0], torch.nn.Parameter(group["params"][0].detach() * 2)
            group["params"][0] = new
            state = optimizer.state.pop(old)
            if moves_state:
                optimizer.state[new] = state

    return swap


def _swap_state(optimizer):
    """Of two parameters of one shape, by hand."""
    first, second = optimizer.param_groups[0]["params"][:2]
    optimizer.state[first], optimizer.state[second] = optimizer.state[second], optimizer.state[first]


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


# By name: what happens before the step, of which parameters there is no gradient, whether gradients lie by columns.
STEPS = {
    "first": (None, (), False),
    "second": (None, (), False),
    "gradients by columns": (None, (), True),
    "gradients missing": (None, (1, 4, 6), False),
    "the first gradient missing": (None, (0, 2), False),
    "all there again": (None, (), False),
    "data": (_swap_data, (), False),
    "dtype": (_swap_dtype(torch.bfloat16), (), True),
    "dtype, still": (None, (3,), False),
    "parameters with their state": (_swap_param(moves_state=True), (), False),
    "parameters without": (_swap_param(moves_state=False), (), False),
    "states": (_swap_state, (), False),
    "dtype, back": (_swap_dtype(torch.float32), (), False),
    "loaded": (None, (), True),
    "last": (None, (), False),
}


def randn(shape, generator, dtype=torch.float32, *, by_columns=False):
    values = torch.randn(shape[::-1] if by_columns else shape, generator=generator).to(dtype)
    return values.permute(*range(len(shape))[::-1]) if by_columns else values


def made_anew(optimizer, options):
    """An optimizer of copies of the parameters and the state, which has never stepped."""
    copies = [
        [torch.nn.Parameter(param.detach().clone()) for param in group["params"]] for group in optimizer.param_groups
    ]
    fresh = Muon8bit([{**more, "params": of} for of, more in zip(copies, KEYS, strict=True)], **options)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return fresh


@pytest.mark.filterwarnings("ignore:no saved state for parameter:UserWarning")  # of those swapped without it
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("is_grouped", [False, True])
def test_a_step_is_that_of_an_optimizer_made_for_it_alone_whatever_was_swapped(request, is_grouped, rounding):
    options = {"lr": 0.1, "block_size": 64, "param_rounding": rounding}
    options |= {"process_group": request.getfixturevalue("one_rank")} if is_grouped else {}
    generator = torch.Generator().manual_seed(0)
    params = [[torch.nn.Parameter(randn(shape, generator)) for shape in of] for of in SHAPES]
    optimizer = Muon8bit([{**more, "params": of} for of, more in zip(params, KEYS, strict=True)], **options)
    for name, (swap, missing, by_columns) in STEPS.items():
        if name == "gradients missing":
            saved = copy.deepcopy(optimizer.state_dict())
        if swap is not None:
            swap(optimizer)
        if name == "loaded":
            optimizer.load_state_dict(saved)
        fresh = made_anew(optimizer, options)
        for index, (ours, theirs) in enumerate(zip(params_of(optimizer), params_of(fresh), strict=True)):
            grad = None if index in missing else randn(ours.shape, generator, ours.dtype, by_columns=by_columns)
            ours.grad, theirs.grad = grad, grad if grad is None else grad.clone()
        optimizer.step()
        fresh.step()
        for index, (ours, theirs) in enumerate(zip(params_of(optimizer), params_of(fresh), strict=True)):
            our_state, their_state = optimizer.state.get(ours, {}), fresh.state.get(theirs, {})
            assert our_state.keys() == their_state.keys(), (name, index)
            assert ours.stride() == theirs.stride(), (name, index)
            for left, right in ((ours.detach(), theirs.detach()), *((our_state[k], their_state[k]) for k in our_state)):
                assert_bitwise(left, right)
