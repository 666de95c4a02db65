"""Triton backend: every function of `backend.Kernels`.

In the arithmetic of record each operation is rounded to fp32 by itself, and launches pass `enable_fp_fusion=False`.
Fused multiply-adds stand in two places, where they change no bit: in the divisions of `exact`, which give the bits of
`tl.div_rn`, and in the guess of a dynamic code, which a comparison corrects. Products have bounds. There are no
atomics, and nothing is tuned at run time.
"""

import sys

import triton

from .cut import momentum_apply_cut, momentum_stats_cut
from .gemm import symmetric_product
from .momentum import momentum_apply, momentum_stats
from .quantize import dequantize, quantize
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
    "quantize",
    "round_stochastic",
    "second_moment_stats",
    "step_tiny",
    "symmetric_product",
    "update_params",
]


def _settle_cache_keys() -> None:
    """Let Triton compute the keys of its cache for every function here, in one order.

    A key holds the constants of the functions that are called only as far as their own keys are known. So the order in
    which kernels are first launched would decide the keys, and a process with another order would compile them anew.
    """
    for name in sorted(name for name in sys.modules if name.startswith(f"{__package__}.")):
        for value in vars(sys.modules[name]).values():
            if isinstance(value, triton.JITFunction):
                hash(value)


_settle_cache_keys()
