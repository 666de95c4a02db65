"""bits=32 against float64, beside torch.optim.Muon on the same gradients."""

import numpy as np
import pytest
import torch
from helpers import oracle
from muon8bit_kernels import reference
from torch.optim import Muon
from torch.optim._muon import _zeropower_via_newtonschulz

from muon8bit import Muon8bit
from muon8bit.orthogonalize import resolve_coefficients
from muon8bit.step.muon import factors, lr_ratio

SHAPES = [
    (16, 16),
    (32, 128),
    (128, 32),
    (64, 64),
    (48, 96),
    (100, 60),
    (64, 256),
    (256, 64),
    (128, 128),
    (96, 288),
    (8, 200),
    (200, 24),
]
LARGE = [(256, 320), (384, 256)]  # bf16 on a CPU whose bf16 products are the faster ones


def torch_equations_step(param, buffer, grad, adjust_lr_fn, lr=1e-3, decay=0.1, beta=0.95):
    """torch.optim.Muon without nesterov, its Newton-Schulz on a clone: its own normalizes a bf16 buffer in place."""
    buffer.lerp_(grad, 1 - beta)
    direction = _zeropower_via_newtonschulz(buffer.clone(), oracle.JORDAN, 5, 1e-7)
    rows, cols = param.shape
    ratio = 0.2 * max(rows, cols) ** 0.5 if adjust_lr_fn else max(1, rows / cols) ** 0.5
    param.mul_(1 - lr * decay).add_(direction, alpha=-lr * ratio)


@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits32_is_as_close_to_float64_as_torch(dtype, nesterov, adjust_lr_fn):
    """Distance after 20 steps at most 1.05 times torch's on each of the 12 shapes."""
    generator = torch.Generator().manual_seed(1)
    for rows, cols in (*SHAPES, LARGE[1]):
        start = torch.randn(rows, cols, generator=generator).to(dtype)
        ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
        options = {"nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
        our_optimizer, their_optimizer = Muon8bit([ours], bits=32, **options), Muon([theirs], **options)
        buffer = torch.zeros_like(start)
        exact = oracle.Muon64(start.double().numpy(), nesterov=nesterov, rule=adjust_lr_fn or "original")
        for _ in range(20):
            grad = torch.randn(rows, cols, generator=generator).to(dtype)
            ours.grad, theirs.grad = grad.clone(), grad.clone()
            our_optimizer.step()
            if dtype is torch.bfloat16 and not nesterov:
                torch_equations_step(theirs.data, buffer, grad.clone(), adjust_lr_fn)
            else:
                their_optimizer.step()
            exact.step(grad.double().numpy())
        ours_error = np.linalg.norm(ours.detach().double().numpy() - exact.weight)
        theirs_error = np.linalg.norm(theirs.detach().double().numpy() - exact.weight)
        assert ours_error <= 1.05 * theirs_error, (rows, cols)


@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
def test_8_bits_follow_32_bits(codebook):
    """Random gradients, 20 steps: the path differs from the fp32 one by the quantizer's error alone.

    Bound: per step .011 (linear) and .017 (dynamic) after Newton-Schulz were simulated for Gaussian matrices
    (relative error of the update); a path of 20 correlated steps stayed under .025 on 10 seeds; asserted .05.
    """
    torch.manual_seed(0)
    start = torch.randn(128, 512)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [Muon8bit([params[0]], bits=32), Muon8bit([params[1]], codebook=codebook)]
    for _ in range(20):
        grad = torch.randn(128, 512)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    difference = (params[1] - params[0]).norm() / (params[0] - start).norm()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_newton_schulz_is_as_close_to_float64_as_torch(dtype):
    """Both run bf16 here, and single ratios scatter with the rounding (.77 to 1.18 on small shapes, 4 seeds): the
    geometric mean over shapes and seeds must not exceed 1.05."""
    ratios = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for rows, cols in (*SHAPES[1:], LARGE[0]):
            start = torch.randn(rows, cols, generator=generator).to(dtype)
            ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
            optimizers = Muon8bit([ours], bits=32, ns_dtype=torch.bfloat16), Muon([theirs])
            exact = oracle.Muon64(start.double().numpy())
            for _ in range(4):
                grad = torch.randn(rows, cols, generator=generator).to(dtype)
                for param, optimizer in zip((ours, theirs), optimizers, strict=True):
                    param.grad = grad.clone()
                    optimizer.step()
                exact.step(grad.double().numpy())
            errors = [np.linalg.norm(p.detach().double().numpy() - exact.weight) for p in (ours, theirs)]
            ratios.append(errors[0] / errors[1])
    assert np.exp(np.mean(np.log(ratios))) <= 1.05


def test_polar_express_is_normalized_with_its_safety_factor():
    """The named schedule divides by 1.02 times the Frobenius norm; its bare triples do not."""
    torch.manual_seed(0)
    grad = torch.randn(24, 60)
    param = torch.nn.Parameter(torch.zeros(24, 60))
    param.grad = grad.clone()
    Muon8bit([param], lr=1.0, weight_decay=0.0, ns_coefficients="polar_express").step()
    x = grad.double().numpy()
    x = x / (1.02 * np.linalg.norm(x))
    for a, b, c in resolve_coefficients("polar_express", 5).steps:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    assert np.linalg.norm(-param.detach().double().numpy() - x) / np.linalg.norm(x) < 1e-5


def test_newton_schulz_sees_the_momentum_before_it_is_encoded():
    """One step from zero state: the update is NS of the exact gradient, not of its 8-bit code."""
    torch.manual_seed(0)
    grad = torch.randn(64, 128) * torch.logspace(-4, 0, 128)  # most columns vanish in linear codes
    param = torch.nn.Parameter(torch.zeros(64, 128))
    param.grad = grad.clone()
    optimizer = Muon8bit([param], lr=1.0, weight_decay=0.0, ns_dtype=torch.float32)
    optimizer.step()
    exact = oracle.newton_schulz(grad.double().numpy(), [oracle.JORDAN] * 5)
    error = np.linalg.norm(-param.detach().double().numpy() - exact) / np.linalg.norm(exact)
    assert error < 1e-3  # fp32 Newton-Schulz on this spectrum: 1.3e-4; from the codes it is above 1e-2


@pytest.mark.parametrize(("rows", "cols"), [(64, 16), (16, 64), (32, 32)])
def test_lr_ratio_matches_torch(rows, cols):
    from torch.optim._muon import _adjust_lr

    for rule in (None, "original", "match_rms_adamw"):
        assert lr_ratio(rows, cols, rule) == pytest.approx(_adjust_lr(1.0, rule, torch.Size((rows, cols))), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5), torch.tensor([0.5])])
def test_update_matches_float64_to_one_rounding(dtype, lr):
    torch.manual_seed(0)
    param, direction = torch.randn(7, 9).to(dtype), torch.randn(9, 7).T
    exact = param.double() * (1 - 0.5 * 0.1) - 0.5 * 3.0 * direction.double()
    decay, scale = factors(lr=lr, weight_decay=0.1, ratio=3.0)
    reference.update_params([param[None]], direction[None], decay=decay, scale=scale)
    half_ulp = torch.finfo(dtype).eps * exact.abs() / 2
    slack = torch.finfo(torch.float32).eps * 8  # the fp32 operations before the one rounding
    assert ((param.double() - exact).abs() <= half_ulp + slack).all()


# Zeros of both signs, and numbers whose products vanish in fp32.
_SIGNED = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 0.5, -0.5, 3.0, -3.0])


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)])
@pytest.mark.parametrize("key", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cautious_decay_is_that_of_the_plain_update_where_signs_agree_and_none_elsewhere(dtype, key, scale):
    """To the bit; whether they agree is decided in float64, where no product of two fp32 numbers vanishes."""
    if key is not None and dtype is not torch.bfloat16:
        return
    special = torch.cartesian_prod(_SIGNED, _SIGNED)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    start, direction = torch.cat([special, noise]).T.reshape(2, 1, 4, -1)
    results = []
    for decay, cautious in ((0.7, True), (0.7, False), (1.0, False)):
        param = start.to(dtype, copy=True)
        how = {"decay": decay, "scale": scale, "cautious": cautious, "keys": key and [key]}
        reference.update_params([param], direction, **how)
        results.append(param)
    ours, decayed, kept = results
    agrees = start.to(dtype).double() * direction.double() >= 0
    assert 2000 < agrees.sum() < 2100 + 64
    assert torch.equal(ours, torch.where(agrees, decayed, kept))


@pytest.mark.parametrize("scale", [0.0, torch.tensor(0.0), 1e-46])
def test_where_the_scale_is_zero_all_decay_and_no_direction_is_looked_at(scale):
    param, directions = torch.tensor([[[1.0, -1.0, 2.0]]]), torch.tensor([[[-torch.inf, torch.nan, 1.0]]])
    reference.update_params([param], directions, decay=0.5, scale=scale, cautious=True)
    assert param.tolist() == [[[0.5, -0.5, 1.0]]]


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)])
@pytest.mark.parametrize(("cautious", "power"), [(True, 1), (True, 2), (False, 2)])
@pytest.mark.parametrize("shape", [(96, 80), (16, 48), (48, 16)])
def test_cautious_decay_and_decay_by_lr_twice_follow_float64(shape, cautious, power, lr):
    """Seen wrong: without the mask, or with lr in place of its square, the distance is 100 times the bound."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, generator=generator))
    options = {"cautious_weight_decay": cautious, "decay_lr_power": power, "weight_decay": 2.0}
    optimizer = Muon8bit([param], lr=lr, bits=32, ns_dtype=torch.float32, **options)
    exact = oracle.Muon64(param.detach().numpy(), lr=0.02, decay=2.0, cautious=cautious, decay_lr_power=power)
    for _ in range(5):
        param.grad = torch.randn(shape, generator=generator)
        exact.step(param.grad.double().numpy())
        optimizer.step()
    np.testing.assert_allclose(param.detach().double().numpy(), exact.weight, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradient_and_zero_lr_change_no_parameter(dtype):
    """Distributed checkpointing initialises optimizer state by exactly this step."""
    start = torch.randn(2, 16, 32).to(dtype)
    start[:, 0] = -0.0
    params = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    groups = [{"params": [param], "algorithm": a} for param, a in zip(params, ("muon", "adamw"), strict=True)]
    for cautious in (False, True):
        optimizer = Muon8bit([{**group, "lr": 0.0} for group in groups], cautious_weight_decay=cautious)
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        assert torch.equal(torch.stack([p.detach() for p in params]).view(torch.int16), start.view(torch.int16))
        assert all(optimizer.state[param] for param in params)
