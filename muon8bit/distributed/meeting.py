"""Where the ranks of a team meet in a step, and how they learn that one of them has failed.

    arrive    as late as they come
    agree     each has read what is its own, and all have the same groups, gradients and state
    confirm   each has the memory that it needs; each has orthogonalized its first matrices, and all may write
    finish    all have written

Until the last `confirm` a rank that fails goes to the next meeting, so that all raise and can try again. Later the
others may wait for anything: they find its error in the process group's store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ..orthogonalize import device_kind, rates_of
from ..step.options import describe
from .collectives import Transport
from .consistency import agree, arrive, confirm, described, wait_device
from .norms import Gathering
from .watchdog import RanksError, Watchdog

Result = TypeVar("Result")


class Meeting:
    """The meetings of one process group.

    Args:
        group: whose ranks meet.
        device: of the parameters.
        timeout_s: seconds that a rank waits for the others inside a step.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, timeout_s: float) -> None:
        self.group, self.device = group, device
        self.watchdog = Watchdog(group, timeout_s)
        self.transport = Transport(group, self.watchdog)
        self.is_told = False  # whether all ranks know of a failure of this step
        self.is_sending = False  # whether the others may wait for something else than a meeting
        self._broken: str | None = None  # why the ranks' transfers no longer fit together
        self._gathering: Gathering | None = None  # of this step
        self._partial: list[tuple[Tensor, Tensor]] = []  # parameters, and gradients that this step has reduced

    def arrive(self, failure: Exception | None) -> None:
        """Meet all ranks at the beginning of a step. They may come late: the process group's own timeout governs.

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
        self.is_told, self.is_sending, self._partial, self._gathering = False, False, [], None
        try:
            with self._telling():
                arrive(self.transport, self.device, failure)
        except RanksError as error:
            self._broken = str(error)
            raise

    def confirm(self, failure: BaseException | None = None) -> None:
        """Go on only if no rank has failed. All ranks that have not failed call it at the same places of a step, the
        others where they do.

        Raises:
            BaseException: `failure`, where there is one.
            RuntimeError: on every other rank, naming that rank with its failure.
        """
        with self._telling():
            confirm(self.transport, self.device, failure)

    def finish(self) -> None:
        """Learn at the end of a step whether all ranks have come here. Left out where the host would have to wait for
        the device: there the next step tells."""
        if wait_device(self.transport, self.device).type == "cpu":
            self.confirm()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Note that all ranks know of a failure that leaves this block."""
        try:
            yield
        except RanksError:
            raise
        except BaseException:
            self.is_told = True
            raise

    def failed(self, error: BaseException, *, is_agreed: bool) -> None:
        """Tell the other ranks of an error that ends this rank's step, unless they know.

        Args:
            is_agreed: whether all ranks have begun to write. Before that the others come to `confirm`, and can try
                again; later they find the error in the process group's store.
        """
        for param, grad in [] if is_agreed else self._partial:
            param.grad = grad
        self._partial = []
        if self.is_told:
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

    def agree(
        self,
        read: Callable[[], Result],
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        options: Sequence[object],
    ) -> Result:
        """What `read` returns, which communicates nothing, once all ranks have it and agree about groups, options,
        device, and the presence of gradients and of state: from here on they communicate alike. Gradients that are
        partial sums, as those of norms in sequence parallelism, are reduced first, once they are known to be there.

        Raises:
            Exception: what `read` raised here.
            RuntimeError: on every other rank, naming the first difference, or that rank with its error.
        """
        failure: Exception | None = None
        summands = [param for group in groups for param in group["params"] if _has_partial_grad(param)]
        if summands:
            self._compare(groups, state, options, failure)
        self.is_sending = bool(summands)
        for param in summands:
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
        """See `agree`. The groups of a rank that has failed may be what it cannot read."""
        described: tuple[list[str], list[str], list[str]] = [], [], []
        try:
            described = self._described(groups, state, options)
        except Exception as error:  # raised again when all know
            failure = failure or error
        with self._telling():
            agree(self.transport, self.device, *described, failure)

    def _described(
        self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Mapping[str, Tensor]], options: Sequence[object]
    ) -> tuple[list[str], list[str], list[str]]:
        """Return what `agree` compares."""
        names = [[describe(group, i, j) for j in range(len(group["params"]))] for i, group in enumerate(groups)]
        # Not the device's name: GPUs of different models go together, as long as they take the same paths.
        kind = device_kind(self.device)
        device = f"{self.device.type}, where paths are chosen by {rates_of(kind)}"
        lines = [f"the options {tuple(options)} on {device}", *described(groups, names)]
        params = [param for group in groups for param in group["params"]]
        named = list(zip([name for members in names for name in members], params, strict=True))
        with_grad = [name for name, param in named if param.grad is not None]
        with_state = [name for name, param in named if state.get(param)]
        return lines, with_grad, with_state


def _has_partial_grad(param: Tensor) -> bool:
    """Whether the gradient lies on the parameter's mesh as sums to be reduced. All ranks see the same."""
    grad = param.grad
    if not isinstance(param, DTensor) or not isinstance(grad, DTensor) or grad.device_mesh != param.device_mesh:
        return False
    return any(placement.is_partial() for placement in grad.placements)
