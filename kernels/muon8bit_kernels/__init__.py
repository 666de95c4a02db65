"""Kernels of muon8bit: codebooks, the torch reference, Triton kernels and the dispatch between them."""

from .backend import Backend, Kernels
from .codebooks import (
    CODE_DTYPES,
    Codebook,
    dynamic_map,
    dynamic_midpoints,
    unsigned_dynamic_map,
    unsigned_dynamic_midpoints,
    zero_code,
)
from .dispatch import kernels_for
from .element_moment import ElementMoment
from .random_bits import rounding_key
from .reference import num_blocks
from .reference.tiny import MAX_GROWTH, TINY_MAX

__all__ = [
    "CODE_DTYPES",
    "MAX_GROWTH",
    "TINY_MAX",
    "Backend",
    "Codebook",
    "ElementMoment",
    "Kernels",
    "dynamic_map",
    "dynamic_midpoints",
    "kernels_for",
    "num_blocks",
    "rounding_key",
    "unsigned_dynamic_map",
    "unsigned_dynamic_midpoints",
    "zero_code",
]
