"""The AdamW part against torch.optim.AdamW and float64."""

from collections import Counter

import numpy as np
import pytest
import torch
from helpers import oracle
from torch.utils._python_dispatch import TorchDispatchMode

from muon8bit import Muon8bit
from muon8bit.step import adamw, adamw_cautious
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


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_cautious_weight_decay_decays_where_the_update_goes_towards_zero(bits, dtype, rounding):
    """Against float64, given the update: that of an optimizer of the same gradients, whose parameters are zero before
    each step and do not decay. Where both are finite numbers the two must agree to fp32 rounding and one to bf16."""
    if bits == 8:
        pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 100), (3, 5), (4096,)]
    starts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    starts[0][:, :20] *= 1e-6  # the update is larger than the parameter
    starts[1][0, :2] = torch.tensor([0.0, -0.0])
    params, twins = ([torch.nn.Parameter(s.to(t, copy=True)) for s in starts] for t in (dtype, torch.float32))
    options = {**OPTIONS, "algorithm": "adamw", "weight_decay": 3.0, "adamw_bits": bits}
    groups = [{"params": params, "cautious_weight_decay": True, **options}]
    optimizer = Muon8bit(groups, param_rounding=rounding, rounding_seed=5)
    twin = Muon8bit([{"params": twins, **options, "weight_decay": 0.0}])
    factor = 1 - OPTIONS["lr"] * 3.0
    for step in range(4):
        before = [param.detach().clone() for param in params]
        for param, other in zip(params, twins, strict=True):
            grad = torch.randn(param.shape, generator=generator).to(dtype)
            grad[..., ::3] = 0
            param.grad, other.grad = grad, grad.float()
            other.data.zero_()
        optimizer.step()
        twin.step()
        for index, (param, other, old) in enumerate(zip(params, twins, before, strict=True)):
            update, W = -other.detach().double(), old.double()
            decays = update * W >= 0
            assert 0.1 < decays.double().mean() < 0.99 or param.numel() < 100
            exact = torch.where(decays, factor * W, W) - update
            if dtype is torch.float32:
                torch.testing.assert_close(param.detach().double(), exact, rtol=0, atol=2.0**-22 * 5)
            elif rounding == "nearest":
                unit = torch.finfo(dtype).eps * exact.abs() * 0.51 + 1e-6
                assert bool(((param.detach().double() - exact).abs() <= unit).all())
            else:
                # In fp32 as the kernels: each operation rounded.
                fp32 = torch.where(decays, old.float() * factor, old.float()) - update.float()
                rounded = oracle.round_stochastic(fp32.numpy(), 5, step, index)
                assert np.array_equal(param.detach().float().numpy(), rounded)
            for key, value in twin.state[other].items():
                assert torch.equal(optimizer.state[param][key], value), key


@pytest.mark.parametrize("lr", [3e-3, torch.tensor(3e-3)])
def test_cautious_weight_decay_follows_float64(lr):
    torch.manual_seed(0)
    start = torch.randn(7, 9)
    param = torch.nn.Parameter(start.clone())
    optimizer = optimizer_for(param, lr=lr, weight_decay=3.0, cautious_weight_decay=True)
    W, m, v = start.double().numpy(), np.zeros((7, 9)), np.zeros((7, 9))
    for t in range(1, 21):
        param.grad = torch.randn(7, 9)
        g = param.grad.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.97 * v + 0.03 * g * g
        update = 3e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.97**t)) + 1e-8)
        W = W - 3e-3 * 3.0 * (update * W >= 0) * W - update
        optimizer.step()
        np.testing.assert_allclose(param.detach().double().numpy(), W, atol=1e-5)


@pytest.mark.parametrize("flag", [None, 0.0, 1.0])
@pytest.mark.parametrize("bits", [32, 8])
def test_cautious_weight_decay_is_bitwise_the_same_in_pieces_of_any_size(bits, flag, monkeypatch):
    """Also through strides; and with the flag set, nothing but an 8-bit counter, which the caller takes back, moves."""
    if bits == 8:
        pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    skip = None if flag is None else torch.tensor(flag)
    more = {**OPTIONS, "weight_decay": 3.0, "cautious_weight_decay": True}
    options = AdamWOptions(None, None, 2**25, skip, adamw_bits=bits, **more)
    shapes, keys = [(3 * 4096 + 77,), (40,), (128, 64), (7,)], [None, 77, -3, None]
    starts = [torch.randn(2, *shape, generator=generator).bfloat16() for shape in shapes]
    results = []
    for size in (2**16, 4096):
        monkeypatch.setattr(adamw_cautious, "_CPU_PIECE", size)
        for is_turned in (False, True):
            chunks = []
            for (param, grad), key in zip(starts, keys, strict=True):
                layout = adamw.layout(param.shape, bits)
                state = {name: torch.zeros(shape, dtype=of) for name, (shape, of) in layout.items()}
                lies = param.T.contiguous().T if is_turned and param.ndim == 2 else param.clone()
                chunks.append(AdamWChunk(lies, grad, state, key, 0, param.numel()))
            for _ in range(2):
                adamw.apply(chunks, options)
            results.append([tensor for chunk in chunks for tensor in (chunk.param, *chunk.state.values())])
            steps = [chunk.state["step"].item() for chunk in chunks]
            assert steps == [2 if not flag or adamw.is_8bit(chunk.state) else 0 for chunk in chunks]
            assert all(
                torch.equal(chunk.param, old) == bool(flag) for chunk, (old, _) in zip(chunks, starts, strict=True)
            )
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize(("dtype", "key"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 77)])
@pytest.mark.parametrize("size", [5, 17, 39, 64])
def test_every_part_steps_as_in_the_whole(size, dtype, key, cautious):
    """Bitwise, wherever the cuts are: torch's kernel on the CPU rounds the last few elements otherwise."""
    generator = torch.Generator().manual_seed(size)
    more = {**OPTIONS, "lr": 1e-2, "cautious_weight_decay": cautious}
    options = AdamWOptions(None, None, 2**25, adamw_bits=32, **more)
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


@pytest.mark.parametrize("flag", [None, 0.0, 1.0])
@pytest.mark.parametrize("budget", [2**25, 16 * 4200])
def test_small_tensors_step_together_as_each_alone(budget, flag):
    """Bitwise, also where they do not fit together; sizes that are multiples of 4 come first."""
    generator = torch.Generator().manual_seed(0)
    skip = None if flag is None else torch.tensor(flag)
    options = AdamWOptions(None, None, budget, skip, adamw_bits=32, **{**OPTIONS, "lr": 0.02})
    kinds = [(torch.bfloat16, torch.bfloat16, None), (torch.bfloat16, torch.bfloat16, 77)]
    kinds += [(torch.float16, torch.float16, None), (torch.bfloat16, torch.float32, -3)]
    shapes = [(5,), (64,), (), (4099,), (8, 16), (17,), (1,)]
    ours, theirs, small = [], [], []
    for number, shape in enumerate(shapes * 2):
        for param_dtype, grad_dtype, key in kinds:
            param, grad = (torch.randn(shape, generator=generator).to(t) for t in (param_dtype, grad_dtype))
            layout = adamw.layout(param.shape)
            for chunks in (ours, theirs):
                state = {name: torch.full(size, 0.25, dtype=dtype) for name, (size, dtype) in layout.items()}
                state["step"].fill_(number)
                key_here = None if key is None else key + number
                chunks.append(AdamWChunk(param.clone(), grad, state, key_here, 16 * number, param.numel()))
            small.append(param)
    for _ in range(2):
        adamw.apply(ours, options)
        for chunk in theirs:
            adamw._step_through_copies(chunk, options)
    for our, their, before in zip(ours, theirs, small, strict=True):
        assert torch.equal(our.param, their.param)
        assert all(torch.equal(our.state[name], their.state[name]) for name in their.state)
        assert flag or before.numel() == 1 or not torch.equal(our.param, before)


def test_small_tensors_take_a_few_operations_together():
    """65 norms in bf16: alone each of them takes a dozen."""
    calls = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
            calls[function.overloadpacket.__name__] += not function.is_view
            return function(*args, **(kwargs or {}))

    chunks = []
    for _ in range(65):
        param, grad = torch.ones(2, 2048).bfloat16()
        state = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in adamw.layout(param.shape).items()}
        chunks.append(AdamWChunk(param, grad, state, None, 0, param.numel()))
    with Counting():
        adamw.apply(chunks, AdamWOptions(None, None, 2**25, adamw_bits=32, **OPTIONS))
    assert sum(calls.values()) <= 10, calls


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
