"""Muon8bit with `shard_state=True` in Accelerate: its `save_state` takes plain state dicts."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch.utils.hooks import RemovableHandle

from muon8bit import Muon8bit


def register(accelerator: Accelerator, optimizer: Muon8bit) -> RemovableHandle:
    """Let `accelerator.save_state` gather sharded momenta first: it asks every rank for `state_dict()`.

    `load_state` needs nothing: each rank takes its part of the whole state. Under FSDP Accelerate saves by distributed
    checkpointing, and needs no hook either.

    Args:
        accelerator: as the script has it; `save_state` must be called on all ranks.
        optimizer: before or after `prepare`.

    Returns:
        A handle whose `remove()` takes the hook away.

    Raises:
        TypeError: for another optimizer.
    """
    own = getattr(optimizer, "optimizer", optimizer)  # `prepare` wraps it
    if not isinstance(own, Muon8bit):
        raise TypeError(f"register takes a Muon8bit, as it is or as prepared, not {type(own).__name__}")

    def gather(models: Any, weights: Any, folder: Any) -> None:  # noqa: ARG001  # what Accelerate hands to a hook
        own.consolidate_state_dict()

    handle: RemovableHandle = accelerator.register_save_state_pre_hook(gather)
    return handle
