"""The whole step of small matrices in torch, against the iteration in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from muon8bit_kernels import reference
from muon8bit_kernels.reference import tiny

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
MIXED = ((4.0848, -6.8946, 2.9270), (2.8366, -3.0525, 1.2012), (1.5, -0.5, 0.0))
SHAPES = [(1, 1), (1, 9), (9, 1), (3, 20), (20, 3), (16, 130), (130, 16), (33, 33), (64, 100), (100, 64)]


def newton_schulz(X, steps):
    """The standard iteration in float64, the small side first."""
    if len(X) > len(X[0]):
        return newton_schulz(X.T, steps).T
    for a, b, c in steps:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


def directions(momentum, grads, steps, *, beta=0.9, nesterov=True):
    """The result of the iteration: what a step of size 1 takes from a zero parameter."""
    params = torch.zeros_like(momentum)
    u = beta * momentum + (1 - beta) * grads
    u = beta * u + (1 - beta) * grads if nesterov else u
    norms = u.flatten(1).norm(dim=1)
    options = {"beta": beta, "nesterov": nesterov, "codebook": None, "block_size": 64}
    tiny.step_tiny([momentum.clone()], None, [grads], [params], norms, **options, steps=steps, decay=1.0, scale=-1.0)
    return params.double().numpy(), (u / norms.view(-1, 1, 1)).double().numpy()


@pytest.mark.parametrize("steps", [JORDAN, MIXED, MIXED[:1]])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_directions_match_float64_newton_schulz_of_each_matrix(rows, cols, steps):
    generator = torch.Generator().manual_seed(rows)
    momentum, grads = torch.randn(2, 3, rows, cols, generator=generator).unbind()
    found, X = directions(momentum, grads, steps, nesterov=cols != 20)
    for ours, start in zip(found, X, strict=True):
        expected = newton_schulz(start, steps)
        # fp32; over 300 seeds up to 2.1e-6, of squares, whose least singular values amplify rounding most, 1.04e-4
        assert np.linalg.norm(ours - expected) <= (5e-4 if rows == cols else 2e-5) * np.linalg.norm(expected)


@pytest.mark.parametrize("spectrum", ["rank 2", "1/k"])
def test_directions_of_hard_spectra_match_float64_newton_schulz(spectrum):
    rng = np.random.default_rng(0)
    left, right = np.linalg.qr(rng.standard_normal((40, 40)))[0], np.linalg.qr(rng.standard_normal((300, 40)))[0]
    values = 1 / np.arange(1, 41) if spectrum == "1/k" else np.arange(40) < 2
    momentum = torch.from_numpy((left * values) @ right.T).float()[None]
    found, X = directions(momentum, momentum, JORDAN, nesterov=False)
    expected = newton_schulz(X[0], JORDAN)
    # 1e-3 is what the rounding of R may become on zero singular values; bf16 is off by 1e-2
    assert np.linalg.norm(found[0] - expected) <= 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
def test_state_is_that_of_the_momentum_step_and_the_parameter_that_of_the_update(codebook, cautious):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 70, 12, generator=generator)
    quantized = [reference.quantize(m, codebook=codebook, block_size=64) for m in torch.randn(3, 70, 12)]
    state = [[torch.stack(parts)] for parts in zip(*quantized, strict=True)]
    options = {"beta": 0.9, "nesterov": True, "codebook": codebook, "block_size": 64}
    norms, X, O = torch.full((3,), 30.0), torch.empty(3, 70, 12), torch.zeros(3, 70, 12)  # noqa: E741
    expected = [[part[0].clone()] for part in state]
    reference.momentum_apply(*expected, [matrices], norms, X, **options)
    again = [[part[0].clone()] for part in state]
    tiny.step_tiny(*again, [matrices], [O], norms, **options, steps=JORDAN, decay=0.0, scale=-1.0)
    params = [torch.randn(3, 70, 12, generator=generator).bfloat16()]
    updated = [params[0].clone()]
    update = {
        "decay": 0.9,
        "scale": 0.5,
        "cautious": cautious,
        "keys": [3, -4, 5],
        "firsts": [0, 7, 2**40],
        "pitch": 100,
    }
    reference.update_params(updated, O, **update)
    tiny.step_tiny(*state, [matrices], params, norms, **options, steps=JORDAN, **update)
    for ours, theirs in ((state[0], expected[0]), (state[1], expected[1]), (params, updated)):
        assert torch.equal(ours[0], theirs[0])


def test_a_zero_momentum_moves_nothing():
    params = torch.ones(1, 4, 9)
    zero, options = torch.zeros(1, 4, 9), {"beta": 0.9, "nesterov": True, "codebook": None, "block_size": 64}
    norms = torch.full((1,), 1e-7)
    tiny.step_tiny([zero.clone()], None, [zero], [params], norms, **options, steps=JORDAN, decay=1.0, scale=1.0)
    assert bool((params == 1).all())


def test_skip_leaves_everything():
    generator = torch.Generator().manual_seed(0)
    codes, grads, params = torch.randn(3, 2, 5, 30, generator=generator).unbind()
    before = codes.clone(), params.clone()
    options = {"beta": 0.9, "nesterov": True, "codebook": None, "block_size": 64, "steps": JORDAN}
    skip = torch.tensor(1.0)
    tiny.step_tiny([codes], None, [grads], [params], torch.ones(2), **options, decay=0.5, scale=1.0, skip=skip)
    assert torch.equal(codes, before[0])
    assert torch.equal(params, before[1])


@pytest.mark.parametrize(
    ("shape", "steps", "message"),
    [
        ((65, 65), JORDAN, r"a side of at most 64, not \[65, 65\]"),
        ((4, 9), (), "cannot carry the steps"),
        ((4, 9), JORDAN * 2, "cannot carry the steps .* rounding grows to 3.3e"),
    ],
)
def test_what_it_cannot_do_raises(shape, steps, message):
    stack = torch.zeros(1, *shape)
    options = {"beta": 0.9, "nesterov": True, "codebook": None, "block_size": 64, "steps": steps}
    with pytest.raises(ValueError, match=message):
        tiny.step_tiny([stack], None, [stack], [stack], torch.ones(1), **options, decay=1.0, scale=1.0)
