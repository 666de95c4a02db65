"""Parameters of a group that have a gradient at this step, their state, and the state of those that have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..config import STATE_KEYS
from . import adamw, adamw8bit, rounding
from .dense import is_fake, is_overlapping, why_not_dense, with_memory
from .group_options import AdamWOptions, GroupOptions, MuonOptions
from .momentum import Momentum, MomentumFormat
from .offload import StateOffload
from .options import DTYPES, FORMAT_KEYS, describe, state_format
from .second_moment import SecondMoment, SecondMomentFormat

if TYPE_CHECKING:
    from ..distributed import ParamSharding, RankGroup


# State key -> shape and dtype of its tensor, for a whole parameter.
StateLayout: TypeAlias = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
_WAY_OUT = "undo that, or delete its entry in the optimizer's state, which then starts at zero"


@dataclass(slots=True)
class LocalParam:
    """A parameter that has a gradient, as this rank sees it.

    Attributes:
        index: the parameter's place in its group.
        param: the tensor that the state is kept for.
        local, grad: this rank's tensors.
        momentum: None in an AdamW group.
        second: the second moment of a Muon group that has one.
        state: the optimizer's own tensors for it, empty where they are still to be made.
        key: the hash key of stochastic rounding; None rounds to nearest.
        first: the index in the whole parameter of the first element here.
        layout: where all of it lies; None where that is here.
        is_shared: its matrices need other ranks.
    """

    index: int
    param: Tensor
    local: Tensor
    grad: Tensor
    momentum: Momentum | None
    second: SecondMoment | None
    state: Mapping[str, Tensor]
    key: int | None
    first: int
    layout: ParamSharding | None
    is_shared: bool


def local_params(
    group: dict[str, Any],
    options: GroupOptions,
    group_index: int,
    num_before: int,
    state: Mapping[Tensor, dict[str, Any]],
    rank_group: RankGroup | None,
    offload: StateOffload,
) -> list[LocalParam]:
    """Return the parameters of a group that have a gradient now, checked, with their state.

    Args:
        group: the group's dict.
        options: the group's, from `resolve_options`.
        group_index: the group's place.
        num_before: the number of parameters of the optimizer in front of this group.
        state: the optimizer's, by parameter.
        rank_group: the ranks with which it shares its matrices.
        offload: where the state lives.

    Raises:
        ValueError: for a gradient, learning rate or state that cannot be used; the message names the parameter.
    """
    lr = options.lr
    lr_device = lr.device if isinstance(lr, Tensor) and lr.device.type != "cpu" else None
    has_no_rate = isinstance(lr, Tensor) and is_fake(lr)
    found = []
    for index, param in enumerate(group["params"]):
        if param.grad is None:
            continue
        if problem := _why_not_stepped(param, param.grad, options):
            raise ValueError(f"{describe(group, group_index, index)} {problem}")
        if lr_device not in (None, param.device):
            name = describe(group, group_index, index)
            raise ValueError(
                f"parameter group {group_index}: lr is a tensor on {lr_device}, {name} is on {param.device}: keep lr "
                "on the CPU"
            )
        if has_no_rate and not is_fake(param.grad):
            raise ValueError(f"parameter group {group_index}: lr is a tensor without values: write a number there")
        key = None
        if "rounding_seed" in group:
            key = rounding.key_of(param, describe(group, group_index, index), num_before + index, group)
        stored = state.get(param, {})
        found.append(_local_param(param, stored, group, options, group_index, index, key, rank_group, offload))
    return found


def _local_param(
    param: Tensor,
    stored: Mapping[str, Any],
    group: dict[str, Any],
    options: GroupOptions,
    group_index: int,
    index: int,
    key: int | None,
    rank_group: RankGroup | None,
    offload: StateOffload,
) -> LocalParam:
    """Return one parameter with a usable gradient, and its state; a momentum that has none gets a new one."""
    grad, local, layout, first = param.grad, param, None, 0
    assert grad is not None
    is_muon, is_shared = isinstance(options, MuonOptions), False
    # Muon's kernels read negated views, and AdamW's write nothing else.
    if grad._is_zerotensor() or (grad.is_neg() and not is_muon):
        grad = with_memory(grad)
    if rank_group is not None:
        name = describe(group, group_index, index)
        layout = rank_group.sharding_of(param, group, name)
    if layout is not None:
        local, grad, first = layout.local(param, grad, name, is_rounded=key is not None and not is_muon)
        is_shared = is_muon and not layout.is_local(group["flatten"])
    own = {key: stored[key] for key in stored if key in STATE_KEYS}  # wrappers keep others beside them
    if own and layout is not None:
        own = layout.to_local(own)
    if isinstance(options, MuonOptions):
        tensors = _local_layout(muon_layout, layout, param.shape, *options.state_format)
    else:
        tensors = _local_layout(_adamw_layout, layout, param.shape, options.adamw_bits)
    device = local.device if offload.state_device is None else offload.home(local.device)
    if own and (problem := _misfit(own, tensors, device)):
        keys = [key for key in (*FORMAT_KEYS, "second_moment", "adamw_bits") if group.get(key) is not None]
        name, form = describe(group, group_index, index), ", ".join(f"{key}={group[key]!r}" for key in keys)
        where = f"{tuple(local.shape)} on {local.device}"
        raise ValueError(f"{name} of parameter group {group_index} ({form}) is {where} {problem}")
    momentum = second = None
    if isinstance(options, MuonOptions):
        format, known = MomentumFormat.of(param.shape, *options.format), own
        if not own:
            new = {key: torch.zeros(shape, dtype=dtype, device=device) for key, (shape, dtype) in tensors.items()}
            Momentum.from_state(new, format).clear_()
            known = {key: offload.at_home(tensor, local.device) for key, tensor in new.items()}
        momentum = Momentum.from_state(known, format)
        if options.second_moment is not None:
            second = SecondMoment.from_state(known, SecondMomentFormat.of(param.shape, *options.state_format))
    return LocalParam(index, param, local, grad, momentum, second, own, key, first, layout, is_shared)


def _why_not_stepped(param: Tensor, grad: Tensor, options: GroupOptions) -> str:
    """Return why a step cannot take a parameter as it is now, or its gradient, and the way out; or nothing."""
    if (grad.is_meta or type(grad) is not Tensor) and is_fake(grad) and not is_fake(param):
        where = "on the device meta" if grad.is_meta else "of a FakeTensorMode"
        return f"has a gradient without values, {where}: make it on {param.device}"
    if param.dtype not in DTYPES:
        return (
            f"is {param.dtype} now: Muon8bit takes float32, bfloat16 and float16 parameters, and does not cut others. "
            "Convert the model back, to what it was when the optimizer was made"
        )
    if grad.layout is not torch.strided or grad.is_nested:
        kind = why_not_dense(grad)
        way_out = "use sparse=False in its embedding" if "sparse" in kind else "a step takes dense ones"
        return f"has a {kind} gradient: {way_out}"
    if grad.dtype not in DTYPES:
        return f"has a gradient of {grad.dtype}: convert it to {param.dtype}, as backward does unless told otherwise"
    if param.is_inference():
        return "was made in torch.inference_mode(), where tensors stay as they are: make the model outside of it"
    if isinstance(options, AdamWOptions):
        if options.adamw_bits == 8:
            adamw8bit.check_available(param.device.type)
        return ""
    if options.clip_matrix_norm is None:
        return ""
    why = "that was made in torch.inference_mode()" if grad.is_inference() else ""
    why = "whose elements share memory, as expand() makes it" if is_overlapping(grad) else why
    return why and f"has a gradient {why}, and clip_matrix_norm scales gradients in place: assign a clone of it"


def _misfit(stored: Mapping[str, Tensor], tensors: StateLayout, device: torch.device) -> str:
    """Return why this is not the state that a parameter needs here, and the way out; or nothing. Kernels do not look.

    Most fit, which is seen first.
    """
    for key, (shape, dtype) in tensors.items():
        value = stored.get(key)
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != dtype:
            break
        if not value.is_contiguous() or (shape and value.device != device):
            break
    else:
        if len(stored) == len(tensors):
            return ""
    shapes = {key: shape for key, (shape, _) in tensors.items()}
    strange = next((key for key, value in stored.items() if not isinstance(value, Tensor)), None)
    if strange is not None:
        return f"now, and {strange} in its state is a {type(stored[strange]).__name__}: {_WAY_OUT}"
    found = {key: tuple(tensor.shape) for key, tensor in stored.items()}
    if not shapes.items() <= found.items():
        return f"now, in a group that asks for a state of {shapes}, and has one of {found}: {_WAY_OUT}"
    for key, (_, dtype) in tensors.items():
        value = stored[key]
        if value.dtype != dtype or not value.is_contiguous():
            kind = f"{value.dtype}{'' if value.is_contiguous() else ', not contiguous'}"
            return f"now, and {key} in its state is {kind}, where it has to be contiguous {dtype}: {_WAY_OUT}"
    where = next((stored[key].device for key in shapes if found[key] and stored[key].device != device), None)
    if where is None:
        return ""
    return f"now, its state on {where}: optimizer.load_state_dict(optimizer.state_dict()) brings it along"


def new_state(local: LocalParam, group: Mapping[str, Any], offload: StateOffload) -> dict[str, Tensor]:
    """Return the state to keep for a parameter that has none yet."""
    param, layout = local.param, local.layout
    if local.momentum is None:
        new = make_state(torch.zeros, param, group, layout, offload)
        return {key: offload.at_home(tensor, param.device) for key, tensor in new.items()}
    new = local.momentum.to_state() | (local.second.to_state() if local.second is not None else {})
    if layout is None:
        return new
    return layout.to_dtensors(new, {key: shape for key, (shape, _) in layout_of(param, group).items()})


@cache
def _local_layout(whole: Callable[..., StateLayout], sharding: ParamSharding | None, *what: Any) -> StateLayout:
    """Return what `whole` does of a shape and a format, with the shapes of this rank's parts."""
    tensors = whole(*what)
    if sharding is None:
        return tensors
    shapes = sharding.local_shapes({key: shape for key, (shape, _) in tensors.items()})
    return {key: (shapes[key], dtype) for key, (_, dtype) in tensors.items()}


@cache
def _adamw_layout(shape: torch.Size, adamw_bits: int) -> StateLayout:
    return adamw.layout(shape, adamw_bits)


@cache
def muon_layout(shape: torch.Size, *format: Any) -> StateLayout:
    """Return state key -> shape and dtype of its tensor, for a whole matrix, by what `options.state_format` gives."""
    *of_momentum, _, _, second_moment = format
    layout = MomentumFormat.of(shape, *of_momentum).layout(shape)
    if second_moment is None:
        return layout
    return {**layout, **SecondMomentFormat.of(shape, *format).layout(shape)}


def layout_of(param: Tensor, group: Mapping[str, Any]) -> StateLayout:
    """Return state key -> shape and dtype of its tensor, for a whole parameter of a group."""
    if group["algorithm"] == "adamw":
        return _adamw_layout(param.shape, group["adamw_bits"])
    return muon_layout(param.shape, *state_format(group))


def make_state(
    make: Callable[..., Tensor],
    param: Tensor,
    group: Mapping[str, Any],
    layout: ParamSharding | None,
    offload: StateOffload,
) -> dict[str, Tensor]:
    """Return a parameter's state made by `make`, where it lives; for sharded parameters, this rank's part.

    Args:
        make: torch.zeros or torch.empty.
        param: the whole parameter.
        group: its group.
        layout: where a sharded parameter lies, or None.
        offload: where the state lives.
    """
    whole = layout_of(param, group)
    shapes = {key: shape for key, (shape, _) in whole.items()}
    tensors = {
        key: make(shape, dtype=whole[key][1], device=home(key, param, group, offload))
        for key, shape in (shapes if layout is None else layout.local_shapes(shapes)).items()
    }
    return tensors if layout is None else layout.to_dtensors(tensors, shapes)


def home(key: str, param: Tensor, group: Mapping[str, Any], offload: StateOffload) -> torch.device:
    """Return where a tensor of a parameter's state lives."""
    return offload.home(adamw.step_device(param, group["adamw_bits"]) if key == "step" else param.device)
