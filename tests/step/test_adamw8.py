"""AdamW in 8 bits against bitsandbytes.optim.AdamW8bit and float64."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from helpers.bitwise import assert_bitwise
from muon8bit_kernels import dynamic_map, reference, rounding_key, unsigned_dynamic_map

from muon8bit import Muon8bit, NonFiniteGradientError, release_gradients, state_report
from muon8bit.step import adamw, adamw8bit, nonfinite
from muon8bit.step.adamw_chunks import AdamWChunk
from muon8bit.step.group_options import AdamWOptions

bitsandbytes = pytest.importorskip("bitsandbytes")

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.97), "eps": 1e-8, "weight_decay": 0.05}
SIGNED, UNSIGNED = (bitsandbytes.functional.create_dynamic_map(signed=s).double().numpy() for s in (True, False))
KEYS = {"step", "exp_avg_dynamic8", "exp_avg_scales", "exp_avg_sq_dynamic8", "exp_avg_sq_scales"}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, NEEDS_GPU))]


def optimizer_for(*params, group=None, **options):
    return Muon8bit([{"params": params, "algorithm": "adamw", "adamw_bits": 8, **OPTIONS, **(group or {})}], **options)


def decoded(codes, scales, codebook):
    """float64, by hand."""
    flat = (
        codebook[codes.cpu().numpy().ravel()] * np.repeat(scales.cpu().double().numpy().ravel(), 256)[: codes.numel()]
    )
    return flat.reshape(codes.shape)


def moments_of(state):
    return (
        decoded(state["exp_avg_dynamic8"], state["exp_avg_scales"], SIGNED),
        decoded(state["exp_avg_sq_dynamic8"], state["exp_avg_sq_scales"], UNSIGNED),
    )


@pytest.mark.parametrize("shape", [(20, 512), (9000,), (70, 100), (2, 9, 256)])
def test_parameters_and_state_equal_bitsandbytes_bitwise(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer, other = optimizer_for(ours), bitsandbytes.optim.AdamW8bit([theirs], **OPTIONS)
    maps = [codebook().clone() for codebook in (dynamic_map, unsigned_dynamic_map)]
    for _ in range(10):
        grad = torch.randn(shape)
        for param, stepped in ((ours, optimizer), (theirs, other)):
            param.grad = grad.clone()
            stepped.step()
    assert_bitwise(ours.detach(), theirs.detach())
    state, expected = optimizer.state[ours], other.state[theirs]
    assert state.keys() == KEYS
    assert state["step"].item() == 10
    for moment, number in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        assert_bitwise(state[f"{moment}_dynamic8"], expected[f"state{number}"])
        assert_bitwise(state[f"{moment}_scales"].flatten(), expected[f"absmax{number}"])
    for codebook, before in zip((dynamic_map, unsigned_dynamic_map), maps, strict=True):
        assert_bitwise(codebook(), before)  # some versions of its quantizer wrote into the map


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [(70, 100), (14, 512)])
def test_each_step_is_that_of_float64_from_the_stored_moments(dtype, contiguous, shape, device, monkeypatch):
    """The parameter is rounded once; each stored moment is a neighbour in its map of the exact one, the floor of the
    second moment included."""
    monkeypatch.setattr(adamw8bit, "_CPU_CHUNK", 1024)
    torch.manual_seed(0)
    start = (torch.randn(shape) if contiguous else torch.randn(*shape[::-1]).T).to(device, dtype)
    param = torch.nn.Parameter(start.clone(memory_format=torch.preserve_format))
    assert param.is_contiguous() == contiguous
    optimizer = optimizer_for(param)
    m = v = np.zeros(shape)
    for t in range(1, 6):
        before = param.detach().cpu().double().numpy()
        param.grad = (torch.randn(shape) * torch.rand(shape) ** 4).to(device, dtype)
        g = param.grad.cpu().double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.97 * v + 0.03 * g * g
        exact = before * (1 - 3e-3 * 0.05) - 3e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.97**t)) + 1e-8)
        optimizer.step()
        half_ulp = torch.finfo(dtype).eps / 2
        tolerance = half_ulp * np.abs(exact) * 1.01 + torch.finfo(dtype).tiny + 1e-6
        assert (np.abs(param.detach().cpu().double().numpy() - exact) <= tolerance).all()
        stored = moments_of(optimizer.state[param])
        for value, found, codebook in zip((m, v), stored, (SIGNED, UNSIGNED), strict=True):
            assert_neighbours(value, found, codebook, more=2**-15 if device == "cpu" else 0)
        m, v = stored
    assert optimizer.state[param]["exp_avg_sq_dynamic8"].min() >= 1
    assert optimizer.state[param]["step"].item() == 5


def assert_neighbours(exact, found, codebook, more):
    """Each of `found` is the entry of the map, times the block's largest magnitude, below or above the exact value.
    `more`: of that magnitude, what bitsandbytes' quantizer on a CPU adds: 2.1e-5 at most, over 200 blocks of values of
    all sizes; the head-room is a half."""
    for start in range(0, exact.size, 256):
        x, y = (values.ravel()[start : start + 256] for values in (exact, found))
        scale = np.abs(x).max()
        above = np.clip(np.searchsorted(codebook, x / scale), 1, 255)
        gap = (codebook[above] - codebook[above - 1]) * scale
        assert (np.abs(x - y) <= gap * (1 + 1e-5) + (more + 1e-6) * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", [None, 77])
def test_every_part_from_a_multiple_of_256_steps_as_in_the_whole(dtype, key, monkeypatch):
    """Bitwise, over flat slices of parameter, gradient, codes and scales, in chunks of any size."""
    size, generator = 5 * 4096 + 77, torch.Generator().manual_seed(1)
    start, *grads = (torch.randn(size, generator=generator).to(dtype) for _ in range(4))
    key = key if dtype == torch.bfloat16 else None
    options = AdamWOptions(None, None, 2**25, adamw_bits=8, maximize=False, **{**OPTIONS, "lr": 1e-2})

    def stepped(cuts):
        param = start.clone()
        state = {key: torch.zeros(shape, dtype=of) for key, (shape, of) in adamw.layout(param.shape, 8).items()}
        for grad in grads:
            before = state["step"].clone()
            for first, stop in cuts:
                part = {k: v[first:stop] for k, v in state.items() if v.shape == (size,)}
                part |= {k: v[first // 256 : -(-stop // 256)] for k, v in state.items() if k.endswith("scales")}
                part["step"] = state["step"].copy_(before)
                adamw.apply([AdamWChunk(param[first:stop], grad[first:stop], part, key, first, size)], options)
        return {"param": param, **state}

    whole = stepped([(0, size)])
    for chunk, cuts in (
        (256, [(0, size)]),
        (2**16, [(0, 4096), (4096, 3 * 4096), (3 * 4096, size)]),
        (512, [(first, min(first + 256, size)) for first in range(0, size, 256)]),
    ):
        monkeypatch.setattr(adamw8bit, "_CPU_CHUNK", chunk)
        for name, value in stepped(cuts).items():
            assert_bitwise(value, whole[name])


def test_stochastic_rounding_rounds_the_fp32_step():
    torch.manual_seed(0)
    start, grad = torch.randn(4096, dtype=torch.bfloat16), torch.randn(4096, dtype=torch.bfloat16)
    wide, narrow = torch.nn.Parameter(start.float()), torch.nn.Parameter(start.clone())
    optimizer = optimizer_for(narrow, param_rounding="stochastic", rounding_seed=3)
    for param, its in ((wide, optimizer_for(wide)), (narrow, optimizer)):
        param.grad = grad.to(param.dtype)
        its.step()
    assert_bitwise(narrow.detach(), reference.round_stochastic(wide.detach(), key=rounding_key(3, 0, 0)))
    assert (narrow != wide.bfloat16()).any()


def nearest_update(name, g, p, codes, codes_sq, beta1, beta2, _3, _4, eps, step, lr, map1, map2, scales, scales_sq, *_):
    """As bitsandbytes' CUDA kernel: every moment to the nearest code."""
    assert name == "adam"
    blocks = codes.numel() // 256
    m = beta1 * (map1[codes.int()].view(blocks, 256) * scales.view(-1, 1)) + (1 - beta1) * g.view(blocks, 256)
    v = (
        beta2 * (map2[codes_sq.int()].view(blocks, 256) * scales_sq.view(-1, 1))
        + (1 - beta2) * g.view(blocks, 256) ** 2
    )
    p -= (lr * m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)).view_as(p)
    for values, of, s, codebook in ((m, codes, scales, map1), (v, codes_sq, scales_sq, map2)):
        s.copy_(values.abs().amax(1).view_as(s))
        normalized = (values / s.view(-1, 1)).nan_to_num()
        of.copy_((normalized.unsqueeze(-1) - codebook).abs().argmin(-1).view_as(of))


def seldom(rows, step):
    """Gradients of an embedding: one row in twenty has any."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 256, generator=generator) * 1e-2 * (torch.rand(rows, 1, generator=generator) < 0.05)


def test_a_small_second_moment_is_not_lost_to_the_nearest_code_of_zero(monkeypatch):
    """Where it is, `m / (sqrt(0) + eps)` is a step of a hundred learning rates: shown for the update alone."""
    monkeypatch.setattr(torch.ops.bitsandbytes, "optimizer_update_8bit_blockwise", nearest_update)
    monkeypatch.setattr(adamw8bit, "_CPU_CHUNK", 2**20)
    group = {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "maximize": False}
    options = AdamWOptions(None, None, 2**25, adamw_bits=8, **group)
    largest = {}
    for arm in ("alone", "ours"):
        param = torch.zeros(32, 256)
        state = {key: torch.zeros(shape, dtype=of) for key, (shape, of) in adamw.layout(param.shape, 8).items()}
        largest[arm] = 0.0
        for step in range(30):
            before, grad = param.clone(), seldom(32, step)
            with monkeypatch.context() as patch:
                if arm == "alone":
                    patch.setattr(torch.Tensor, "clamp_", lambda tensor, **_: tensor)
                adamw.apply([AdamWChunk(param, grad, state, None, 0, 32 * 256)], options)
            largest[arm] = max(largest[arm], (param - before).abs().max().item())
    assert largest["alone"] > 100
    assert largest["ours"] < 1.1


def test_bytes_and_the_rule_of_small_tensors_are_those_of_bitsandbytes():
    shapes = {"table": (48, 256), "odd": (65, 65), "bias": (4095,), "long": (4096,)}
    params = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    for param in params.values():
        param.grad = torch.ones_like(param)
    optimizer = Muon8bit([{"params": params.items(), "algorithm": "adamw", "adamw_bits": 8, **OPTIONS}])
    optimizer.step()
    report = state_report(optimizer)
    assert report.total_bytes == report.baselines["adamw_8bit"] - 2 * 256 * 4 + 4 * len(shapes)  # counters, no maps
    assert [note.name for note in report.adamw_kept_32bit] == ["bias"]
    assert "adamw_bits=8 (under 4096 elements): bias (4095)" in str(report)
    assert report.to_dict()["adamw_kept_32bit"] == [{"name": "bias", "shape": [4095], "state_bytes": 8 * 4095 + 4}]
    assert optimizer.state[params["bias"]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    found = {name: tuple(optimizer.state[params[name]]["exp_avg_scales"].shape) for name in ("table", "odd", "long")}
    assert found == {"table": (48, 1), "odd": (17,), "long": (16,)}


def test_a_step_of_zeros_with_lr_0_changes_no_bit_of_a_parameter():
    """As distributed checkpointing makes the state."""
    param = torch.nn.Parameter(torch.randn(4096) * (torch.rand(4096) < 0.5))
    before = param.detach().clone()
    param.grad = torch.zeros(4096)
    optimizer = optimizer_for(param, group={"lr": 0.0})
    optimizer.step()
    assert_bitwise(param.detach(), before)
    assert all(np.array_equal(moment, np.zeros(4096)) for moment in moments_of(optimizer.state[param]))


def test_lr_0_changes_no_bit_of_a_stochastically_rounded_parameter():
    """Not the sign of a zero either."""
    start = torch.tensor([-0.0, 0.0, 1.5, -2.0], dtype=torch.bfloat16).repeat(1024)
    param = torch.nn.Parameter(start.clone())
    optimizer = optimizer_for(param, group={"lr": 0.0}, param_rounding="stochastic")
    for seed in range(2):
        param.grad = torch.randn(4096, generator=torch.Generator().manual_seed(seed)).bfloat16()
        optimizer.step()
    assert_bitwise(param.detach(), start)


def snapshot(param, optimizer):
    return {"param": param.detach().clone(), **{key: value.clone() for key, value in optimizer.state[param].items()}}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert_bitwise(value, right[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_bad_step_that_is_not_waited_for_leaves_no_trace(dtype, policy, device, monkeypatch):
    monkeypatch.setattr(nonfinite.GradientCheck, "is_asynchronous", True)
    torch.manual_seed(0)
    start, grads = torch.randn(40, 256), torch.randn(3, 40, 256)
    pairs = []
    for is_bad in (True, False):
        param = torch.nn.Parameter(start.to(device, dtype))
        optimizer = optimizer_for(param, on_nonfinite=policy, param_rounding="stochastic")
        for step, grad in enumerate(grads):
            if is_bad and step == 1:
                param.grad = torch.full_like(param, torch.nan)
                optimizer.step()
                optimizer.state_dict()
                if policy == "raise":
                    with pytest.raises(NonFiniteGradientError):
                        optimizer.step()
            param.grad = grad.to(device, dtype)
            optimizer.step()
        pairs.append((param, optimizer))
    assert pairs[0][1].num_skipped_steps == (policy == "skip")
    assert_same(*(snapshot(*pair) for pair in pairs))
    assert pairs[0][1].state[pairs[0][0]]["step"].item() == 3


def test_a_bad_first_step_leaves_a_state_of_zeros(monkeypatch):
    monkeypatch.setattr(nonfinite.GradientCheck, "is_asynchronous", True)
    param = torch.nn.Parameter(torch.randn(40, 256))
    param.grad = torch.full_like(param, torch.inf)
    optimizer = optimizer_for(param, on_nonfinite="skip")
    optimizer.step()
    optimizer.state_dict()
    assert not any(value.any() for value in optimizer.state[param].values())


@pytest.mark.parametrize("loads", [True, False])
def test_a_bad_step_leaves_no_trace_in_its_own_state_loaded_again(loads, monkeypatch):
    """Whether that can be loaded or not."""
    monkeypatch.setattr(nonfinite.GradientCheck, "is_asynchronous", True)
    param = torch.nn.Parameter(torch.ones(40, 256))
    optimizer = optimizer_for(param, on_nonfinite="skip")
    for value in (1.0, torch.nan, 1.0):
        param.grad = torch.full_like(param, value)
        optimizer.step()
        if value == 1.0:
            own = optimizer.state_dict()
        elif loads:
            optimizer.load_state_dict(own)
        else:
            with pytest.raises(ValueError, match="0 parameter groups"):
                optimizer.load_state_dict({**own, "param_groups": []})
    assert optimizer.state[param]["step"].item() == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_released_steps_equal_ordinary_steps_bitwise_and_skip_alone(asynchronous, monkeypatch):
    """Where one parameter's gradient is not finite, the other is stepped; both go on as if that had not been."""
    monkeypatch.setattr(nonfinite.GradientCheck, "is_asynchronous", asynchronous)
    torch.manual_seed(0)
    weights, inputs = torch.randn(2, 40, 256), torch.randn(4, 2, 40, 256)

    def run(bad_step):
        model = torch.nn.ParameterDict(
            {name: torch.nn.Parameter(w) for name, w in zip("ab", weights.clone(), strict=True)}
        )
        optimizer = optimizer_for(*model.values(), on_nonfinite="skip")
        if bad_step is not None:
            release_gradients(model, optimizer)
        for step, (x, y) in enumerate(inputs):
            for is_bad in (True, False) if step == bad_step else (False,):
                loss = (model["a"] * (x * torch.nan if is_bad else x)).sum() + (0 if is_bad else 1) * (
                    model["b"] * y
                ).sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return model["a"], optimizer

    param, optimizer = run(2)
    assert optimizer.num_skipped_steps == 1
    assert_same(snapshot(param, optimizer), snapshot(*run(None)))


GROUPS = {
    "codebook='linear' beside adamw_bits=8.*blows up": {"adamw_bits": 8, "codebook": "linear"},
    "codebook has no meaning": {"adamw_bits": 8, "codebook": "dynamic"},
    r"adamw_bits must be one of .*, not 16": {"adamw_bits": 16},
    r"adamw_bits must be one of .*, not True": {"adamw_bits": True},
    "adamw_bits has no meaning in a group of 'muon'": {"algorithm": "muon", "adamw_bits": 8},
}


@pytest.mark.parametrize("message", GROUPS)
def test_what_a_group_cannot_mean_is_refused(message):
    group = {"params": [torch.nn.Parameter(torch.ones(64, 64))], "algorithm": "adamw", "lr": 0.1, **GROUPS[message]}
    with pytest.raises(ValueError, match=f"parameter group 0: {message}"):
        Muon8bit([group])


def test_a_device_without_the_update_is_told_before_anything_is_written():
    with pytest.raises(NotImplementedError, match=r"adamw_bits=8.*on mps"):
        adamw8bit.check_available("mps")


def test_without_bitsandbytes_the_error_names_the_option_and_32_bits_work(monkeypatch):
    param = torch.nn.Parameter(torch.ones(64, 64))
    adamw8bit.check_available.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(
            ImportError, match=r"adamw_bits=8 needs bitsandbytes.*pip install bitsandbytes.*adamw_bits=32"
        ):
            optimizer_for(param)
        optimizer_for(param, group={"adamw_bits": 32})
    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
        optimizer = optimizer_for(param)
        param.grad = torch.ones_like(param)
        with pytest.raises(NotImplementedError, match=r"adamw_bits=8: .* on cpu \(on a CPU since 0.50\)"):
            optimizer.step()
    assert param.min() == 1
    optimizer.step()


@pytest.mark.parametrize("seed", [0, 1])
def test_encoding_is_to_the_nearest_code_and_never_zero_for_a_second_moment(seed):
    """Against an argmin in float64; decoding is exact."""
    torch.manual_seed(seed)
    moments = {"exp_avg": torch.randn(21, 100), "exp_avg_sq": torch.randn(21, 100).square() ** 3}
    moments["exp_avg"][-1], moments["exp_avg_sq"][:3] = 0, 0  # a whole block
    state = adamw8bit.encode(moments)
    assert {key: (tuple(value.shape), value.dtype) for key, value in state.items()} == adamw8bit.layout((21, 100))
    for moment, codebook in (("exp_avg", SIGNED), ("exp_avg_sq", UNSIGNED)):
        flat = moments[moment].double().numpy().ravel()
        padded = np.append(flat, np.zeros(-len(flat) % 256)).reshape(-1, 256)
        scales = np.abs(padded).max(1)
        assert np.array_equal(state[f"{moment}_scales"].double().numpy(), scales)
        distances = np.abs((padded / np.where(scales > 0, scales, 1)[:, None])[..., None] - codebook)
        if moment == "exp_avg_sq":
            distances = distances[..., 1:]
        codes = state[f"{moment}_dynamic8"].numpy().ravel()
        found = np.take_along_axis(
            distances.reshape(-1, distances.shape[-1])[: len(flat)],
            codes[:, None].astype(np.int64) - (moment == "exp_avg_sq"),
            1,
        )[:, 0]
        assert (found <= distances.min(-1).ravel()[: len(flat)] + 1e-7).all()
    for found, exact in zip(adamw8bit.decode(state).values(), moments_of(state), strict=True):
        assert np.array_equal(found.numpy(), exact.astype(np.float32))


def test_a_learning_rate_in_a_tensor_is_that_number():
    states = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(40, 256))
        optimizer = optimizer_for(param, group={"lr": lr})
        make_grad = partial(torch.randn, 40, 256)
        for _ in range(2):
            param.grad = make_grad()
            optimizer.step()
        states.append(snapshot(param, optimizer))
    assert_same(*states)
