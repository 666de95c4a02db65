"""Ranks that go through a step together: they communicate alike, and an error that one of them meets is one on all.

    wait_for_ranks      as late as they come
    check_ranks_agree   each has read what is its own, and all have the same groups, gradients and state
    confirm             each has the memory that it needs; each has orthogonalized its first matrices, and all may write
    finish              all have written

Until the last `confirm` a rank that fails goes to the next of these points, so that all raise and can try again. Later
the others may wait for anything: they find its error in the process group's store.

`check_ranks_agree` gathers four hashes a rank. Only where these differ are the texts compared, so that the error can
name the difference. All ranks see the same hashes, so all raise or none. The host waits for them: by a backend for the
CPU if the group has one (the default of `init_process_group` has), else by the device's, which waits for all that is
queued there. `init_process_group(backend="cpu:gloo,cuda:nccl")` gives a group that was made for NCCL alone both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from secrets import randbits
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ..orthogonalize import device_kind, rates_of
from ..step.options import RATES_KEY, describe, group_keys
from .collectives import Transport
from .norms import Gathering
from .watchdog import RanksError, Watchdog

Result = TypeVar("Result")
_RATES = "the table of rates "

# What may differ besides the groups, and what to do then.
_PARAMETERS = (
    ("a gradient", "Every rank must use the same parameters in a step, or give the unused ones a gradient of zeros"),
    ("state", "Load the same checkpoint on every rank, or on none"),
)


class SynchronizedRanks:
    """The ranks of one process group, at the points of a step where they wait for each other.

    Attributes:
        is_failure_known: whether all ranks know of a failure of this step.
        is_sending: whether the others may wait for something else than these points.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, timeout_s: float) -> None:
        """Synchronize the ranks of a group.

        Args:
            group: the process group.
            device: of the parameters.
            timeout_s: seconds that a rank waits for the others inside a step.
        """
        self.group, self.device = group, device
        self.watchdog = Watchdog(group, timeout_s)
        self.transport = Transport(group, self.watchdog)
        self.is_failure_known = self.is_sending = False
        self._broken: str | None = None  # why the ranks' transfers no longer fit together
        self._gathering: Gathering | None = None  # of this step
        self._partial: list[tuple[Tensor, Tensor]] = []  # parameters, and gradients that this step has reduced
        # Where the host waits: on the CPU if the group can, so that nobody waits for the device.
        self._host_device = torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device

    def wait_for_ranks(self, failure: Exception | None) -> None:
        """Wait for all ranks at the beginning of a step, for as long as the process group's own timeout allows.

        Args:
            failure: what keeps this rank from stepping.

        Raises:
            Exception: `failure`, where there is one.
            RuntimeError: on every other rank, naming that rank with its failure.
        """
        if self._broken is not None:
            raise failure or RuntimeError(
                f"an earlier step ended while its ranks communicated ({self._broken}), and what they send no longer "
                "fits together: start the job again from its last checkpoint, or make a new process group"
            )
        self.is_failure_known, self.is_sending, self._partial, self._gathering = False, False, [], None
        try:
            numbers = self._gather_numbers([failure is not None, randbits(62)], is_bounded=False)
            self.watchdog.token = f"{numbers[0][1]:x}"
            self._raise_if_any([has_failed for has_failed, _ in numbers], failure)
        except RanksError as error:
            self._broken = str(error)
            raise

    def confirm(self, failure: BaseException | None = None) -> None:
        """Go on only if no rank has failed.

        All ranks that have not failed call it at the same places of a step, the others where they fail.

        Raises:
            BaseException: `failure`, where there is one.
            RuntimeError: on every other rank, naming that rank with its failure.
        """
        numbers = self._gather_numbers([failure is not None])
        self._raise_if_any([has_failed for (has_failed,) in numbers], failure)

    def finish(self) -> None:
        """Learn at the end of a step whether all ranks have come here.

        Where the host would have to wait for the device that is left out: there the next step tells.
        """
        if self._host_device.type == "cpu":
            self.confirm()

    def report_failure(self, error: BaseException, *, is_agreed: bool) -> None:
        """Tell the other ranks of an error that ends this rank's step, unless they know.

        Args:
            error: what was raised here.
            is_agreed: whether all ranks have begun to write. Before that the others come to `confirm`, and can try
                again; later they find the error in the process group's store.
        """
        for param, grad in [] if is_agreed else self._partial:
            param.grad = grad
        self._partial = []
        if self.is_failure_known:
            return
        if is_agreed or self.is_sending or isinstance(error, RanksError) or not isinstance(error, Exception):
            self._broken = f"{type(error).__name__}: {error}"
            self.watchdog.publish(error)
            return
        try:
            if self._gathering is not None:
                self._gathering.exchange(self.transport)
            self.confirm(error)
        except RanksError as lost:
            self._broken = str(lost)
        except type(error):
            pass  # the caller raises it

    def check_ranks_agree(
        self,
        read: Callable[[], Result],
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        options: Sequence[object],
    ) -> Result:
        """Return what `read` returns, once all ranks have it and agree: from here on they communicate alike.

        They agree about groups, options, device, and the presence of gradients and of state. Gradients that are partial
        sums, as those of norms in sequence parallelism, are reduced first, once they are known to be there.

        Args:
            read: communicates nothing.
            groups: of the optimizer.
            state: of the optimizer.
            options: other values that must be equal.

        Raises:
            Exception: what `read` raised here.
            RuntimeError: on every other rank, naming the first difference, or that rank with its error.
        """
        failure: Exception | None = None
        partial = [param for group in groups for param in group["params"] if _has_partial_grad(param)]
        if partial:
            self._compare(groups, state, options, failure)
            self.is_sending = True
            for param in partial:
                self._partial.append((param, param.grad))
                param.grad = param.grad.redistribute(placements=param.placements)
            self.is_sending = False
        try:
            result = read()
        except Exception as error:  # raised again when all know
            failure = error
        self._compare(groups, state, options, failure)
        return result

    def _compare(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        options: Sequence[object],
        failure: Exception | None,
    ) -> None:
        """Raise on all ranks where they differ, or one has failed."""
        lists: list[list[str]] = [[], [], []]
        try:
            lists = self._fingerprint(groups, state, options)
        except Exception as error:  # groups that cannot be read; raised again when all know
            failure = failure or error
        lists.append([] if failure is None else [f"{type(failure).__name__}: {failure}"])
        hashes = self._gather_numbers([_hash(lines) for lines in lists])
        if failure is None and all(of_rank == hashes[0] for of_rank in hashes):
            return
        texts = self.transport.gather_texts(json.dumps(lists), self._host_device)
        self.is_failure_known = True
        raise failure or _difference([json.loads(text) for text in texts])

    def _fingerprint(
        self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Mapping[str, Tensor]], options: Sequence[object]
    ) -> list[list[str]]:
        """Return what must be equal, a line of text each, and the names of what has a gradient, and of what has state.

        Other keys that a group may have, of schedulers or of the user, are their own affair.
        """
        # Not the device's name: GPUs of different models go together, as long as they take the same paths.
        device = f"{self.device.type}, where paths are chosen by {rates_of(device_kind(self.device))}"
        tables = [f"{_RATES}{group[RATES_KEY]}" for group in groups if group.get(RATES_KEY) is not None] or [_RATES]
        lines, with_grad, with_state = [tables[0]], list[str](), list[str]()
        lines.append(f"the options {tuple(options)} on {device}")
        for number, group in enumerate(groups):
            # A group that lacks its algorithm is refused by `check_groups`; here it must not keep this rank from
            # telling.
            keys = ("algorithm", *group_keys(group.get("algorithm", "muon")), "rounding_seed", "rounding_step")
            values = {key: _comparable(group[key]) for key in sorted(keys) if key in group}
            lines.append(f"group {number} with {values}")
            for place, param in enumerate(group["params"]):
                name = describe(group, number, place)
                lines.append(f"{name} {tuple(param.shape)} {param.dtype} in group {number}")
                with_grad += [] if param.grad is None else [name]
                with_state += [name] if state.get(param) else []
        return [lines, with_grad, with_state]

    def _gather_numbers(self, numbers: Sequence[int], *, is_bounded: bool = True) -> list[list[int]]:
        """Return the numbers of every rank, by rank."""
        values = torch.tensor(numbers, dtype=torch.int64, device=self._host_device)
        gathered: list[list[int]] = self.transport.all_gather(values, is_bounded=is_bounded).tolist()
        return gathered

    def _raise_if_any(self, has_failed: Sequence[int], failure: BaseException | None) -> None:
        """Raise on all ranks if any has failed."""
        if not any(has_failed):
            return
        text = "" if failure is None else f"{type(failure).__name__}: {failure}"
        texts = self.transport.gather_texts(text, self._host_device)
        self.is_failure_known = True
        rank = next(rank for rank, failed in enumerate(has_failed) if failed)
        raise failure or RuntimeError(f"rank {rank} cannot take this step: {texts[rank]}. Nothing changed in it")


def _has_partial_grad(param: Tensor) -> bool:
    """Return whether the gradient lies on the parameter's mesh as sums to be reduced; the same on all ranks."""
    grad = param.grad
    if not isinstance(param, DTensor) or not isinstance(grad, DTensor) or grad.device_mesh != param.device_mesh:
        return False
    return any(placement.is_partial() for placement in grad.placements)


def _comparable(value: Any) -> Any:
    """Return an option as it is compared; of a tensor on a device, which would be waited for, that it is one."""
    if isinstance(value, Tensor):
        return value.tolist() if value.device.type == "cpu" else "a tensor"
    return value


def _hash(lines: Sequence[str]) -> int:
    return int.from_bytes(blake2b("\n".join(lines).encode(), digest_size=8).digest(), "little", signed=True)


def _difference(lists: list[list[list[str]]]) -> RuntimeError:
    """Return the error that names the first difference.

    Args:
        lists: by rank, the lines and names of `_fingerprint`, and the rank's failure if there is one.
    """
    failures = [
        f"rank {rank} cannot take this step: {of_rank[3][0]}. Nothing changed"
        for rank, of_rank in enumerate(lists)
        if of_rank[3]
    ]
    if any(of_rank[3] and not of_rank[0] for of_rank in lists):  # with groups that it cannot describe
        return RuntimeError(failures[0])
    # Groups first: where they differ, so do the names below.
    other = next(rank for rank, of_rank in enumerate(lists) if of_rank != lists[0])
    if lists[other][0] != lists[0][0]:
        first, second = lists[0][0], lists[other][0]
        place = next(i for i in range(max(len(first), len(second))) if first[i : i + 1] != second[i : i + 1])
        line, other_line = ((lines[place] if place < len(lines) else "nothing more") for lines in (first, second))
        if line.startswith(_RATES):
            names = [text.removeprefix(_RATES)[:16] or "the built-in one" for text in (line, other_line)]
            return RuntimeError(
                f"ranks choose methods by different tables of rates: rank 0 by {names[0]}, rank {other} by {names[1]}. "
                "Set MUON8BIT_RATES to the same file, or to builtin, on every rank, or load the same checkpoint on "
                "all. Nothing changed"
            )
        return RuntimeError(
            f"ranks disagree about the parameter groups: rank 0 has {line}; rank {other} has {other_line}. Build the "
            "same groups, with the same options, on every rank. Nothing changed"
        )
    for number, (what, way_out) in enumerate(_PARAMETERS, 1):
        for has, has_not in ((0, other), (other, 0)):
            names = sorted(set(lists[has][number]) - set(lists[has_not][number]))
            if not names:
                continue
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            return RuntimeError(
                f"ranks disagree about which parameters have {what}: {shown} on rank {has}, not on rank {has_not}. "
                f"{way_out}. Nothing changed"
            )
    return RuntimeError(failures[0])
