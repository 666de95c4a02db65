"""Gradients that two ranks accumulate under FSDP2 in bf16, against float64."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.parallel.launch import reduce_in_fp32
from finetune.training.train_step import accumulate_gradients

NUM_BATCHES, ROWS, LENGTH = 64, 1, 16  # of all ranks together


def make_model(dtype):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ).to(dtype)


def make_batches():
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 64, (ROWS, LENGTH + 1), generator=generator) for _ in range(NUM_BATCHES)]
    return [{"input_ids": ids[:, :-1], "targets": ids[:, 1:]} for ids in rows]


def mean_gradient(dtype):
    """Return the gradient of one process that takes all in one batch, by torch's own mean."""
    model, batches = make_model(dtype), make_batches()
    ids, targets = (torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "targets"))
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    logits = logits if dtype == torch.float64 else logits.float()
    torch.nn.functional.cross_entropy(logits, targets.flatten()).backward()
    return torch.cat([param.grad.flatten().double() for param in model.parameters()])


def errors(folder, shapes):
    """Write the relative errors of one process without accumulation, and of two ranks with it, for meshes."""
    oracle = mean_gradient(torch.float64)

    def error(gradient):
        return float((gradient.double() - oracle).norm() / oracle.norm())

    found = {"one": error(mean_gradient(torch.bfloat16))}
    for name, shape in shapes.items():
        found[name] = error(
            _accumulated(init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]))
        )
    if dist.get_rank() == 0:
        Path(folder, "errors.json").write_text(json.dumps(found))


def _accumulated(mesh):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(
        num_processes=dist.get_world_size(),
        device=torch.device("cpu"),
        distributed_type=DistributedType.FSDP,
        state=SimpleNamespace(fsdp_plugin=plugin),
        backward=lambda loss: loss.backward(),
        reduce=lambda tensor, _how: dist.all_reduce(tensor) or tensor,
    )
    reduce_in_fp32(accelerator)
    model = make_model(torch.float32)
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh, mp_policy=plugin.mixed_precision_policy)
    mine = make_batches()[dist.get_rank() :: dist.get_world_size()]
    nats = accumulate_gradients(accelerator, model, mine, NUM_BATCHES * ROWS * LENGTH)
    assert abs(float(nats) / (NUM_BATCHES * ROWS * LENGTH) - 4.16) < 0.1  # about log(64)
    assert all(param.grad.to_local().dtype == torch.float32 for param in model.parameters())
    return torch.cat([param.grad.full_tensor().flatten() for param in model.parameters()])
