"""NorMuon and AdaMuon as each paper and repository has them: rules in float64, and steps in plain torch.

A rule takes (state, weight, grad, lr, decay), float64 arrays, and returns the weight after the step; `state` is an
empty namespace before the first. A plain step takes the same as tensors, steps the weight in place, and computes in the
precisions in which those repositories run: Newton-Schulz in bf16, state and update mostly in the parameter's dtype.
modded-nanogpt's momentum schedule, its doubled MLP output and the lower halves that it keeps of bf16 weights are left
out.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from numpy.linalg import norm

JORDAN = [(3.4445, -4.775, 2.0315)] * 5
# Amsel et al., arXiv 2505.16932, for five steps and a safety factor of 2e-2.
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def iterated(x, triples):
    """Return x after a step a x + b (x x^T) x + c (x x^T)^2 x for each triple; arrays and tensors alike."""
    if x.shape[0] > x.shape[1]:
        return iterated(x.T, triples).T
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def jordan(x):
    return iterated(x / (norm(x) + 1e-7), JORDAN)


def normuon_paper(s, w, g, lr, decay):
    """Take a step of arXiv 2510.05491: no Nesterov, a number a row, and a rate that makes the update's RMS 0.2 lr."""
    s.m = 0.95 * getattr(s, "m", 0.0) + 0.05 * g
    o = jordan(s.m)
    s.v = 0.95 * getattr(s, "v", 0.0) + 0.05 * np.mean(o**2, axis=1, keepdims=True)
    hat = o / (np.sqrt(s.v) + 1e-8)
    rate = 0.2 * lr * np.sqrt(w.size) / norm(hat)
    return w - lr * decay * w - rate * hat


def normuon_official(s, w, g, lr, decay):
    """Take a step of the authors' code: Nesterov, the norm of this step's O, and Jordan's factor for tall matrices."""
    s.m = getattr(s, "m", 0.0) + 0.05 * (g - getattr(s, "m", 0.0))
    o = jordan(g + 0.95 * (s.m - g))
    s.v = getattr(s, "v", 0.0) + 0.05 * ((o**2).mean(1)[:, None] - getattr(s, "v", 0.0))
    u = o / (np.sqrt(s.v) + 1e-10)
    u = u * (norm(o) / norm(u)) * max(1.0, w.shape[0] / w.shape[1]) ** 0.5
    return w * (1 - lr * decay) - lr * u


def normuon_dion(s, w, g, lr, decay):
    """Take a step of dion's defaults: heavy ball, no Nesterov, Polar Express, the spectral factor sqrt(out / in)."""
    s.m = 0.95 * getattr(s, "m", 0.0) + g
    o = iterated(s.m / (1.02 * norm(s.m) + 1e-8), POLAR_EXPRESS)
    s.v = 0.95 * getattr(s, "v", 0.0) + (1 - 0.95) * (o * o).mean(axis=-1, keepdims=True)
    u = o / (s.v**0.5 + 1e-8)
    u *= norm(o) / max(norm(u), 1e-8)
    rows, cols = w.shape
    return (1 - lr * decay) * w - lr * (rows / cols) ** 0.5 * u


def normuon_modded(s, w, g, lr, decay, by_rows=None):
    """Take a step of modded-nanogpt: a number a row or column by shape, a floor under v, cautious decay by lr twice."""
    s.m = 0.95 * getattr(s, "m", 0.0) + 0.05 * g
    u = 0.05 * g + 0.95 * s.m
    o = iterated(u / (1.02 * norm(u) + 1e-6), POLAR_EXPRESS)
    rows, cols = w.shape
    by_rows = rows >= cols if by_rows is None else by_rows
    mean = (o**2).mean(axis=1 if by_rows else 0, keepdims=True)
    s.v = 0.9 * getattr(s, "v", 0.0) + 0.1 * mean
    scale = np.maximum(s.v, 1e-10) ** -0.5
    scale = scale * np.sqrt((o**2).sum() / (o**2 * scale**2).sum())
    rate = lr * max(1, rows / cols) ** 0.5
    update = o * scale
    return w - w * (update * w >= 0) * (decay * lr) * rate - update * rate


def adamuon_paper(s, w, g, lr, decay):
    """Take a step of arXiv 2507.11005, algorithm 1: heavy ball, the sign, one beta for both moments."""
    s.m = 0.95 * getattr(s, "m", 0.0) + g
    s.u = s.m
    o = jordan(np.sign(s.m))
    s.v = 0.95 * getattr(s, "v", 0.0) + 0.05 * o * o
    hat = o / (np.sqrt(s.v) + 1e-8)
    gamma = 0.2 * np.sqrt(w.size) / norm(hat)
    return w - lr * (gamma * hat + decay * w)


def adamuon_official(s, w, g, lr, decay):
    """Take a step of the authors' GPT-2 code: an average with Nesterov, and the sign of the mix."""
    s.m = getattr(s, "m", 0.0) * 0.95 + g * 0.05
    s.u = g * 0.05 + s.m * 0.95
    o = jordan(np.sign(s.u))
    s.v = getattr(s, "v", 0.0) * 0.95 + o**2 * 0.05
    hat = o / (np.sqrt(s.v) + 1e-8)
    hat = hat * (0.2 * np.sqrt(w.size) / (norm(hat) + 1e-8))
    return w * (1 - lr * decay) - lr * hat


RULES = {
    "normuon paper": normuon_paper,
    "normuon official": normuon_official,
    "normuon dion": normuon_dion,
    "normuon modded": normuon_modded,
    "adamuon paper": adamuon_paper,
    "adamuon official": adamuon_official,
}
# The keys of a group that say the same as the rule, weight decay aside.
NORMUON = {"momentum": 0.95, "nesterov": False, "second_moment": "row", "beta2": 0.95, "second_moment_eps": 1e-8}
KEYS = {
    "normuon paper": {**NORMUON, "rescale": "rms"},
    "normuon official": {**NORMUON, "nesterov": True, "second_moment_eps": 1e-10, "rescale": "keep"},
    "normuon dion": {
        **NORMUON,
        "ns_coefficients": "polar_express",
        "rescale": "keep",
        "adjust_lr_fn": "spectral",
    },
    "normuon modded": {
        **NORMUON,
        "nesterov": True,
        "ns_coefficients": "polar_express",
        "second_moment": "shape",
        "beta2": 0.9,
        "second_moment_eps": 1e-10,
        "second_moment_eps_form": "clamp",
        "rescale": "keep",
    },
    "adamuon paper": {**NORMUON, "second_moment": "element", "rescale": "rms", "sign_momentum": True},
}
KEYS["adamuon official"] = {**KEYS["adamuon paper"], "nesterov": True}
DECAY_KEYS = {"normuon modded": {"cautious_weight_decay": True, "decay_lr_power": 2}}

# Square, tall, wide, a column, a row, odd, and a query, a key and a fused weight of grouped heads.
SHAPES = [
    (32, 32),
    (64, 64),
    (96, 24),
    (24, 96),
    (48, 1),
    (1, 48),
    (33, 17),
    (17, 33),
    (65, 64),
    (64, 48),
    (16, 48),
    (96, 48),
]


def run_of(version, shape, dtype, seed, steps=20):
    """Return a weight and gradients in dtype, rows of several sizes; those of AdaMuon have no sign that rounding turns.

    Where the sign's argument is under 1e-4 of its row's maximum, its gradient is moved until it is not.
    """
    rng = np.random.default_rng(seed)
    sizes, m, grads = np.exp(rng.normal(size=(shape[0], 1))), np.zeros(shape), []
    for _ in range(steps):
        grad = torch.from_numpy(sizes * rng.normal(size=shape)).to(dtype)
        while version.startswith("adamuon"):
            g = grad.double().numpy()
            u = 0.95 * m + 0.05 * g
            u = 0.95 * u + 0.05 * g if version == "adamuon official" else u
            largest = np.abs(u).max(axis=1, keepdims=True)
            if (np.abs(u) >= 1.01e-4 * largest).all():
                break
            moved = g + np.where(np.abs(u) < 1.01e-4 * largest, np.copysign(0.2 * largest, u), 0)
            grad = torch.from_numpy(moved).to(dtype)
        m = 0.95 * m + 0.05 * grad.double().numpy()
        grads.append(grad)
    return torch.from_numpy(0.1 * rng.normal(size=shape)).to(dtype), grads


def bf16_newton_schulz(x, version):
    """Return Newton-Schulz of a tensor as `version` has it, in bf16."""
    x = x.bfloat16()
    if version in ("normuon dion", "normuon modded"):
        return iterated(x / (x.norm() * 1.02 + (1e-8 if version == "normuon dion" else 1e-6)), POLAR_EXPRESS)
    return iterated(x / (x.norm() + 1e-7), JORDAN)


@torch.no_grad()
def plain_step(version, s, w, g, lr, decay):
    """Take a step of a version in plain torch, W in place: no fp32 copies but those that the version has."""
    rows, cols = w.shape
    modded, sign = version == "normuon modded", version.startswith("adamuon")
    if not vars(s):
        s.m = torch.zeros_like(w, dtype=torch.float32 if modded else None)
        columns = modded and rows < cols
        v = torch.zeros_like(w) if sign else torch.zeros_like(w[:1] if columns else w[:, :1])
        s.v = v.float() if modded else v.bfloat16() if sign else v
    g = g.to(s.m.dtype)
    if version in ("normuon dion", "adamuon paper"):
        s.m.mul_(0.95).add_(g)
    else:
        s.m.lerp_(g, 0.05)
    u = g.lerp(s.m, 0.95) if modded or version.endswith("official") else s.m
    o = bf16_newton_schulz(u.sign() if sign else u, version).to(s.v.dtype)
    squares = o.square() if sign else o.square().mean(0 if s.v.shape[0] == 1 < rows else 1, keepdim=True)
    s.v.lerp_(squares, 0.1 if modded else 0.05)
    eps = 1e-10 if version == "normuon official" else 1e-8
    update = o * s.v.clamp(min=1e-10).rsqrt() if modded else o / (s.v.sqrt() + eps)
    if version == "normuon paper" or sign:
        update *= 0.2 * w.numel() ** 0.5 / update.norm()
    else:
        ratio = rows / cols if version == "normuon dion" else max(1, rows / cols)
        update *= o.norm() / update.norm() * ratio**0.5
    if modded:
        w.sub_(w * (update * w >= 0) * (lr * ratio**0.5 * lr * decay))
    else:
        w.mul_(1 - lr * decay)
    w.sub_(lr * update.to(w.dtype))


LR = 0.02


@cache
def reference_run(version, shape, dtype, decay):
    """Return a weight and 20 gradients, the weight after them by the rule, and its distance from the plain step's.

    Checks that no sign can be turned by rounding: no argument is under 1e-4 of its row's maximum.
    """
    weight, grads = run_of(version, shape, dtype, seed=SHAPES.index(shape))
    expected, plain = weight.double().numpy(), weight.clone()
    rule_state, plain_state = SimpleNamespace(), SimpleNamespace()
    for grad in grads:
        expected = RULES[version](rule_state, expected, grad.double().numpy(), LR, decay)
        plain_step(version, plain_state, plain, grad, LR, decay)
        if version.startswith("adamuon"):
            magnitude = np.abs(rule_state.u)
            assert (magnitude >= 1e-4 * magnitude.max(axis=1, keepdims=True)).all()
    return weight, grads, expected, distance(plain, expected)


def distance(param, expected):
    """Return the Frobenius distance of a tensor from a float64 array."""
    return norm(param.detach().double().numpy() - expected)
