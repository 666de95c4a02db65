"""The most memory that a process has held."""

from __future__ import annotations

import resource
import sys

import torch

KIBI = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss, in bytes


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes that this process has held so far.

    On an accelerator those that torch allocated on it. On a CPU what was resident, imported libraries included: that
    compares runs with each other, and says little about one.
    """
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBI
    return int(torch.accelerator.max_memory_allocated(device))
