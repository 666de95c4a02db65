"""Torch backend: every function of `backend.Kernels`, against which the other backends are measured."""

from .cut import momentum_apply_cut, momentum_stats_cut
from .momentum import dequantize, momentum_apply, momentum_stats, num_blocks, quantize
from .products import symmetric_product
from .second_moment import direction_squares, second_moment_stats
from .tiny import step_tiny
from .update import round_stochastic, update_params

__all__ = [
    "dequantize",
    "direction_squares",
    "momentum_apply",
    "momentum_apply_cut",
    "momentum_stats",
    "momentum_stats_cut",
    "num_blocks",
    "quantize",
    "round_stochastic",
    "second_moment_stats",
    "step_tiny",
    "symmetric_product",
    "update_params",
]
