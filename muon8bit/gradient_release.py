"""Gradient release: each parameter is stepped in backward, when its gradient is complete, and the gradient freed.

Then a few gradients are alive at once instead of one for every parameter. What needs them all at once cannot work, and
is refused where it can be seen.
"""

from __future__ import annotations

import weakref
from threading import RLock
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .optimizer import Muon8bit
from .step import phases
from .step.nonfinite import GradientCheck, PerParamGradientCheck
from .step.options import MEMBERS

# Known by their names: importing them takes seconds, and not every build of torch has them.
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


class _Place(NamedTuple):
    """Place of a parameter: its group, its number over all groups, and its name."""

    group_index: int
    param_index: int
    name: str


class GradientRelease:
    """Handle that `release_gradients` returns."""

    def __init__(self, optimizer: Muon8bit, places: dict[Tensor, _Place]) -> None:
        # Weakly: the model's hooks must not keep an optimizer, and its state, that nobody has any more.
        self._optimizer = weakref.ref(optimizer, lambda _: self._detach())
        self._places = places
        self._checks: dict[Tensor, GradientCheck] = {}  # of the parameters whose gradients this step has taken
        self._lock = RLock()  # autograd has a thread for every device
        hooks: list[RemovableHandle] = [p.register_post_accumulate_grad_hook(self._take) for p in places]
        hooks.append(optimizer.register_step_pre_hook(self._check_rest))
        hooks.append(optimizer.register_step_post_hook(lambda *_: self._close()))
        hooks.append(optimizer.register_state_dict_pre_hook(self._check_closed))
        hooks.append(optimizer.register_load_state_dict_post_hook(lambda _: self._checks.clear()))
        self._hooks = hooks
        optimizer._is_released = True

    def remove(self) -> None:
        """Make `backward()` and `step()` ordinary again; a step that is open is closed as it is."""
        self._detach()
        if (optimizer := self._optimizer()) is not None:
            optimizer._is_released = False
        self._close()

    def _detach(self) -> None:
        """Take the hooks away, also when the optimizer is gone: `backward()` then leaves gradients as ever."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # What is done to one parameter is `step`'s; its kernels are no matter of a compiler.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _take(self, param: Tensor) -> None:
        """Step a parameter whose gradient is complete, and free the gradient."""
        with self._lock:
            self._take_alone(param)

    def _take_alone(self, param: Tensor) -> None:
        if torch.cuda.is_available():
            phases.check_not_captured()
        optimizer, place = self._optimizer(), self._places[param]
        if optimizer is None:  # it went while this hook was on its way
            return
        if not self._checks:
            _check_alone()
            optimizer._check_not_failed()
            optimizer._options()
            optimizer._resolve_pending_check()  # the last step's skips count before this step's numbers are read
        if param in self._checks:
            param.grad = None
            raise RuntimeError(
                f"{place.name} has got a second gradient before optimizer.step(); the first is used and gone, the "
                "second is dropped. Call step() after every backward(). Accumulation over micro-batches, and reentrant "
                "checkpointing of a parameter that is used twice, need gradients that stay: do without "
                "release_gradients"
            )
        group = optimizer.param_groups[place.group_index]
        alone = [{**group, "params": [param], "param_names": [place.name], MEMBERS: group["params"]}]
        if phases.is_dry(alone):
            phases.dry_run(
                alone, optimizer._options(alone), optimizer.state, None, optimizer._offload, place.param_index
            )
            self._checks[param] = GradientCheck([], optimizer._num_calls + 1)
        else:
            with optimizer._committing(has_begun=bool(self._checks)) as commit:
                number = optimizer._num_calls + 1
                self._checks[param], _ = optimizer._step_groups(alone, None, commit, number, place.param_index)
        param.grad = None

    def _check_rest(self, optimizer: Optimizer, *_: Any) -> None:
        """Check before `step()` that it closes a step, or finds gradients that were given by hand, and no others.

        Distributed checkpointing gives gradients by hand.
        """
        if isinstance(optimizer, Muon8bit):
            optimizer._check_not_failed()
        if getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "a GradScaler scales the loss, but release_gradients has stepped by the scaled gradients before it "
                "could unscale them. Train in bfloat16 without a scaler, or without release_gradients"
            )
        for group_index, group in enumerate(optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                if param.grad is not None and (self._checks or param not in self._places):
                    raise RuntimeError(
                        f"{_name(group, group_index, index, {})} has a gradient that was not released: it was frozen, "
                        "or not in the optimizer, when release_gradients was called, or the gradient was assigned. "
                        "Call remove() on what it returned, and release_gradients again"
                    )

    def _check_closed(self, _: Optimizer) -> None:
        if self._checks:
            raise RuntimeError(
                "state_dict() between backward(), which has stepped the parameters already, and step(), which counts "
                "the step: call optimizer.step() first"
            )

    def _close(self) -> None:
        """Close a step: its checks are left to the optimizer, which asks for them later."""
        if self._checks and (optimizer := self._optimizer()) is not None:
            optimizer._pending = PerParamGradientCheck(list(self._checks.values()))
        self._checks = {}


def release_gradients(model: nn.Module, optimizer: Muon8bit) -> GradientRelease:
    """Step each parameter in `backward()` as soon as its gradient is complete, and free the gradient at once.

    The loop stays as it is: `loss.backward()`, `optimizer.step()`, `scheduler.step()`, `optimizer.zero_grad()`. The
    parameters change in `backward()`, by the learning rates of that moment. `step()`, needed after every `backward()`,
    closes the step: it counts it. One gradient is alive at a time (measured on a Llama of 30M), besides those that
    backward itself holds. Gradients of parameters outside `optimizer` gain nothing, nor those of a model that
    `torch.compile` compiled as a whole, whose backward returns all at once. Method: LOMO (arXiv 2306.09782), and
    "optimizer step in backward" of PyTorch's tutorials.

    The result is that of ordinary steps: to the bit on a CPU where these take matrices one by one, else a step differs
    by the rounding of a batched product, which now and then rounds an 8-bit code the other way. It costs the batching
    of matrices of one shape. With `state_device="cpu"` the state of a parameter comes when its gradient is complete,
    not ahead: on CUDA the backward pass waits for all these copies. Parameters without a gradient are left out, tied
    ones are stepped once, when all their uses are done.

    A gradient that is not finite leaves out its own parameter alone, since others have been stepped by then, and
    `num_skipped_steps` counts the step: `on_nonfinite="skip"` is required. A gradient is gone after its backward:
    global clipping finds none and does nothing (`clip_grad_norm_` returns 0, without an error); the group option
    `clip_matrix_norm` clips matrix by matrix.

    Args:
        model: has the optimizer's parameters; not wrapped in DDP.
        optimizer: the `Muon8bit` itself; a wrapper (Accelerate's) has it as `.optimizer`.

    Returns:
        A handle, which does not keep the optimizer; its `remove()` makes `backward()` and `step()` ordinary again.

    Raises:
        TypeError: for another optimizer.
        ValueError: for another `on_nonfinite`, a model without a parameter of the optimizer, or a second call.
        NotImplementedError: for DDP or a process group of several ranks, where a hook sees the gradient of its own rank
            alone, and for sharded parameters, by name.
        RuntimeError: later, in `backward()`, for a second gradient of a parameter before `step()` (accumulation); in
            `step()` for a GradScaler, and for a gradient that was not released; in `state_dict()` before `step()`.
    """
    if not isinstance(optimizer, Muon8bit):
        raise TypeError(
            f"release_gradients needs the Muon8bit itself, not a {type(optimizer).__name__}: of an optimizer that "
            "Accelerate has prepared pass `.optimizer`"
        )
    if optimizer._is_released:
        raise ValueError("this optimizer releases its gradients already: call remove() on the first handle")
    if optimizer.on_nonfinite != "skip":
        raise ValueError(
            f"on_nonfinite={optimizer.on_nonfinite!r} promises that a bad gradient changes nothing, but when it is "
            "found in backward other parameters have been stepped: pass on_nonfinite='skip' to Muon8bit, which then "
            "leaves out that parameter alone"
        )
    wrapper = next((type(m).__name__ for m in model.modules() if type(m).__name__ in _WRAPPERS), None)
    if wrapper is not None or optimizer.process_group is not None:
        raise NotImplementedError(
            f"{wrapper or 'process_group'}: in backward a hook sees the gradient of its own rank, before it is reduced "
            "over the ranks. Train on one process, or without release_gradients"
        )
    _check_alone()
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    places: dict[Tensor, _Place] = {}
    num_before = 0
    for group_index, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            name = _name(group, group_index, index, names)
            if param not in names:
                raise ValueError(f"{name} of the optimizer is not in the model: pass the model that it was made for")
            if hasattr(param, "device_mesh"):
                raise NotImplementedError(
                    f"{name} is sharded: its matrix is orthogonalized by several ranks together, and they do not reach "
                    "their hooks in one order. Use ordinary steps"
                )
            if param.requires_grad:
                places[param] = _Place(group_index, num_before + index, name)
        num_before += len(group["params"])
    return GradientRelease(optimizer, places)


def _name(group: dict[str, Any], group_index: int, index: int, names: dict[Tensor, str]) -> str:
    """Return the optimizer's name of a parameter, else the model's, else its place."""
    if "param_names" in group:
        return str(group["param_names"][index])
    return names.get(group["params"][index], f"parameter {index} of group {group_index}")


def _check_alone() -> None:
    """Raise NotImplementedError where other ranks may have gradients of the same parameters.

    DDP unwrapped looks like any model.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise NotImplementedError(
            f"one of {dist.get_world_size()} ranks: in backward a hook sees the gradient of its own rank, before it is "
            "reduced over the ranks. Train on one process, or without release_gradients"
        )
