"""Under FSDP2 one process loads the weights; the others have an empty model until each is sent its shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, init_empty_weights
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from finetune.config.options import Training
from finetune.models.build import checkpoint_activations
from finetune.parallel.launch import is_sharded, plain_model, plain_parameters
from finetune.parallel.ranks import on_all, on_main

T = TypeVar("T")


@dataclass(frozen=True)
class _Param:
    """One parameter without its values; tied ones have several names."""

    names: list[str]
    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class _Plan:
    """Everything that other processes need to make the main process's model, and to go on as if they had built it."""

    kind: type[Any]
    config: Any
    params: list[_Param]
    buffers: dict[str, tuple[torch.Size, torch.dtype]]
    random_state: Tensor


@dataclass(frozen=True)
class Weights:
    """Weights that wait for `spread`: all on the main process, by the first of their names; none on the others."""

    by_name: dict[str, Tensor]


def build_once(
    accelerator: Accelerator, recipe: Training, build: Callable[[], tuple[Any, T]]
) -> tuple[Any, T, Weights | None]:
    """Build a model of transformers; one to be sharded is built and looked at by the main process alone.

    There the model that is returned has its parameters on the meta device on all processes; torch's random state
    continues on all as on the main process.

    Args:
        accelerator: of the run.
        recipe: of the run.
        build: returns a model in training mode, on the CPU where it is to be sharded, and what else all must know of
            its weights.

    Returns:
        The model, what else `build` returned, and, where it is to be sharded, the weights for `spread`.

    Raises:
        InputError: of `build`, whichever process it failed on; on all processes.
        RanksError: another process failed in another way.
    """
    if not is_sharded(accelerator):
        return *on_all(accelerator, build), None
    # Accelerate's own way would have every process load before it sends, and knows no buffers in a state dict.
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    built: list[Any] = []
    held: dict[str, Tensor] = {}

    def work() -> tuple[_Plan, T]:
        model, more = build()
        groups = _grouped(model)
        held.update((names[0], param.detach()) for names, param in groups)
        params = [_Param(names, param.shape, param.dtype, param.requires_grad) for names, param in groups]
        buffers = {name: (buffer.shape, buffer.dtype) for name, buffer in model.named_buffers()}
        built.append(model)
        return _Plan(type(model), model.config, params, buffers, torch.get_rng_state()), more

    plan, more = on_main(accelerator, work)
    model = on_all(accelerator, lambda: built[0] if built else _empty_model(plan, recipe))
    for place, param in enumerate(plan.params):
        _put(model, param, place)
    torch.set_rng_state(plan.random_state)
    return model, more, Weights(held)


def _empty_model(plan: _Plan, recipe: Training) -> Any:
    with init_empty_weights(include_buffers=False):
        model = plan.kind(plan.config)
    params = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = dict(model.named_buffers())
    if params != {name for param in plan.params for name in param.names} or list(buffers) != list(plan.buffers):
        raise RuntimeError(f"{plan.kind.__name__} has other parameters or buffers when it is built than when loaded")
    for name, (shape, dtype) in plan.buffers.items():
        _set(model, name, torch.zeros(shape, dtype=dtype))
    if recipe.activation_checkpointing:
        checkpoint_activations(model)
    return model


def _grouped(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Return each parameter with all its names."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(param), ([], param))[0].append(name)
    return list(found.values())


def _put(model: nn.Module, param: _Param, place: int) -> None:
    """Give the model an empty parameter in place of the one that it has under these names."""
    empty = nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device="meta"), param.requires_grad)
    # Accelerate tells an optimizer's parameters by their addresses, which are all 0 on the meta device.
    vars(empty)["data_ptr"] = lambda: place
    for name in param.names:
        _set(model, name, empty)


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, tensor)


@torch.no_grad()
def spread(accelerator: Accelerator, model: nn.Module, weights: Weights) -> None:
    """Send each process its shards of all parameters, and all buffers, one tensor at a time: a collective call.

    Args:
        accelerator: of the run.
        model: of `build_once`, as Accelerate has prepared it.
        weights: of `build_once`; empty afterwards.
    """
    device = accelerator.device
    is_offloaded = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    stays = torch.device("cpu") if is_offloaded else device
    model._apply(lambda tensor: torch.empty_like(tensor, device=stays) if tensor.is_meta else tensor)

    def received(name: str, like: Tensor) -> Tensor:
        if accelerator.is_main_process:
            sent = weights.by_name.pop(name).to(device, like.dtype).contiguous()
        else:
            sent = torch.empty(like.shape, dtype=like.dtype, device=device)
        dist.broadcast(sent, src=0)
        return sent

    for name, param in plain_parameters(model):
        assert isinstance(param, DTensor), name
        part = distribute_tensor(received(name, param), param.device_mesh, param.placements, src_data_rank=None)
        param.to_local().copy_(part.to_local())
    for name, buffer in plain_model(model).named_buffers():
        if accelerator.is_main_process:
            weights.by_name[name] = buffer
        buffer.copy_(received(name, buffer))
