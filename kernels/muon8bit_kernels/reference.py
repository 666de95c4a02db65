"""The torch backend: every function of `dispatch.Kernels`, and what the other backends are measured by."""

from .gemm_reference import symmetric_product
from .momentum_reference import dequantize, momentum_apply, momentum_stats, num_blocks, quantize
from .tiny_reference import step_tiny
from .update_reference import round_stochastic, update_params

__all__ = [
    "dequantize",
    "momentum_apply",
    "momentum_stats",
    "num_blocks",
    "quantize",
    "round_stochastic",
    "step_tiny",
    "symmetric_product",
    "update_params",
]
