"""Ranks that are about to communicate agree on what: the groups, their options, and which parameters have a gradient.

Two hashes a rank travel at every step; only where these differ are the texts compared, so that the error can name the
difference. All ranks see the same hashes, so all raise or none. The host waits for them: by a backend for the CPU if
the group has one (the default of `init_process_group` has), else by the device's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .transport import all_gather_single


def agree(group: ProcessGroup, device: torch.device, groups: Sequence[str], with_grad: Sequence[str]) -> None:
    """Compare with all ranks of the process group.

    Args:
        device: of the parameters.
        groups: what must be equal, one line of text an item, of `described`.
        with_grad: names of the parameters that have a gradient.

    Raises:
        RuntimeError: on every rank, naming two ranks and the first difference.
    """
    hashes = [_hash(groups), _hash(with_grad)]
    if "cpu:" in dist.get_backend_config(group):
        device = torch.device("cpu")
    num_ranks = dist.get_world_size(group)
    gathered = torch.empty(2 * num_ranks, dtype=torch.int64, device=device)
    all_gather_single(gathered, torch.tensor(hashes, dtype=torch.int64, device=device), group=group)
    found = gathered.view(num_ranks, 2).tolist()
    if any(hashes != found[0] for hashes in found):
        _refuse(group, [list(groups), list(with_grad)], found)


def _hash(lines: Sequence[str]) -> int:
    return int.from_bytes(blake2b("\n".join(lines).encode(), digest_size=8).digest(), "little", signed=True)


def _refuse(group: ProcessGroup, lines: list[list[str]], found: list[list[int]]) -> None:
    texts: list[Any] = [None] * len(found)
    dist.all_gather_object(texts, lines, group=group)
    other = next(rank for rank, hashes in enumerate(found) if hashes != found[0])
    if found[other][0] != found[0][0]:
        ours, theirs = texts[0][0], texts[other][0]
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if place is None:
            place = min(len(ours), len(theirs))
        line, other_line = ((text[place] if place < len(text) else "nothing more") for text in (ours, theirs))
        raise RuntimeError(
            f"ranks disagree about the parameter groups: rank 0 has {line}; rank {other} has {other_line}. Build the "
            "same groups, with the same options, on every rank. Nothing changed"
        )
    only = [sorted(set(texts[a][1]) - set(texts[b][1])) for a, b in ((0, other), (other, 0))]
    has, has_not, names = (0, other, only[0]) if only[0] else (other, 0, only[1])
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise RuntimeError(
        f"ranks disagree about which parameters have a gradient: {shown} on rank {has}, not on rank {has_not}. Every "
        "rank must use the same parameters in a step, or give the unused ones a gradient of zeros. Nothing changed"
    )


def described(groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> list[str]:
    """One line a group and one a parameter: everything that must be the same on all ranks."""
    lines = []
    for number, (group, members) in enumerate(zip(groups, names, strict=True)):
        options = {k: _value(v) for k, v in sorted(group.items()) if k not in ("params", "param_names")}
        lines.append(f"group {number} with {options}")
        for name, param in zip(members, group["params"], strict=True):
            lines.append(f"{name} {tuple(param.shape)} {param.dtype} in group {number}")
    return lines


def _value(value: Any) -> Any:
    """An option as it is compared; of a tensor on a device, which would have to be waited for, that it is one."""
    if isinstance(value, Tensor):
        return value.tolist() if value.device.type == "cpu" else "a tensor"
    return value
