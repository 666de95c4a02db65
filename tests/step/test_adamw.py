"""The AdamW part against torch.optim.AdamW and float64."""

import numpy as np
import pytest
import torch

from muon8bit import Muon8bit
from muon8bit.step import adamw
from muon8bit.step.adamw_chunks import AdamWChunk
from muon8bit.step.group_options import AdamWOptions

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.97), "eps": 1e-8, "weight_decay": 0.05, "maximize": False}


def optimizer_for(param, **options):
    return Muon8bit([{"params": [param], "algorithm": "adamw", **OPTIONS, **options}])


@pytest.mark.parametrize("shape", [(5,), (7, 9), (2, 3, 4), ()])
def test_fp32_equals_torch_bitwise(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    pair = (ours, optimizer_for(ours)), (theirs, torch.optim.AdamW([theirs], fused=True, **OPTIONS))
    for _ in range(10):
        grad = torch.randn(shape)
        for param, optimizer in pair:
            param.grad = grad.clone()
            optimizer.step()
    assert torch.equal(ours, theirs)
    for key, value in pair[1][1].state[theirs].items():
        assert torch.equal(pair[0][1].state[ours][key], value), key


def test_gradients_of_other_strides_are_read_by_index():
    """torch's fused kernel reads memory in order: a transposed gradient must not be mixed up."""
    grad = torch.randn(9, 7).T
    results = []
    for g in (grad, grad.contiguous()):
        param = torch.nn.Parameter(torch.ones(7, 9))
        param.grad = g
        optimizer_for(param).step()
        results.append(param.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("contiguous", [True, False])
def test_any_dtype_and_stride_keeps_fp32_state_and_rounds_once(dtype, contiguous):
    """Moments follow a float64 simulation to fp32 accuracy; each step rounds the parameter once."""
    torch.manual_seed(0)
    start = (torch.randn(9, 7).T if not contiguous else torch.randn(7, 9)).to(dtype)
    param = torch.nn.Parameter(start.clone(memory_format=torch.preserve_format))
    assert param.is_contiguous() == contiguous
    optimizer = optimizer_for(param)
    optimizer.workspace_bytes = 16 * 16  # several chunks of 16 elements, the last one short
    m = v = np.zeros((7, 9))
    for t in range(1, 6):
        before = param.detach().double().numpy()
        param.grad = torch.randn(7, 9).to(dtype)
        g = param.grad.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.97 * v + 0.03 * g * g
        exact = before * (1 - 3e-3 * 0.05) - 3e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.97**t)) + 1e-8)
        optimizer.step()
        half_ulp = torch.finfo(dtype).eps / 2
        tolerance = half_ulp * np.abs(exact) * 1.01 + torch.finfo(dtype).tiny + 1e-6
        assert (np.abs(param.detach().double().numpy() - exact) <= tolerance).all()
    state = optimizer.state[param]
    assert state["step"].item() == 5
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    np.testing.assert_allclose(state["exp_avg"].double().numpy(), m, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(state["exp_avg_sq"].double().numpy(), v, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dtype", "key"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 77)])
@pytest.mark.parametrize("size", [5, 17, 39, 64])
def test_every_part_steps_as_in_the_whole(size, dtype, key):
    """Bitwise, wherever the cuts are: torch's kernel on the CPU rounds the last few elements otherwise."""
    generator = torch.Generator().manual_seed(size)
    options = AdamWOptions(None, None, 2**25, adamw_bits=32, **{**OPTIONS, "lr": 1e-2})
    start, *grads = (torch.randn(size, generator=generator).to(dtype) for _ in range(4))

    def stepped(first, stop):
        param = start[first:stop].clone()
        state = {key: torch.zeros(shape, dtype=of) for key, (shape, of) in adamw.layout(param.shape).items()}
        for grad in grads:
            adamw.apply([AdamWChunk(param, grad[first:stop].clone(), state, key, first, size)], options)
        return {"param": param, **state}

    whole = stepped(0, size)
    for first in range(0, size, 3):
        for stop in range(first + 1, size + 1):
            for name, value in stepped(first, stop).items():
                assert torch.equal(value, whole[name] if name == "step" else whole[name][first:stop]), (first, stop)


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
def test_a_scheduler_that_cycles_momentum_cycles_the_first_beta_as_torchs_adamw(scheduler):
    """torch writes `momentum` into every group of an optimizer that has it, and `betas` into those of its AdamW."""
    torch.manual_seed(0)
    start, grads = torch.randn(40, 16), torch.randn(6, 40, 16)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    matrix = torch.nn.Parameter(torch.randn(8, 16))
    group = {"params": [ours], "algorithm": "adamw", **OPTIONS}
    optimizer = Muon8bit([{"params": [matrix]}, group])
    torchs = torch.optim.AdamW(
        [theirs], **{key: OPTIONS[key] for key in ("lr", "betas", "eps", "weight_decay")}, fused=True
    )
    arguments = {"total_steps": 9} if scheduler == "OneCycleLR" else {"base_lr": 1e-4, "step_size_up": 2}
    make = getattr(torch.optim.lr_scheduler, scheduler)
    schedules = [make(each, max_lr=0.01, **arguments) for each in (optimizer, torchs)]
    seen = set()
    for grad in grads:
        ours.grad, theirs.grad, matrix.grad = grad.clone(), grad.clone(), torch.ones(8, 16)
        optimizer.step()
        torchs.step()
        seen.add(optimizer.param_groups[1]["momentum"])
        for schedule in schedules:
            schedule.step()
    assert len(seen) > 2
    assert torch.equal(ours, theirs)
