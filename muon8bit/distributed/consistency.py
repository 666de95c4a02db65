"""Ranks that are about to communicate agree on what: the groups, their options, which parameters have a gradient and
which have state; and an error that one of them has met is an error on all.

Four hashes a rank travel at every step; only where these differ are the texts compared, so that the error can name the
difference. All ranks see the same hashes, so all raise or none. The host waits for them: by a backend for the CPU if
the group has one (the default of `init_process_group` has), else by the device's, which waits for all that is queued
there. `init_process_group(backend="cpu:gloo,cuda:nccl")` gives a group that was made for NCCL alone both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from secrets import randbits
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..step.options import group_keys
from .collectives import Transport

# What may differ besides the groups, and what to do then.
_PARAMETERS = (
    ("a gradient", "Every rank must use the same parameters in a step, or give the unused ones a gradient of zeros"),
    ("state", "Load the same checkpoint on every rank, or on none"),
)


def arrive(transport: Transport, device: torch.device, failure: Exception | None) -> None:
    """Meet all ranks at the beginning of a step, as late as they come: the process group's own timeout governs.

    Args:
        failure: what keeps this rank from stepping.

    Raises:
        Exception: `failure`, where there is one.
        RuntimeError: on every other rank, naming a rank and its failure.
    """
    device = wait_device(transport, device)
    mine = torch.tensor([failure is not None, randbits(62)], dtype=torch.int64, device=device)
    found = transport.all_gather(mine, is_bounded=False).tolist()
    transport.watchdog.token = f"{found[0][1]:x}"
    _tell(transport, device, [bool(has_failed) for has_failed, _ in found], failure)


def confirm(transport: Transport, device: torch.device, failure: BaseException | None) -> None:
    """Go on only if no rank has failed. Arguments and errors: of `arrive`; the wait is bounded.

    Raises:
        RanksError: if a rank ended or stopped.
    """
    device = wait_device(transport, device)
    mine = torch.tensor([failure is not None], dtype=torch.int64, device=device)
    found = transport.all_gather(mine).tolist()
    _tell(transport, device, [bool(has_failed) for (has_failed,) in found], failure)


def _tell(
    transport: Transport, device: torch.device, has_failed: Sequence[bool], failure: BaseException | None
) -> None:
    """Raise on all ranks if any has failed."""
    if not any(has_failed):
        return
    texts = transport.gather_texts("" if failure is None else f"{type(failure).__name__}: {failure}", device)
    if failure is not None:
        raise failure
    rank = list(has_failed).index(True)
    raise RuntimeError(f"rank {rank} cannot take this step: {texts[rank]}. Nothing changed in it")


def wait_device(transport: Transport, device: torch.device) -> torch.device:
    """Where ranks compare: on the CPU if the group can, so that nobody waits for the device."""
    return torch.device("cpu") if "cpu:" in dist.get_backend_config(transport.group) else device


def agree(
    transport: Transport,
    device: torch.device,
    groups: Sequence[str],
    with_grad: Sequence[str],
    with_state: Sequence[str],
    failure: Exception | None,
) -> None:
    """Compare with all ranks of the process group.

    Args:
        device: of the parameters.
        groups: what must be equal, one line of text an item, of `described`.
        with_grad, with_state: names of the parameters that have a gradient, and of those that have state.
        failure: what kept this rank from going on.

    Raises:
        Exception: `failure`, where there is one.
        RuntimeError: on every other rank, naming two ranks and the first difference, or a rank and its failure.
        RanksError: if a rank ended or stopped.
    """
    failures = [] if failure is None else [f"{type(failure).__name__}: {failure}"]
    lines = [list(groups), list(with_grad), list(with_state), failures]
    hashes = [_hash(of) for of in lines]
    device = wait_device(transport, device)
    mine = torch.tensor(hashes, dtype=torch.int64, device=device)
    found = transport.all_gather(mine).tolist()
    if all(hashes == found[0] for hashes in found) and failure is None:
        return
    texts = [json.loads(text) for text in transport.gather_texts(json.dumps(lines), device)]
    if failure is not None:
        raise failure
    _refuse(texts)


def _hash(lines: Sequence[str]) -> int:
    return int.from_bytes(blake2b("\n".join(lines).encode(), digest_size=8).digest(), "little", signed=True)


def _refuse(texts: list[list[list[str]]]) -> None:
    """Raise for the first difference. `texts`: of every rank the four lists that were hashed."""
    failed = [(rank, lines[3][0]) for rank, lines in enumerate(texts) if lines[3]]
    failures = [f"rank {rank} cannot take this step: {text}. Nothing changed" for rank, text in failed]
    if any(lines[3] and not lines[0] for lines in texts):  # with groups that it cannot describe
        raise RuntimeError(failures[0])
    other = next(rank for rank, lines in enumerate(texts) if lines != texts[0])
    if texts[other][0] != texts[0][0]:
        ours, theirs = texts[0][0], texts[other][0]
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if place is None:
            place = min(len(ours), len(theirs))
        line, other_line = ((text[place] if place < len(text) else "nothing more") for text in (ours, theirs))
        raise RuntimeError(
            f"ranks disagree about the parameter groups: rank 0 has {line}; rank {other} has {other_line}. Build the "
            "same groups, with the same options, on every rank. Nothing changed"
        )
    for which, (what, way_out) in enumerate(_PARAMETERS, 1):
        only = [sorted(set(texts[a][which]) - set(texts[b][which])) for a, b in ((0, other), (other, 0))]
        if not any(only):
            continue
        has, has_not, names = (0, other, only[0]) if only[0] else (other, 0, only[1])
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise RuntimeError(
            f"ranks disagree about which parameters have {what}: {shown} on rank {has}, not on rank {has_not}. "
            f"{way_out}. Nothing changed"
        )
    raise RuntimeError(failures[0])


def described(groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> list[str]:
    """One line a group and one a parameter: everything that must be the same on all ranks. Other keys that a group may
    have, of schedulers or of the user, are their own affair."""
    lines = []
    for number, (group, members) in enumerate(zip(groups, names, strict=True)):
        # A group that lacks its algorithm is refused by `check_groups`; here it must not keep this rank from telling.
        keys = ("algorithm", *group_keys(group.get("algorithm", "muon")), "rounding_seed", "rounding_step")
        options = {key: _value(group[key]) for key in sorted(keys) if key in group}
        lines.append(f"group {number} with {options}")
        for name, param in zip(members, group["params"], strict=True):
            lines.append(f"{name} {tuple(param.shape)} {param.dtype} in group {number}")
    return lines


def _value(value: Any) -> Any:
    """An option as it is compared; of a tensor on a device, which would have to be waited for, that it is one."""
    if isinstance(value, Tensor):
        return value.tolist() if value.device.type == "cpu" else "a tensor"
    return value
