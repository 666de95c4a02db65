"""Orthogonalization of normalized matrices: O = NS(X), nearest semi-orthogonal matrix up to the coefficients' error.

`newton_schulz` has the equations. `method` decides how a shape is orthogonalized, from `rates`, `cost` and `stability`.
"""

from __future__ import annotations

from .coefficients import NAMES, Coefficients, resolve_coefficients
from .cost import flops, triangle_gain
from .method import (
    NSMethod,
    Partition,
    batch_size,
    choose_method,
    force_method,
    method_cost,
    partition,
    rates_of,
    symmetric_gain,
    workspace_bytes,
)
from .newton_schulz import orthogonalize
from .rates import RATES, Rates, device_kind
from .rates_table import RatesTable, active_table
from .sharded import apply_factor, gram_factor, partial_gram
from .stability import diverges, segments

__all__ = [
    "NAMES",
    "RATES",
    "Coefficients",
    "NSMethod",
    "Partition",
    "Rates",
    "RatesTable",
    "active_table",
    "apply_factor",
    "batch_size",
    "choose_method",
    "device_kind",
    "diverges",
    "flops",
    "force_method",
    "gram_factor",
    "method_cost",
    "orthogonalize",
    "partial_gram",
    "partition",
    "rates_of",
    "resolve_coefficients",
    "segments",
    "symmetric_gain",
    "triangle_gain",
    "workspace_bytes",
]
