"""The Triton backend: every function of `dispatch.Kernels`, with the bits of the torch reference.

Each operation is rounded to fp32 by itself: divisions are `tl.div_rn` and every launch passes
`enable_fp_fusion=False`. There are no atomics, and nothing is tuned at run time.
"""

from .triton_gemm import symmetric_product
from .triton_momentum import momentum_apply, momentum_stats
from .triton_quantize import dequantize, quantize
from .triton_update import round_stochastic, update_params

__all__ = [
    "dequantize",
    "momentum_apply",
    "momentum_stats",
    "quantize",
    "round_stochastic",
    "symmetric_product",
    "update_params",
]
