"""The launch of a run: how processes share its parameters, what works under which launch, and sharded tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from finetune.config.errors import InputError
from finetune.config.options import FAMILY, Training
from finetune.parallel.launcher import processes_asked

REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_HPU", "MULTI_MLU", "MULTI_MUSA")
# `muon` is two optimizers, of which Accelerate's FSDP saves one; bitsandbytes does not take DTensors.
SHARDABLE = (*FAMILY, "adamw")


def is_sharded(accelerator: Accelerator) -> bool:
    """Check whether parameters are sharded over ranks (FSDP2), so that reading a whole one takes all ranks."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def load_device(accelerator: Accelerator) -> torch.device:
    """Return the device to which a rank loads weights: its own, or the CPU if they are to be sharded."""
    device: torch.device = torch.device("cpu") if is_sharded(accelerator) else accelerator.device
    return device


def replicas(accelerator: Accelerator, model: nn.Module) -> ProcessGroup | None:
    """Return the ranks that hold equal parameters (DDP); None for one process, an adapter, and sharded parameters."""
    is_adapter = hasattr(model, "peft_config")  # small matrices: sending them takes longer than their Newton-Schulz
    if accelerator.num_processes == 1 or is_sharded(accelerator) or is_adapter:
        return None
    return torch.distributed.group.WORLD


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as it is, or all of a sharded one, which is a collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reduce_in_fp32(accelerator: Accelerator) -> None:
    """Let FSDP2 add up gradients of all ranks in fp32, also where it computes in bf16. Call it before `prepare`.

    In bf16, Accelerate's choice, every micro-batch would be rounded once more before it is added to its shard.
    """
    if not is_sharded(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model inside of DDP's and torch.compile's wrappers."""
    inside: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inside


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters under their names in a model that nothing wraps, neither layer by layer nor whole."""
    for name, param in plain_model(model).named_parameters():
        yield _plain_name(name), param


def plain_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that a state dict has, as biases of routers, named as by `plain_parameters`."""
    for path, module in plain_model(model).named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield _plain_name(f"{path}.{name}" if path else name), buffer


def _plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def whole_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Return all weights of a prepared model, under their names in a model that nothing wraps.

    A sharded model is gathered by all ranks, a collective call; only the main process gets its weights. Tied weights
    are one tensor under several names, by which `save_pretrained` knows them.
    """
    if not is_sharded(accelerator):
        plain: dict[str, Tensor] = accelerator.get_state_dict(plain_model(model))
        return plain
    state: dict[str, Tensor] = accelerator.get_state_dict(model)
    first: dict[int, str] = {}
    for name, param in plain_model(model).named_parameters(remove_duplicate=False):
        tied = first.setdefault(id(param), name)
        if tied != name and state:  # each was gathered for itself
            state[_plain_name(name)] = state[_plain_name(tied)]
    return state


def check_launch(accelerator: Accelerator, recipe: Training) -> None:
    """Refuse launches under which an optimizer would not see what it needs.

    Raises:
        InputError: fewer processes than were asked for; FSDP version 1 or without a GPU, DeepSpeed, Megatron-LM; an
            optimizer that cannot be sharded; gradient release or state on the host in several processes, or the norms
            of sharded matrices.
    """
    kind, num = accelerator.distributed_type.value, accelerator.num_processes
    alone = {
        "--release-gradients": (recipe.release_gradients, "a gradient is used before they have added theirs"),
        "--state-device": (recipe.state_device != "device", "steps that they share do not fetch state from the host"),
    }
    for name, (is_asked, reason) in alone.items():
        if is_asked and (num > 1 or is_sharded(accelerator)):
            raise InputError(
                name, f"here are {num} processes ({kind}), and {reason}; launch a single one, or leave it out"
            )
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and not is_sharded(accelerator):
        raise InputError(
            "--config_file",
            f"it asks for FSDP, which Accelerate shards on GPUs alone and would run as {kind} here; leave it out: on "
            "CPUs `torchrun --nproc_per_node N` starts N processes, which do not shard",
        )
    if num == 1 and (num_asked := processes_asked()) > 1:
        raise InputError(
            "--num_processes",
            f"{num_asked} processes were asked for, and `accelerate launch` starts one on a CPU, which shards nothing; "
            "give --num_processes 1, leave --cpu out where there are GPUs, or start `torchrun --nproc_per_node "
            f"{num_asked}` (data parallel)",
        )
    if not is_sharded(accelerator):
        if kind not in REPLICATED:
            raise InputError("--config_file", f"{kind} is not supported; take one of finetune/configs")
        return
    if not accelerator.is_fsdp2:
        raise InputError("--config_file", "FSDP version 1 flattens parameters; set fsdp_version: 2, as in fsdp2.yaml")
    if recipe.health_every:
        raise InputError(
            "--health-every",
            "FSDP2 shards the matrices that it would watch; give 0, and watch a short run of the same recipe on one "
            "process or with ddp.yaml",
        )
    if recipe.spectra_every:
        raise InputError(
            "--spectra-every",
            "FSDP2 shards the matrices, and singular values need whole ones; give 0, and call muon8bit.spectra on what "
            "was saved",
        )
    if recipe.clip_matrix_norm:
        raise InputError("--clip-matrix-norm", "FSDP2 shards the matrices whose norms it needs; give 0, and --clip")
    if recipe.optimizer not in SHARDABLE:
        raise InputError(
            "--optimizer",
            f"{recipe.optimizer} does not run on FSDP2's sharded parameters; give {' or '.join(SHARDABLE)}, or "
            "launch with ddp.yaml",
        )
