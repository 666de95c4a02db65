"""Tensors that only look like dense ones with values of their own, told apart before their memory is touched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import is_fake as _is_fake


def why_not_dense(tensor: Tensor) -> str:
    """Return what a tensor is instead of a strided one: `"sparse"`, `"sparse_csr"`, `"nested"`; empty for none."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout == torch.strided:
        return ""
    kind = str(tensor.layout).removeprefix("torch.")
    return {"sparse_coo": "sparse"}.get(kind, kind)


def why_not_written(tensor: Tensor) -> str:
    """Return why kernels cannot write into a dense tensor, or nothing.

    Its memory may be only another's, negated, or none at all.
    """
    if tensor.is_neg():
        return "a negated view of another tensor"
    return "a zero without memory" if tensor._is_zerotensor() else ""


def with_memory(tensor: Tensor) -> Tensor:
    """Return a dense tensor as it is, or the values of a negated view or of a zero without memory, in memory."""
    return tensor.clone() if why_not_written(tensor) else tensor


def is_overlapping(tensor: Tensor) -> bool:
    """Return whether elements of a strided tensor may share memory, as those of an expanded one do.

    Each stride must step over all that the smaller ones span. Layouts that interleave without sharing fail that too,
    but no operation of torch makes them.
    """
    if tensor.numel() < 2:
        return False
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < span:
                return True
            span += stride * (size - 1)
    return False


def is_faking() -> bool:
    """Return whether a FakeTensorMode is active, in which no tensor can be read."""
    return detect_fake_mode() is not None


def fake_mode_of(tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Return the mode that fake tensors among these belong to, to make more in it; a null context without any."""
    return detect_fake_mode(tensors) or nullcontext()


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor, or a DTensor's part here, has no values: on the meta device or in a FakeTensorMode."""
    return tensor.is_meta or (type(tensor) is not Tensor and bool(_is_fake(tensor)))
