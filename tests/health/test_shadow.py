"""The fp32 momentum beside the 8-bit one, against an optimizer with bits=32 that gets the same gradients."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers.bitwise import assert_bitwise
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from muon8bit import AdaMuon8bit, Muon8bit, NonFiniteGradientError, QuantizationHealth

SHAPES = {"matrix": (24, 72), "experts": (3, 24, 40), "conv": (16, 3, 3, 3), "deep": (2, 2, 12, 16)}
OPTIONS = {
    "linear": {},
    "dynamic, no Nesterov": {"codebook": "dynamic", "nesterov": False},
    "signs": {"second_moment": "element", "sign_momentum": True, "rescale": "rms", "codebook": "dynamic"},
    "bf16": {"dtype": torch.bfloat16},
    "pieces of rows": {"group": {"split_sizes": (10, 14)}},
    "pieces of rows of experts": {"shape": "experts", "group": {"split_sizes": (10, 14)}},
    "pieces of columns": {"group": {"split_sizes": (40, 32), "split_dim": -1}},
    "experts, one of them idle": {"shape": "experts"},
    "experts of experts": {"shape": "deep"},
    "flattened": {"shape": "conv", "group": {"flatten": True}},
    "clipped": {"clip_matrix_norm": 0.5, "maximize": True},
    "clipped, in bf16": {"clip_matrix_norm": 0.5, "dtype": torch.bfloat16, "shape": "experts"},
    "clipped pieces of columns": {"clip_matrix_norm": 0.5, "group": {"split_sizes": (40, 32), "split_dim": -1}},
    "scaled": {"scale": 8.0},
    "scaled and clipped, in fp16": {"scale": 8.0, "clip_matrix_norm": 0.5, "dtype": torch.float16},
    "state in host memory": {"state_device": "cpu"},
    "momentum by a schedule": {"schedule": (0.85, 0.9, 0.95, 0.95)},
}


def grad_of(step, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    grad = torch.randn(shape, generator=generator).to(dtype)
    if len(shape) == 3:
        grad[step % 3] = 0  # which leaves that matrix as it is
    return grad


def make(bits, shape="matrix", dtype=torch.float32, group=None, scale=None, **options):
    """Return a parameter and its optimizer."""
    options.pop("schedule", None)
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(SHAPES[shape]).to(dtype))
    groups = [{"params": [("layers.0.w", param)], **(group or {})}]
    optimizer = Muon8bit(groups, lr=0.02, block_size=64, bits=bits, **options)
    if scale is not None:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
    return param, optimizer


def train(param, optimizer, steps, schedule=None):
    for step in steps:
        if schedule:
            optimizer.param_groups[0]["momentum"] = schedule[step]
        param.grad = grad_of(step, param.shape, param.dtype)
        optimizer.step()


def shadows(health, optimizer):
    """The fp32 momenta, and the same parts of the buffer of an optimizer with bits=32."""
    (param,) = optimizer.param_groups[0]["params"]
    group, buffer = optimizer.param_groups[0], optimizer.state[param]["momentum_buffer"]
    matrices = buffer.flatten(1).unsqueeze(0) if group["flatten"] else buffer.view(-1, *buffer.shape[-2:])
    for shadow in health._shadows:
        of = shadow.of
        pieces = [matrices[of.matrix]]
        if group["split_sizes"]:
            pieces = matrices[of.matrix].split(list(group["split_sizes"]), group["split_dim"])
        yield shadow.m, pieces[of.piece]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_shadow_is_the_momentum_of_32_bits_to_the_bit(options):
    param, optimizer = make(8, **options)
    health = QuantizationHealth(optimizer, every=2)
    twin_param, twin = make(32, **options)
    for step in range(4):
        train(param, optimizer, [step], options.get("schedule"))
        train(twin_param, twin, [step], options.get("schedule"))
        for found, expected in shadows(health, twin):
            if param.dtype == torch.float16:  # the first batch of a step averages before a gradient is clipped in place
                torch.testing.assert_close(found, expected, rtol=0, atol=2**-11 * expected.abs().max().item())
            else:
                assert_bitwise(found, expected)
    assert len(health._shadows) == (2 if "group" in options and "split_sizes" in options["group"] else 1)
    assert [of.step for of in health.report().last] == [4] * len(health._shadows)


@pytest.mark.parametrize("options", [OPTIONS["linear"], OPTIONS["signs"], OPTIONS["clipped"]])
def test_watched_run_is_the_same_to_the_bit(options):
    """And so is its checkpoint."""
    param, optimizer = make(8, **options)
    other_param, other = make(8, **options)
    QuantizationHealth(optimizer, every=2)
    train(param, optimizer, range(4))
    train(other_param, other, range(4))
    assert_bitwise(param, other_param)
    saved, expected = optimizer.state_dict(), other.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert saved["state"].keys() == expected["state"].keys()
    for key, value in expected["state"][0].items():
        assert_bitwise(saved["state"][0][key], value)
    assert saved["state"][0].keys() == expected["state"][0].keys()
    copy.deepcopy(optimizer).step()  # a copy is watched by nobody


def test_steps_that_are_not_done_do_not_count():
    """NaN with on_nonfinite="skip" and with "raise", a GradScaler's Inf, and a parameter without a gradient."""
    param, optimizer = make(8, on_nonfinite="skip")
    health = QuantizationHealth(optimizer, every=1)
    train(param, optimizer, range(2))
    before = health._shadows[0].m.clone()
    param.grad[0, 0] = torch.nan
    optimizer.step()
    assert_bitwise(health._shadows[0].m, before)
    assert (health.num_steps, health.report().num_skipped) == (2, 1)
    optimizer.on_nonfinite = "raise"
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    assert_bitwise(health._shadows[0].m, before)
    param.grad = grad_of(2, param.shape)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
    optimizer.step()
    assert_bitwise(health._shadows[0].m, before)
    del optimizer.found_inf, optimizer.grad_scale
    param.grad = None
    optimizer.step()
    assert_bitwise(health._shadows[0].m, before)


def test_step_that_the_device_may_have_skipped_is_asked_there(monkeypatch):
    """As on CUDA, where the host does not know yet: the flag decides, without a wait."""
    param, optimizer = make(8)
    health = QuantizationHealth(optimizer, every=1)
    train(param, optimizer, range(2))
    before = health._shadows[0].m.clone()
    monkeypatch.setattr("muon8bit.step.nonfinite.GradientCheck.is_asynchronous", True)
    param.grad[0, 0] = torch.nan
    optimizer.step()
    assert_bitwise(health._shadows[0].m, before)


def test_closure_gives_the_gradient():
    param, optimizer = make(8)
    health = QuantizationHealth(optimizer, every=1)
    twin_param, twin = make(32)

    def closure():
        param.grad = grad_of(0, param.shape)
        return 1.0

    assert optimizer.step(closure) == 1.0
    train(twin_param, twin, [0])
    for found, expected in shadows(health, twin):
        assert_bitwise(found, expected)


@pytest.mark.parametrize("when", ["loaded", "attached later"])
def test_restart_begins_as_the_8_bit_momentum_is_and_says_so(when):
    param, optimizer = make(8)
    health = QuantizationHealth(optimizer, every=2)
    train(param, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    if when == "loaded":
        param, optimizer = make(8)
        health = QuantizationHealth(optimizer, every=2)
        optimizer.load_state_dict(saved)
    else:
        health = QuantizationHealth(optimizer, every=2)
    scales = saved["state"][0]["momentum_scales"].repeat_interleave(64, 1)[:, :72]
    m = saved["state"][0]["momentum_linear8"].float() * scales / 127
    train(param, optimizer, [3])
    torch.testing.assert_close(health._shadows[0].m, 0.95 * m + 0.05 * grad_of(3, param.shape), rtol=1e-6, atol=0)
    assert "after step 0 " + ("a state was loaded" if when == "loaded" else "it was attached") in str(health.report())


def test_loading_an_empty_state_is_no_restart():
    """As Accelerate does in `prepare`."""
    _, optimizer = make(8)
    health = QuantizationHealth(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert health.report().notes == ()


def test_removed_one_costs_nothing_and_keeps_its_report():
    param, optimizer = make(8)
    health = QuantizationHealth(optimizer, every=1)
    train(param, optimizer, range(2))
    health.remove()
    train(param, optimizer, range(2, 4))
    assert health.num_steps == 2
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert health._shadows[0].m is None
    assert len(health.report().last) == 1


def test_dry_steps_are_left_out():
    param = torch.nn.Parameter(torch.randn(24, 72, device="meta"))
    optimizer = Muon8bit([param])
    health = QuantizationHealth(optimizer, every=1)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert health.num_steps == 0


def test_replicas_are_watched_and_shards_refused_by_name(tmp_path):
    """By one rank of gloo, whose matrices go the way of several."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        param, optimizer = make(8, process_group=dist.group.WORLD)
        health = QuantizationHealth(optimizer, every=2)
        twin_param, twin = make(32)
        train(param, optimizer, range(4))
        train(twin_param, twin, range(4))
        for found, expected in shadows(health, twin):
            assert_bitwise(found, expected)
        assert health.latest()[0].step == 4
        shard = nn.Parameter(distribute_tensor(torch.randn(24, 72), init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(NotImplementedError, match=r"layers.3.w is sharded, and QuantizationHealth needs whole"):
            QuantizationHealth(Muon8bit([("layers.3.w", shard)]))
        optimizer.param_groups[0]["params"] = [shard]  # as Accelerate puts it there
        shard.grad = torch.zeros_like(shard)
        with pytest.raises(NotImplementedError, match=r"layers.0.w is sharded"):
            optimizer.step()
    finally:
        dist.destroy_process_group()


def test_no_warning_for_adamuon_with_its_own_codes():
    param = torch.nn.Parameter(torch.randn(24, 72))
    optimizer = AdaMuon8bit([param], lr=1e-3)
    health = QuantizationHealth(optimizer, every=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(param, optimizer, range(8))
    assert health.report().is_sound
