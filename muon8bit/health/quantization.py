"""QuantizationHealth: what the 8 bits of the momentum do to the updates of a run, measured while it trains."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from .._values import shown
from ..optimizer import Muon8bit
from ..step import phases
from ..step.nonfinite import GradientCheck
from .measures import MatrixHealth, advice, measure
from .report import HealthReport, QuantizationWarning, warning
from .samples import WatchedMatrix, choose_matrices
from .shadow import MomentumPair, Shadow


class QuantizationHealth:
    """Watch a sample of matrices: their 8-bit momentum beside one in fp32, averaged from the same gradients.

    Attach it before training, and read `report()` at any time; a `QuantizationWarning` names a matrix whose updates
    suffer, once, and what to change. Training is the same to the bit. Nothing is added to the optimizer's state or to
    checkpoints: after a state dict is loaded the fp32 momenta begin anew as the 8-bit ones are then, and the report
    says so. It costs 4 bytes per element of the sample, one pass over it in a step, and in every `every`-th one two
    Newton-Schulz of each matrix in fp32, for which the host then waits. Steps that are skipped do not count.

    The measures are those of `MatrixHealth`; the threshold of the warning is on `descent`: see the head of `measures`.

    With `process_group` each rank that attaches one watches by itself. State on the host is brought for what is
    measured.

    Args:
        optimizer: the `Muon8bit`, or one of its family; of what Accelerate has prepared, its `.optimizer`.
        sample: the number of matrices, chosen by shapes and names alone: the longest rows first, in turn over shapes,
            kinds and depth. Of a stack one matrix is watched, of a fused weight one piece.
        every: the steps from one measurement to the next.

    Raises:
        TypeError: for another optimizer.
        ValueError: for a `sample` or `every` that is no int above 0, or an optimizer without a momentum in 8 bits.
        NotImplementedError: for sharded parameters, by name, `shard_state`, and released gradients: here, or where
            they come later, in `step()`, before anything has changed.
    """

    def __init__(self, optimizer: Muon8bit, sample: int = 4, every: int = 50) -> None:
        if not isinstance(optimizer, Muon8bit):
            raise TypeError(
                f"QuantizationHealth needs the Muon8bit itself, not a {type(optimizer).__name__}: of an optimizer "
                "that Accelerate has prepared pass `.optimizer`"
            )
        for name, value in {"sample": sample, "every": every}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int above 0, not {shown(value)}")
        matrices = choose_matrices(optimizer.param_groups, sample)
        if not matrices:
            raise ValueError("no momentum is in 8 bits, so there is nothing to watch: leave QuantizationHealth out")
        _check_supported(optimizer, matrices)
        self.every = every
        self._shadows = [Shadow(of) for of in matrices]
        self._last: dict[str, MatrixHealth] = {}
        self._worst: dict[str, MatrixHealth] = {}
        self._warnings: dict[str, str] = {}
        self._notes: list[str] = []
        self._num_steps = self._num_skipped = self._num_skipped_before = 0
        self._optimizer = weakref.ref(optimizer)  # whose hooks have this
        self._hooks = [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._finish),
            optimizer.register_load_state_dict_post_hook(lambda _: self._restart("a state was loaded")),
        ]
        if optimizer.state:
            self._restart("it was attached to a run that goes on")

    @property
    def num_steps(self) -> int:
        """Steps that were seen, without skipped ones."""
        return self._num_steps

    def latest(self) -> tuple[MatrixHealth, ...]:
        """Return the measures of the last step, if that was measured, else nothing."""
        return tuple(of for of in self._last.values() if of.step == self._num_steps)

    def report(self) -> HealthReport:
        """Return what was measured so far."""
        return HealthReport(
            last=tuple(self._last.values()),
            worst=tuple(self._worst.values()),
            warnings=dict(self._warnings),
            num_steps=self._num_steps,
            num_skipped=self._num_skipped,
            every=self.every,
            shadow_bytes=sum(4 * shadow.of.rows * shadow.of.cols for shadow in self._shadows),
            notes=tuple(self._notes),
        )

    def remove(self) -> None:
        """Stop watching, and free the fp32 momenta; the report stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for shadow in self._shadows:
            shadow.m = None

    def _restart(self, why: str) -> None:
        """Let the fp32 momenta begin as the 8-bit ones are before the next step."""
        optimizer = self._optimizer()
        if optimizer is None or not any(shadow.param(optimizer) in optimizer.state for shadow in self._shadows):
            return  # as Accelerate loads an empty state before the first step
        for shadow in self._shadows:
            shadow.m = None
        self._notes.append(
            f"after step {self._num_steps} {why}: the fp32 momenta began as the 8-bit ones were, and forget that "
            "within some 1 / (1 - momentum) steps"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _begin(self, optimizer: Optimizer, *_: Any) -> None:
        """Keep what the step will overwrite."""
        assert isinstance(optimizer, Muon8bit)
        _check_supported(optimizer, [shadow.of for shadow in self._shadows])
        if phases.is_dry(optimizer.param_groups):
            return
        self._num_skipped_before = optimizer._num_skipped_steps
        is_measured = (self._num_steps + 1) % self.every == 0
        for shadow in self._shadows:
            shadow.begin_step(optimizer, is_measured=is_measured)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _finish(self, optimizer: Optimizer, *_: Any) -> None:
        """Average the gradients that the step has used, and measure in every `every`-th one."""
        assert isinstance(optimizer, Muon8bit)
        if phases.is_dry(optimizer.param_groups):
            return
        check = optimizer._pending  # on CUDA, where nobody knows yet whether the step was done
        if check is None and optimizer._num_skipped_steps > self._num_skipped_before:
            self._num_skipped += 1
            return
        self._num_steps += 1
        for shadow in self._shadows:
            param = shadow.param(optimizer)
            if param.grad is None:  # then the step has left it as it was
                continue
            skip = check.skip(param.device) if isinstance(check, GradientCheck) else None
            pair = shadow.finish_step(optimizer, skip)
            if pair is not None:
                self._note(shadow.of, pair)

    def _note(self, of: WatchedMatrix, pair: MomentumPair) -> None:
        """Measure a matrix, and warn the first time that it is below the threshold."""
        found = measure(of, pair, self._num_steps)
        if found is None:
            return
        self._last[of.name] = found
        if of.name not in self._worst or found.descent < self._worst[of.name].descent:
            self._worst[of.name] = found
        if not found.is_sound and of.name not in self._warnings:
            self._warnings[of.name] = warning(found, advice(pair), of.param_name if of.has_name else None)
            warnings.warn(self._warnings[of.name], QuantizationWarning, stacklevel=2)


def _check_supported(optimizer: Muon8bit, matrices: Sequence[WatchedMatrix]) -> None:
    """Raise NotImplementedError for gradients or momenta of which this rank has only a part, or none after a step."""
    if optimizer._is_released:
        raise NotImplementedError(
            "release_gradients has freed the gradients before step(), and QuantizationHealth averages them: watch a "
            "short run without release_gradients, whose momenta are the same"
        )
    if optimizer.shard_state:
        raise NotImplementedError(
            "shard_state=True leaves each rank some rows of a momentum, and QuantizationHealth needs whole ones: watch "
            "a run with shard_state=False, whose momenta are the same"
        )
    for of in matrices:
        param = optimizer.param_groups[of.group_index]["params"][of.param_index]
        if hasattr(param, "device_mesh"):
            raise NotImplementedError(
                f"{of.param_name} is sharded, and QuantizationHealth needs whole matrices: watch a short run on one "
                "process, or under DDP, with the same batches; call remove() on this one"
            )
