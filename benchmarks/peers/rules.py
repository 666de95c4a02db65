"""Published rules in float64, by which the direction of an update is told; the oracles are those of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np

from tests.helpers.family_rules import POLAR_EXPRESS, RULES
from tests.helpers.oracle import Muon64

Directions = dict[str, np.ndarray]


def last_updates(grads: list[np.ndarray]) -> Directions:
    """Return name of a rule -> the direction of its last update, for float64 gradients of one matrix."""
    return {name: rule(grads) for name, rule in _rules()}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of the angle between two arrays; 0 where one is zero, NaN where one is not finite."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / norms if norms != 0 else 0.0


def closest(update: np.ndarray, directions: Directions) -> tuple[str, float]:
    """Return the rule whose update has the greatest cosine with this one, and the cosine."""
    found = {name: cosine(update, direction) for name, direction in directions.items()}
    best = max(found, key=lambda name: -np.inf if np.isnan(found[name]) else found[name])
    return best, found[best]


def _rules() -> Iterator[tuple[str, Callable[[list[np.ndarray]], np.ndarray]]]:
    for beta in (0.95, 0.9):
        for nesterov in (True, False):
            for polar in (False, True):
                form = "Nesterov" if nesterov else "plain"
                name = f"Muon, {form}, momentum {beta:g}, {'Polar Express' if polar else 'Jordan'}"
                yield name, lambda grads, b=beta, n=nesterov, p=polar: _muon(grads, b, n, p)
    for name, rule in RULES.items():
        yield (
            {"normuon": "NorMuon, ", "adamuon": "AdaMuon, "}[name.split()[0]] + name.split()[1],
            (lambda grads, r=rule: _family(grads, r)),
        )
    for betas in ((0.9, 0.999), (0.9, 0.95)):
        yield f"AdamW, betas {betas[0]:g} and {betas[1]:g}", lambda grads, b=betas: _adamw(grads, *b)


def _muon(grads: list[np.ndarray], beta: float, nesterov: bool, polar: bool) -> np.ndarray:
    rule = Muon64(np.zeros_like(grads[0]), lr=1.0, decay=0.0, beta=beta, nesterov=nesterov)
    for grad in grads[:-1]:
        rule.momentum = beta * rule.momentum + (1 - beta) * grad
    if polar:
        rule.steps = POLAR_EXPRESS
    rule.step(grads[-1])
    return -rule.weight


def _family(grads: list[np.ndarray], rule: Callable[..., np.ndarray]) -> np.ndarray:
    state, zero = SimpleNamespace(), np.zeros_like(grads[0])
    for grad in grads:
        after = rule(state, zero, grad, 1.0, 0.0)
    return -after


def _adamw(grads: list[np.ndarray], beta1: float, beta2: float) -> np.ndarray:
    m = v = np.zeros_like(grads[0])
    for grad in grads:
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    t = len(grads)
    return (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-8)
