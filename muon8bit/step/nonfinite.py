"""Non-finite gradients: found before anything is written, told at once on the CPU, without a wait on other devices.

A `GradientCheck` holds what one step found. On the CPU, and for `on_nonfinite="raise_at_once"`, it is read before the
step writes. Elsewhere the step goes on with `skip`, a number on each device that stops its kernels from writing. A copy
of the flags goes to the host meanwhile and is read when the next step begins, or the state is asked for. By then the
device has passed that point, unless the host runs more than a whole step ahead and has to wait here: what happens does
not depend on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class NonFiniteGradientError(RuntimeError):
    """A gradient holds a NaN or Inf, or values beyond 1e19, whose squares overflow fp32; nothing changed.

    Attributes:
        names: the parameters whose gradients are not finite.
        step: the number of the call of `step()`, counted from 1 since the optimizer was made.
    """

    def __init__(self, names: Sequence[str], step: int) -> None:
        self.names, self.step = tuple(names), step
        shown = ", ".join(self.names[:5]) + (f" and {len(self.names) - 5} more" if len(self.names) > 5 else "")
        super().__init__(
            f"NaN, Inf or overflow in the gradient of {shown}, at call {step} of step(). That call changed nothing. "
            "Lower the learning rate or find the operation that overflows; on_nonfinite='skip' skips such steps and "
            "counts them"
        )

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...], int]]:
        return type(self), (self.names, self.step)


class GradientCheck:
    """Finiteness of the gradients of one step.

    Args:
        found: pairs of a function that names parameters, and bool [n] on the gradients' device, True where the gradient
            of the parameter at the same place is finite. A name may occur more than once.
        step: the number of the call of `step()`.
        is_scaled: a GradScaler has scaled them, which skips such steps by design and lowers its scale.
    """

    is_whole = True  # where a gradient is not finite, nothing of the step was done

    def __init__(
        self, found: Iterable[tuple[Callable[[], list[str]], Tensor]], step: int, *, is_scaled: bool = False
    ) -> None:
        self.step, self.is_scaled = step, is_scaled
        by_device: dict[torch.device, list[tuple[Callable[[], list[str]], Tensor]]] = {}
        for names, flags in found:
            by_device.setdefault(flags.device, []).append((names, flags))
        self._namers = [names for members in by_device.values() for names, _ in members]
        finite = [torch.cat([flags for _, flags in members]) for members in by_device.values()]
        self._bad = [~flags.all() for flags in finite]
        # Into pinned memory, and only from CUDA, where the event below tells when the flags are there to be read.
        self._on_host = [flags.to("cpu", non_blocking=flags.device.type == "cuda") for flags in finite]
        self._copied = [torch.cuda.current_stream(d).record_event() for d in by_device if d.type == "cuda"]
        self._skips: dict[torch.device, Tensor] = {}
        self.advanced: list[Tensor] = []  # step counters on the host, before it knew
        self.is_pending = False  # whether the step went on without knowing

    @property
    def is_asynchronous(self) -> bool:
        """Return whether `skip` can do instead of `nonfinite_names` before anything is written: on CUDA alone."""
        return all(bad.device.type == "cuda" for bad in self._bad)

    def skip(self, device: torch.device) -> Tensor:
        """Return 0-d fp32 on `device`: 1 if any gradient on any device is not finite, else 0."""
        if device not in self._skips:
            everywhere = torch.stack([bad.to(device, non_blocking=True) for bad in self._bad])
            self._skips[device] = everywhere.any().float()
        return self._skips[device]

    def nonfinite_names(self) -> list[str]:
        """Return the parameters whose gradients are not finite; wait until the flags are on the host."""
        for event in self._copied:
            event.synchronize()
        finite = [ok for flags in self._on_host for ok in flags.tolist()]
        if all(finite):
            return []
        names = [name for namer in self._namers for name in namer()]
        return list(dict.fromkeys(name for name, ok in zip(names, finite, strict=True) if not ok))

    def undo_counters(self) -> None:
        """Set back the counters that a step advanced which was not done, once."""
        while self.advanced:
            self.advanced.pop().sub_(1)


class PerParamGradientCheck:
    """Finiteness of the gradients of a step whose parameters were stepped one by one.

    Each was skipped alone where its gradient is not finite, so that the step as a whole was done.
    """

    is_whole = is_scaled = False

    def __init__(self, parts: Sequence[GradientCheck]) -> None:
        self._parts, self.step = parts, parts[0].step

    def nonfinite_names(self) -> list[str]:
        """Return the parameters whose gradients are not finite; wait until the flags are on the host."""
        return [name for part in self._parts for name in part.nonfinite_names()]

    @property
    def advanced(self) -> list[Tensor]:
        """Return the step counters on the host, of all parts."""
        return [step for part in self._parts for step in part.advanced]

    def undo_counters(self) -> None:
        """Set back the counters of the parameters that were skipped."""
        for part in self._parts:
            if part.nonfinite_names():
                part.undo_counters()
