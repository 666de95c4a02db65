"""torch's GradScaler, alone and through Accelerate; and `maximize`. Both are factors of the gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from muon8bit import Muon8bit, release_gradients
from muon8bit.step import nonfinite

SHAPES = {"a": (40, 96), "b": (40, 96), "stack": (2, 12, 64), "embed": (80, 64), "norm": (16,)}
PATHS = {
    "linear": {},
    "dynamic": {"codebook": "dynamic"},
    "fp32": {"bits": 32},
    "clipped": {"clip_matrix_norm": 2.0},
    "split": {"split_sizes": (32, 64), "split_dim": -1},
    "8-bit AdamW": {"adamw_bits": 8},
    "stochastic": {"dtype": torch.bfloat16, "param_rounding": "stochastic"},
}


def make(path="linear", **options):
    torch.manual_seed(0)
    how = {**PATHS[path], **options}
    dtype, bits = how.pop("dtype", torch.float32), how.pop("adamw_bits", 32)
    splits = {key: how.pop(key) for key in ("split_sizes", "split_dim") if key in how}
    params = {name: torch.nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}
    named = {name: (name, param) for name, param in params.items()}
    groups = [
        {"params": [named["a"], named["b"]], **splits},
        {"params": [named["stack"]]},
        {"params": [named["embed"], named["norm"]], "algorithm": "adamw", "lr": 0.01, "adamw_bits": bits},
    ]
    return params, Muon8bit(groups, lr=0.02, **how)


def set_grads(params, seed, factor=1.0, bad=None):
    generator = torch.Generator().manual_seed(seed)
    for name, param in params.items():
        grad = torch.randn(SHAPES[name], generator=generator).to(param.dtype)
        param.grad = grad * factor
        if name == bad:
            param.grad.view(-1)[3] = torch.inf


def assert_same(params, optimizer, twins, twin):
    for name, param in params.items():
        assert torch.equal(param, twins[name]), name
        state, expected = optimizer.state[param], twin.state[twins[name]]
        assert list(state) == list(expected)
        for key, value in state.items():
            assert torch.equal(value, expected[key]), (name, key)


BAD = {1: "a", 2: "embed", 5: "norm", 7: "stack"}


@pytest.mark.parametrize("is_asynchronous", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_updates_equal_those_of_unscaled_gradients_and_planted_infinities_are_skipped(
    path, is_asynchronous, monkeypatch
):
    """A scale is a power of two, so that nothing is rounded. Without a scaler the bad steps are left out by hand."""
    monkeypatch.setattr(nonfinite.GradientCheck, "is_asynchronous", is_asynchronous)
    params, optimizer = make(path)
    twins, twin = make(path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    scales = []
    for step in range(9):
        scale = scaler.scale(torch.tensor(1.0)).item()
        scales.append(scale)
        set_grads(params, step, scale, BAD.get(step))
        scaler.step(optimizer)
        scaler.update()
        if step not in BAD:
            set_grads(twins, step)
            twin.step()
    assert scales[-1] == 2.0**6  # halved after each bad step
    assert optimizer.num_skipped_steps == len(BAD)
    assert_same(params, optimizer, twins, twin)
    assert [g.get("rounding_step") for g in optimizer.param_groups] == [
        g.get("rounding_step") for g in twin.param_groups
    ]


@pytest.mark.parametrize("is_unscaled", [False, True])
def test_accelerates_optimizer_hands_its_scaler_over(is_unscaled):
    """`unscale_` before clipping by the loop is the other way that a scaler is used."""
    Accelerator(cpu=True)
    params, optimizer = make()
    twins, twin = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    assert wrapped.scaler is scaler
    for step in range(9):
        set_grads(params, step, scaler.scale(torch.tensor(1.0)).item(), BAD.get(step))
        if is_unscaled:
            scaler.unscale_(optimizer)
        wrapped.step()
        if step not in BAD:
            set_grads(twins, step)
            twin.step()
    assert optimizer.num_skipped_steps == len(BAD) >= 3
    assert scaler.get_scale() == 2.0 ** (10 - len(BAD))
    assert not hasattr(optimizer, "found_inf")
    assert_same(params, optimizer, twins, twin)


def test_a_found_inf_of_others_is_obeyed_and_never_raises():
    """Another optimizer's gradients may be what the scaler found."""
    params, optimizer = make()
    set_grads(params, 0)
    before = copy.deepcopy(params)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(8.0)
    optimizer.step()
    assert all(torch.equal(param, before[name]) for name, param in params.items())
    assert not optimizer.state
    assert optimizer.num_skipped_steps == 1
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(params["a"], before["a"])


def test_gradients_in_float16_are_unscaled_in_float32():
    """Divided in fp16, a gradient of 2^-20 that was scaled to be seen would lose its bits again."""
    torch.manual_seed(0)
    start, grad = torch.randn(16, 64).half(), torch.randn(16, 64) * 2.0**-20
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    momenta = []
    for param, scale in zip(params, (2.0**12, None), strict=True):
        optimizer = Muon8bit([param], bits=32)
        param.grad = (grad * 2.0**12).half()
        if scale is None:  # the same number, as no fp16 can hold it
            momenta.append(0.05 * (param.grad.double() / 2.0**12))
            continue
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        optimizer.step()
        momenta.append(optimizer.state[param]["momentum_buffer"].double())
    torch.testing.assert_close(*momenta, rtol=1e-6, atol=0)


def train(params, optimizer, sign, steps=3, released=False):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        weights = {name: sign * torch.randn(SHAPES[name], generator=generator) for name in params}
        if released:
            sum((param.float() * weights[name]).sum() for name, param in params.items()).backward()
        else:
            for name, param in params.items():
                param.grad = weights[name].to(param.dtype)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_maximize_is_the_step_of_the_negated_gradient_to_the_bit(path, released):
    more = {"on_nonfinite": "skip"} if released else {}
    params, optimizer = make(path, maximize=True, **more)
    twins, twin = make(path, **more)
    if released:
        for each, of in ((params, optimizer), (twins, twin)):
            release_gradients(torch.nn.ParameterDict({**each}), of)
    train(params, optimizer, 1.0, released=released)
    train(twins, twin, -1.0, released=released)
    assert_same(params, optimizer, twins, twin)


def test_maximize_leaves_the_gradient_as_it_is_and_is_a_key_of_a_group():
    param, other = (torch.nn.Parameter(torch.randn(8, 64)) for _ in range(2))
    optimizer = Muon8bit([{"params": [param], "maximize": True}, {"params": [other]}])
    assert [group["maximize"] for group in optimizer.param_groups] == [True, False]
    grad = torch.randn(8, 64)
    param.grad = other.grad = grad
    before = grad.clone()
    optimizer.step()
    assert torch.equal(grad, before)
