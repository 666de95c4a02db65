"""The parameters of a group that have a gradient at this step, their state, and the state of those that have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import STATE_KEYS
from . import adamw, adamw8bit, rounding
from .dense import is_fake, is_overlapping, why_not_dense, with_memory
from .momentum import Momentum, MomentumFormat
from .offload import StateOffload
from .options import DTYPES, FORMAT_KEYS, describe

if TYPE_CHECKING:
    from ..distributed import ParamSharding, RankGroup


_WAY_OUT = "undo that, or delete its entry in the optimizer's state, which then starts at zero"


@dataclass(frozen=True)
class LocalParam:
    """A parameter that has a gradient, by its place in its group; its momentum, None in an AdamW group; and `key`,
    None where rounding is to nearest.

    `param` is what the state is kept for; `local`, `grad` and `momentum` are this rank's tensors; `first` is the index
    in the whole parameter of the first element here. `layout`: where all of it lies, None where that is here.
    """

    index: int
    param: Tensor
    local: Tensor
    grad: Tensor
    momentum: Momentum | None
    key: int | None
    first: int
    layout: ParamSharding | None

    @property
    def is_shared(self) -> bool:
        """Whether its matrices need other ranks."""
        if self.layout is None or self.momentum is None:
            return False
        return not self.layout.is_local(self.momentum.format.flatten)


def entries_of(
    group: dict[str, Any],
    group_index: int,
    num_before: int,
    state: Mapping[Tensor, dict[str, Any]],
    team: RankGroup | None,
    staging: StateOffload,
) -> Iterator[LocalParam]:
    """The parameters of a group that have a gradient now. `num_before`: of the optimizer, in front of this group.

    Raises:
        ValueError: names a parameter with a gradient, learning rate or state that cannot be used.
    """
    lr, is_muon, is_rounded = group["lr"], group["algorithm"] == "muon", "rounding_seed" in group
    lr_device = lr.device if isinstance(lr, Tensor) and lr.device.type != "cpu" else None
    has_no_rate = isinstance(lr, Tensor) and is_fake(lr)
    form = [group[key] for key in FORMAT_KEYS] if is_muon else []
    for index, param in enumerate(group["params"]):
        grad, local, layout, first = param.grad, param, None, 0
        if grad is None:
            continue
        if not is_muon or grad._is_zerotensor():  # Muon's kernels read negated views, and AdamW's write nothing else
            grad = with_memory(grad)
        if lr_device not in (None, param.device):
            name = describe(group, group_index, index)
            raise ValueError(
                f"parameter group {group_index}: lr is a tensor on {lr_device}, {name} is on {param.device}: keep lr "
                "on the CPU"
            )
        if has_no_rate and not is_fake(grad):
            raise ValueError(f"parameter group {group_index}: lr is a tensor without values: write a number there")
        if group.get("adamw_bits") == 8:
            adamw8bit.check_available(param.device.type)
        momentum = key = None
        stored = own_state(state.get(param))
        if is_rounded:
            key = rounding.key_of(param, describe(group, group_index, index), num_before + index, group)
        if team is not None:
            name = describe(group, group_index, index)
            layout = team.layout_of(param, group, name)
        if layout is not None:
            local, grad, first = layout.local(param, grad, name, is_rounded=key is not None and not is_muon)
            stored = layout.unwrapped(stored) if stored else stored
        tensors = layout_of(param, group)
        shapes = {key: shape for key, (shape, _) in tensors.items()}
        dtypes = {key: dtype for key, (_, dtype) in tensors.items()}
        shapes = layout.parts(shapes) if layout else shapes
        if stored and (problem := _misfit(stored, shapes, dtypes, staging.home(local.device))):
            name, keys = describe(group, group_index, index), FORMAT_KEYS if is_muon else ("adamw_bits",)
            options = ", ".join(f"{key}={group[key]!r}" for key in keys)
            raise ValueError(
                f"{name} of parameter group {group_index} ({options}) is {tuple(local.shape)} on {local.device} "
                f"{problem}"
            )
        if is_muon:
            format = MomentumFormat.of(param.shape, *form)
            if stored:
                momentum = Momentum.from_state(stored, format)
            else:
                momentum = Momentum.zeros(shapes, format, staging.home(local.device))
                momentum = momentum.on(staging.at_home(tensor, local.device) for tensor in momentum.tensors)
        yield LocalParam(index, param, local, grad, momentum, key, first, layout)


def check_grads(groups: Sequence[dict[str, Any]]) -> None:
    """Check whatever has a gradient, before a step reads or clips it.

    Raises:
        ValueError: names a parameter that a step cannot take as it is now, or whose gradient it cannot take.
    """
    for group_index, group in enumerate(groups):
        for index, param in enumerate(group["params"]):
            if param.grad is not None and (problem := _unusable(param, param.grad, group)):
                raise ValueError(f"{describe(group, group_index, index)} {problem}")


def _unusable(param: Tensor, grad: Tensor, group: Mapping[str, Any]) -> str:
    """Return why a step cannot take a parameter as it is now, or its gradient, and the way out; or nothing."""
    if is_fake(grad) and not is_fake(param):
        where = "on the device meta" if grad.is_meta else "of a FakeTensorMode"
        return f"has a gradient without values, {where}: make it on {param.device}"
    if param.dtype not in DTYPES:
        return (
            f"is {param.dtype} now: Muon8bit takes float32, bfloat16 and float16 parameters, and does not cut others. "
            "Convert the model back, to what it was when the optimizer was made"
        )
    if kind := why_not_dense(grad):
        way_out = "use sparse=False in its embedding" if "sparse" in kind else "a step takes dense ones"
        return f"has a {kind} gradient: {way_out}"
    if grad.dtype not in DTYPES:
        return f"has a gradient of {grad.dtype}: convert it to {param.dtype}, as backward does unless told otherwise"
    if param.is_inference():
        return "was made in torch.inference_mode(), where tensors stay as they are: make the model outside of it"
    if group.get("clip_matrix_norm") is None:
        return ""
    why = "that was made in torch.inference_mode()" if grad.is_inference() else ""
    why = "whose elements share memory, as expand() makes it" if is_overlapping(grad) else why
    return why and f"has a gradient {why}, and clip_matrix_norm scales gradients in place: assign a clone of it"


def own_state(stored: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Return the optimizer's own tensors in the state of a parameter; wrappers keep others beside them."""
    return {key: value for key, value in stored.items() if key in STATE_KEYS} if stored else {}


def _misfit(
    stored: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> str:
    """Why this is not the state that a parameter needs, and the way out; or nothing. Kernels do not look."""
    strange = next((key for key, value in stored.items() if not isinstance(value, Tensor)), None)
    if strange is not None:
        return f"now, and {strange} in its state is a {type(stored[strange]).__name__}: {_WAY_OUT}"
    found = {key: tuple(tensor.shape) for key, tensor in stored.items()}
    if not shapes.items() <= found.items():
        return f"now, in a group that asks for a state of {shapes}, and has one of {found}: {_WAY_OUT}"
    for key in shapes:
        if stored[key].dtype != dtypes[key] or not stored[key].is_contiguous():
            kind = f"{stored[key].dtype}{'' if stored[key].is_contiguous() else ', not contiguous'}"
            return f"now, and {key} in its state is {kind}, where it has to be contiguous {dtypes[key]}: {_WAY_OUT}"
    where = next((stored[key].device for key in shapes if found[key] and stored[key].device != device), None)
    if where is None:
        return ""
    return f"now, its state on {where}: optimizer.load_state_dict(optimizer.state_dict()) brings it along"


def new_state(entry: LocalParam, group: dict[str, Any], staging: StateOffload) -> dict[str, Tensor]:
    """What the optimizer keeps for a parameter."""
    param, where = entry.param, entry.layout
    if entry.momentum is not None:
        new = entry.momentum.to_state()
        shapes = {key: shape for key, (shape, _) in layout_of(param, group).items()}
        return new if where is None else where.wrapped(new, shapes)
    new = made(torch.zeros, param, group, where, staging)
    return {key: staging.at_home(tensor, param.device) for key, tensor in new.items()}


def layout_of(param: Tensor, group: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """State key -> shape and dtype of its tensor, for a whole parameter."""
    if group["algorithm"] == "adamw":
        return _moments(param.shape, group["adamw_bits"])
    return _momentum(param.shape, *(group[key] for key in FORMAT_KEYS))


_moments = cache(adamw.layout)


@cache
def _momentum(shape: torch.Size, *form: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return MomentumFormat.of(shape, *form).layout(shape)


def made(
    make: Callable[..., Tensor],
    param: Tensor,
    group: dict[str, Any],
    where: ParamSharding | None,
    staging: StateOffload,
) -> dict[str, Tensor]:
    """A parameter's state by torch.zeros or torch.empty, where it lives; of sharded parameters this rank's part."""
    layout = layout_of(param, group)
    shapes = {key: shape for key, (shape, _) in layout.items()}
    tensors = {
        key: make(shape, dtype=layout[key][1], device=home(key, param, group, staging))
        for key, shape in (shapes if where is None else where.parts(shapes)).items()
    }
    return tensors if where is None else where.wrapped(tensors, shapes)


def home(key: str, param: Tensor, group: dict[str, Any], staging: StateOffload) -> torch.device:
    """Where a tensor of a parameter's state lives."""
    return staging.home(adamw.step_device(param, group["adamw_bits"]) if key == "step" else param.device)
