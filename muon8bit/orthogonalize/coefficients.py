"""Newton-Schulz coefficients: one triple (a, b, c) a step for X <- aX + b(XX^T)X + c(XX^T)^2 X.

Sources: `jordan` K. Jordan, "Muon", 2024; `you` Y. Jiacheng, same page's public follow-up; `polar_express`
Amsel et al., arXiv 2505.16932, 5 steps with safety factor 2e-2; `deepseek_v4` eight of Jordan's steps and two
of (2, -1.5, 0.5), as reported for DeepSeek-V4.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

Triple: TypeAlias = tuple[float, float, float]

JORDAN: Triple = (3.4445, -4.7750, 2.0315)
_YOU: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


_LARGEST = 2.0**127  # float32 ends at twice that


@dataclass(frozen=True)
class Coefficients:
    """Newton-Schulz coefficients, checked, one triple a step.

    Attributes:
        steps: the triples (a, b, c) in order.
        norm_factor: the number that the Frobenius norm is multiplied by before a matrix is divided by it.
    """

    steps: tuple[Triple, ...]
    norm_factor: float = 1.0


_NAMED: dict[str, Coefficients] = {
    "you": Coefficients(_YOU),
    "polar_express": Coefficients(_POLAR_EXPRESS, norm_factor=1.02),
    "deepseek_v4": Coefficients((JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2),
}
NAMES = ("jordan", *_NAMED)


def _is_finite(value: Any) -> bool:
    """Return whether float32 holds a real number; an int may be too large for a float."""
    return bool(-_LARGEST < value < _LARGEST)


def _triple(value: Any) -> Triple:
    if not all(isinstance(v, Real) and _is_finite(v) for v in value):
        raise ValueError(f"ns_coefficients must be numbers that are finite in float32, not {reprlib.repr(value)}")
    a, b, c = (float(v) for v in value)
    return a, b, c


def resolve_coefficients(
    ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]], ns_steps: int
) -> Coefficients:
    """Turn what the user gave into one triple a step.

    Args:
        ns_coefficients: one triple (used at every step, as in torch.optim.Muon), a sequence of `ns_steps` triples, or a
            name of `NAMES`. `"jordan"` fits any number of steps.
        ns_steps: the number of Newton-Schulz steps, 1 to 99.

    Raises:
        ValueError: for an unknown name, a wrong length, or a value that is no finite number. The message names the
            argument.
    """
    if type(ns_steps) is not int or not 1 <= ns_steps < 100:
        raise ValueError(f"ns_steps must be an integer from 1 to 99, not {reprlib.repr(ns_steps)}")
    if isinstance(ns_coefficients, str):
        if ns_coefficients == "jordan":
            return Coefficients((JORDAN,) * ns_steps)
        if ns_coefficients not in _NAMED:
            raise ValueError(f"ns_coefficients {ns_coefficients!r} is not one of {', '.join(NAMES)}")
        coefficients = _NAMED[ns_coefficients]
        if len(coefficients.steps) != ns_steps:
            raise ValueError(
                f"ns_coefficients={ns_coefficients!r} has {len(coefficients.steps)} steps: "
                f"pass ns_steps={len(coefficients.steps)} (not {ns_steps})"
            )
        return coefficients
    if not isinstance(ns_coefficients, Sequence):
        raise ValueError(
            f"ns_coefficients must be a triple (a, b, c), triples, or a name, not {reprlib.repr(ns_coefficients)}"
        )
    values = list(ns_coefficients)
    if len(values) == 3 and not any(isinstance(v, Sequence) for v in values):
        return Coefficients((_triple(values),) * ns_steps)
    if not all(isinstance(v, Sequence) and len(v) == 3 for v in values):
        raise ValueError("ns_coefficients must be a triple (a, b, c), a list of triples, or a name")
    if len(values) != ns_steps:
        raise ValueError(f"ns_coefficients holds {len(values)} triples but ns_steps is {ns_steps}: make them equal")
    return Coefficients(tuple(_triple(v) for v in values))
