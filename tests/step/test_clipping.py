"""Clipping matrix by matrix, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.allocator import peak_bytes
from helpers.bitwise import assert_bitwise

from muon8bit import Muon8bit, NonFiniteGradientError, release_gradients

SHAPES = {"matrix": (12, 40), "experts": (3, 10, 16), "conv": (8, 3, 3, 3), "rows": (36, 20), "columns": (20, 36)}
KEYS = {
    "conv": {"flatten": True},
    "rows": {"split_sizes": (16, 12, 8)},
    "columns": {"split_sizes": (16, 12, 8), "split_dim": -1},
}


def make(name, dtype=torch.float32, memory_format=torch.contiguous_format, **options):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(SHAPES[name]).to(dtype).contiguous(memory_format=memory_format))
    return param, Muon8bit([{"params": [(name, param)], **KEYS.get(name, {})}], lr=0.02, **options)


def clipped(name, grad, max_norm):
    """In float64, with the matrices of each parameter named by hand."""
    grad = grad.detach().double().numpy().copy()
    pieces = {
        "experts": list(grad),
        "rows": [grad[:16], grad[16:28], grad[28:]],
        "columns": [grad[:, :16], grad[:, 16:28], grad[:, 28:]],
    }.get(name, [grad])
    norms = [np.sqrt((piece**2).sum()) for piece in pieces]
    for piece, norm in zip(pieces, norms, strict=True):
        piece *= min(1, max_norm / norm)
    return torch.from_numpy(grad), norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_step_equals_a_step_by_gradients_clipped_in_float64(name, dtype):
    """Of experts and pieces some are clipped, the others keep their bits."""
    param, optimizer = make(name, dtype, bits=32, clip_matrix_norm=12.0)
    twin, its = make(name, dtype, bits=32)
    grad = torch.randn(SHAPES[name]).to(dtype) * torch.tensor([0.1, 30.0])[torch.arange(SHAPES[name][0]) % 2].view(
        -1, *[1] * (len(SHAPES[name]) - 1)
    ).to(dtype)
    expected, norms = clipped(name, grad, 12.0)
    assert max(norms) > 12
    param.grad, twin.grad = grad.clone(), expected.to(dtype)
    optimizer.step()
    its.step()
    bound = 2.0**-22 if dtype == torch.float32 else 2.0**-7  # of fp32 norm and product; bf16: one code step
    assert ((param.grad - twin.grad).abs() <= bound * twin.grad.abs()).all()
    if name == "experts":
        assert min(norms) <= 12
        for i, norm in enumerate(norms):
            assert torch.equal(param.grad[i], grad[i]) == (norm <= 12)
    momentum, its_momentum = (o.state[p]["momentum_buffer"] for o, p in ((optimizer, param), (its, twin)))
    assert ((momentum - its_momentum).abs() <= 2 * bound * its_momentum.abs()).all()


def test_a_spike_is_forgotten_sooner():
    """The momentum of a run with one gradient 100 times too large stays near that of the run without."""
    directions = []
    for spike, clip in ((1.0, None), (100.0, None), (100.0, 22.0)):
        param, optimizer = make("matrix", bits=32, clip_matrix_norm=clip)
        torch.manual_seed(1)
        for step in range(12):
            param.grad = torch.randn(SHAPES["matrix"]) * (spike if step == 6 else 1.0)
            optimizer.step()
        directions.append(optimizer.state[param]["momentum_buffer"].flatten())
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(directions[0], directions[1], dim=0) < 0.6
    assert cosine(directions[0], directions[2], dim=0) > 0.99


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e25])
def test_a_bad_gradient_is_still_found(value):
    param, optimizer = make("experts", clip_matrix_norm=1.0)
    before = param.detach().clone()
    param.grad = torch.randn(SHAPES["experts"])
    param.grad[1, 2, 3] = value
    with pytest.raises(NonFiniteGradientError, match="experts"):
        optimizer.step()
    assert torch.equal(param, before)


def test_a_zero_gradient_stays_zero():
    param, optimizer = make("matrix", clip_matrix_norm=1.0)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param.grad, torch.zeros_like(param))
    assert param.isfinite().all()


def test_a_channels_last_gradient_is_clipped_in_place():
    param, optimizer = make("conv", memory_format=torch.channels_last, clip_matrix_norm=2.0)
    param.grad = torch.randn(SHAPES["conv"]).contiguous(memory_format=torch.channels_last)
    optimizer.step()
    assert param.grad.norm() == pytest.approx(2.0, rel=1e-6)


def test_clipping_in_backward_equals_clipping_in_step_bitwise():
    results = []
    for is_released in (False, True):
        param, optimizer = make("experts", clip_matrix_norm=1.0, on_nonfinite="skip")
        model = torch.nn.Module()
        model.experts = param
        if is_released:
            release_gradients(model, optimizer)
        for _ in range(3):
            (param.square().sum() * 3).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((param.detach(), optimizer.state[param]["momentum_linear8"]))
    for actual, expected in zip(*results, strict=True):
        assert_bitwise(actual, expected)


def test_clipping_keeps_to_the_workspace():
    param = torch.nn.Parameter(torch.randn(64, 64, 4096).bfloat16())  # 64 MiB in fp32
    optimizer = Muon8bit([param], workspace_bytes=32 * 2**20, clip_matrix_norm=1.0)
    param.grad = torch.randn_like(param)
    optimizer.step()
    peak, left = peak_bytes(optimizer.step)
    assert peak <= 32 * 2**20
    assert left == 0


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), True, "1"])
def test_a_norm_that_cannot_be_is_refused(value):
    with pytest.raises(ValueError, match="clip_matrix_norm must be None or > 0 and finite"):
        make("matrix", clip_matrix_norm=value)


def test_it_is_no_option_of_adamw():
    group = {"params": [torch.nn.Parameter(torch.zeros(3))], "algorithm": "adamw", "lr": 1e-3, "clip_matrix_norm": 1.0}
    with pytest.raises(ValueError, match="clip_matrix_norm has no meaning in a group of 'adamw'"):
        Muon8bit([group])


def test_a_checkpoint_without_it_keeps_the_constructor_s_and_another_s_is_loaded():
    _, optimizer = make("matrix", clip_matrix_norm=3.0)
    saved = make("matrix")[1].state_dict()
    del saved["param_groups"][0]["clip_matrix_norm"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["clip_matrix_norm"] == 3.0
    optimizer.load_state_dict(make("matrix", clip_matrix_norm=4.0)[1].state_dict())
    assert optimizer.param_groups[0]["clip_matrix_norm"] == 4.0
