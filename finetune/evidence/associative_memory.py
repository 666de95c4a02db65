"""One step on a linear associative memory: does an optimizer learn frequent and rare facts alike?

    python -m finetune.evidence.associative_memory --record benchmarks/results/associative_memory.json

Wang et al. (arXiv 2509.26030, section 5 and appendix B.4): K facts, keys E and values V orthonormal, logits V^T W E.
The first beta K facts together have the probability alpha. From W = 0 one step of each rule, scaled, gives a curve of
the largest gap between probabilities of right answers over the population's loss.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.evidence.tables import memory_table
from finetune.storage.run_dir import write_beside
from muon8bit import Muon8bit

NUM_FACTS, ALPHA, BETA = 999, 0.8, 0.2
# Angles of the 3 x 3 rotations, whose blocks make keys and values with overlapping support: appendix D.
KEY_ANGLES, VALUE_ANGLES = (1.715, 0.876, 3.098), (3.638, 2.949, 5.218)
NUM_SCALES = 60


def rotation(a: float, b: float, c: float) -> Tensor:
    """Return the rotation by Euler angles z-y-z, in radians: float64 [3, 3]."""
    cos_a, sin_a, cos_b, sin_b, cos_c, sin_c = (f(x) for x in (a, b, c) for f in (math.cos, math.sin))
    about = [
        [[cos_a, -sin_a, 0.0], [sin_a, cos_a, 0.0], [0.0, 0.0, 1.0]],
        [[cos_b, 0.0, sin_b], [0.0, 1.0, 0.0], [-sin_b, 0.0, cos_b]],
        [[cos_c, -sin_c, 0.0], [sin_c, cos_c, 0.0], [0.0, 0.0, 1.0]],
    ]
    first, second, third = (torch.tensor(rows, dtype=torch.float64) for rows in about)
    return first @ second @ third


def embeddings(num_facts: int, coupled: bool) -> tuple[Tensor, Tensor]:
    """Return keys and values, float64 [num_facts, num_facts], a column each; identities unless `coupled`."""
    if not coupled:
        return torch.eye(num_facts, dtype=torch.float64), torch.eye(num_facts, dtype=torch.float64)
    blocks = [torch.block_diag(*[rotation(*angles)] * (num_facts // 3)) for angles in (KEY_ANGLES, VALUE_ANGLES)]
    return blocks[0], blocks[1]


def gradient(keys: Tensor, values: Tensor, probabilities: Tensor) -> Tensor:
    """Return the gradient of the population's loss at W = 0: float64 [dim, dim]."""
    errors = torch.full((len(probabilities),) * 2, 1 / len(probabilities), dtype=torch.float64)
    errors.fill_diagonal_(1 / len(probabilities) - 1)
    return values @ (errors * probabilities) @ keys.T


def by_muon(grad: Tensor, stored: bool, **options: Any) -> Tensor:
    """Return the update of `Muon8bit`, float64 [dim, dim].

    Args:
        grad: of the first step.
        stored: take that of a second step without a gradient, out of the momentum that the first one kept.
        options: of the class.
    """
    param = torch.nn.Parameter(torch.zeros(grad.shape))
    optimizer = Muon8bit([param], lr=1.0, weight_decay=0.0, nesterov=False, **options)
    for step in range(1 + stored):
        param.data.zero_()
        param.grad = grad.float() if step == 0 else torch.zeros_like(param)
        optimizer.step()
    return param.detach().double()


def by_svd(grad: Tensor) -> Tensor:
    """Return minus the orthogonal factor of a gradient; singular values up to 1e-9 of the largest are left out."""
    U, S, Vh = torch.linalg.svd(grad)
    update: Tensor = -(U * (S / S[0] > 1e-9)) @ Vh
    return update


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "GD": lambda grad: -grad,
    "SignGD": lambda grad: -grad.sign(),
    "Muon, exact": by_svd,
    "Muon32": lambda grad: by_muon(grad, False, bits=32),
    "Muon8 linear": lambda grad: by_muon(grad, False, codebook="linear"),
    "Muon8 dynamic": lambda grad: by_muon(grad, False, codebook="dynamic"),
    "Muon8 linear, stored": lambda grad: by_muon(grad, True, codebook="linear"),
    "Muon8 dynamic, stored": lambda grad: by_muon(grad, True, codebook="dynamic"),
}


def loss_and_gap(logits: Tensor, probabilities: Tensor) -> tuple[float, float]:
    """Return the population's loss in nats, and the gap between the best and the worst known fact.

    Args:
        logits: float64 [values, keys]; those of the diagonal are right.
        probabilities: of the facts, float64 [keys].
    """
    right = logits.log_softmax(0).diagonal()
    return float(-(probabilities * right).sum()), float(right.exp().max() - right.exp().min())


def gap_curve(update: Tensor, keys: Tensor, values: Tensor, probabilities: Tensor) -> list[list[float]]:
    """Return pairs of loss and gap over scales that go from no learning to far beyond."""
    logits = values.T @ update @ keys
    largest = float((logits.diagonal() - logits.mean(0)).max())
    scales = torch.logspace(-0.7, 2.3, NUM_SCALES, dtype=torch.float64) / largest
    points = [loss_and_gap(scale * logits, probabilities) for scale in scales]
    return [[round(loss, 5), round(gap, 6)] for loss, gap in points]


def measure(num_facts: int = NUM_FACTS) -> dict[str, Any]:
    """Return the record: settings, and for each kind of embedding and rule the curve of loss and gap."""
    frequent = round(BETA * num_facts)
    probabilities = torch.full((num_facts,), (1 - ALPHA) / (num_facts - frequent), dtype=torch.float64)
    probabilities[:frequent] = ALPHA / frequent
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for name in ("decoupled", "coupled"):
        keys, values = embeddings(num_facts, coupled=name == "coupled")
        grad = gradient(keys, values, probabilities)
        curves[name] = {rule: gap_curve(make(grad), keys, values, probabilities) for rule, make in RULES.items()}
    settings = {"num_facts": num_facts, "alpha": ALPHA, "beta": BETA, "torch": torch.__version__}
    return {**settings, "curves": curves}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="the JSON file to write (default: none)")
    options = parser.parse_args(argv)
    record = measure()
    if options.record is not None:
        write_beside(options.record, json.dumps(record) + "\n")
    print(memory_table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
