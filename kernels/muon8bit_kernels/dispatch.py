"""Choice of the backend that runs on a device; an explicit request that cannot be met raises an error."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from . import reference
from .backend import Kernels
from .self_check import self_check


@cache
def kernels_for(device: torch.device, backend: str | None = None) -> Kernels:
    """Return the kernels to run on `device`.

    Args:
        device: where the tensors are.
        backend: `"reference"` (torch operations), `"triton"`, or None: Triton on CUDA devices, else reference.

    Raises:
        ValueError: for an unknown backend.
        RuntimeError: if Triton was asked for, or is due on CUDA, and cannot run; the message says the way out.
    """
    if backend not in (None, "reference", "triton"):
        raise ValueError(f"backend must be None, 'reference' or 'triton', not {backend!r}")
    if backend == "reference" or (backend is None and device.type != "cuda"):
        return reference
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"backend={backend!r} on {device} needs triton, which is not installed: install triton, or "
            "pass backend='reference' (slower)"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend='triton' cannot run on {device}: use a CUDA device, set TRITON_INTERPRET=1 before Python "
            "starts (tests only), or pass backend='reference'"
        )
    from .triton import kernels  # needs triton, which CPU installations lack

    if device.type == "cuda" and torch.cuda.is_available():
        if torch.version.hip is None:
            _check_compiler(torch.cuda.get_device_capability(device))
        self_check(kernels, device)
    return kernels


def _check_compiler(capability: tuple[int, int]) -> None:
    """Raise RuntimeError where the compiler fuses operations that must be rounded one by one.

    Reads triton's own version: its distribution has other names on Windows and in nightly builds.
    """
    if capability[0] < 10:
        return
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7):
        raise RuntimeError(
            f"triton {triton.__version__} fuses multiplications and additions on compute capability {capability[0]} "
            "although told not to: states would not be those of other devices. Upgrade torch to a release that brings "
            "triton >= 3.7, or pass backend='reference'"
        )
