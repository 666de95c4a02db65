"""Products that accumulate in fp32 and do not round their operands, whatever the process has been set to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def accumulating_in_fp32(dtype: torch.dtype) -> Iterator[None]:
    """In this context products of `dtype` are what their dtype says; afterwards the settings are what they were.

    fp32: no TF32 and no implicit bf16, which `torch.set_float32_matmul_precision` and `fp32_precision` allow; the Gram
    form fails with them. fp16: neither accumulation nor the sums of split products in fp16. bf16: as torch.optim.Muon
    runs it. The settings are the process's: another thread sees them meanwhile. Nothing is touched where they are right
    already. Source: torch.backends, "fp32_precision" (torch 2.9 and later).
    """
    if dtype == torch.float32:
        with _ieee_fp32():
            yield
    elif dtype == torch.float16:
        with _fp32_sums_of_fp16():
            yield
    else:
        yield


@contextmanager
def _ieee_fp32() -> Iterator[None]:
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    matmuls = [matmul for matmul in settings if _is_reduced(matmul.fp32_precision)]
    found = [m.fp32_precision for m in matmuls]
    try:
        for matmul in matmuls:
            matmul.fp32_precision = "ieee"
        yield
    finally:
        for matmul, precision in zip(matmuls, found, strict=True):
            matmul.fp32_precision = precision


def _is_reduced(precision: str) -> bool:
    return precision not in ("ieee", "none")


@contextmanager
def _fp32_sums_of_fp16() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    accumulation, reduction = matmul.allow_fp16_accumulation, matmul.allow_fp16_reduced_precision_reduction
    # A pair since torch 2.10; its second part, whether split products may be used at all, is left as it is.
    may_split = getattr(matmul, "allow_fp16_reduced_precision_reduction_split_k", True)
    try:
        if accumulation:
            matmul.allow_fp16_accumulation = False
        if reduction:
            matmul.allow_fp16_reduced_precision_reduction = False if may_split else (False, False)
        yield
    finally:
        if accumulation:
            matmul.allow_fp16_accumulation = True
        if reduction:
            matmul.allow_fp16_reduced_precision_reduction = True if may_split else (True, False)
