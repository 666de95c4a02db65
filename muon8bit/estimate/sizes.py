"""Trained parameters and bytes of weights on one GPU, divided as asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..routing.groups import param_groups
from .models import quantized_names
from .optimizers import Param, cut
from .setup import Setup


@dataclass(frozen=True)
class Sizes:
    """Sizes on the GPU with the largest part.

    Attributes:
        num_parameters: elements of the whole model.
        trained: rows of the trained parameters on this GPU, from which state and gradients are counted.
        whole: the trained parameters whole, as Newton-Schulz takes them.
        weights_bytes: of all parameters and buffers.
        communication_bytes: beyond `weights_bytes`: gradient buckets (DDP), or whole weights and gradients (FSDP2).
        dequantized_bytes: the largest NF4 matrix in its compute dtype.
        unquantized_bytes: of the frozen weights of an NF4 base that are not quantized.
        experts_bytes: of these the stacked experts, [experts, rows, columns].
        saved_bytes: of the weights in a checkpoint of the scripts, on all GPUs: the adapter's, or all.
    """

    num_parameters: int
    trained: tuple[Param, ...]
    whole: tuple[Param, ...]
    weights_bytes: int
    communication_bytes: int
    dequantized_bytes: int
    unquantized_bytes: int = 0
    experts_bytes: int = 0
    saved_bytes: int = 0

    @property
    def gradients_bytes(self) -> int:
        """Bytes of the gradients of all trained parameters."""
        return sum(param.num_bytes for param in self.trained)


def measure(model: nn.Module, setup: Setup) -> Sizes:
    """Measure the sizes of a model on the meta device.

    Sharding is FSDP2's: dimension 0 in `setup.num_shards` equal parts, rounded up.

    Raises:
        ValueError: no matrix for Muon, or nothing for `setup.split_heads` or `setup.routers`.
    """
    split_heads = None if setup.split_heads == "none" else setup.split_heads
    routes = param_groups(model, lr=1e-3, split_heads=split_heads, routers=setup.routers).routes
    named = dict(model.named_parameters())
    stored: Any = {"block_size": setup.block_size, "bits": setup.bits, "normuon_moment": setup.normuon_moment}
    stored["normuon_coefficients"] = setup.normuon_coefficients
    whole = tuple(
        Param(r.name, r.shape, named[r.name].dtype, r.algorithm == "muon", r.split, r.flatten, **stored)
        for r in routes
        if r.algorithm is not None
    )
    nf4 = quantized_names(model) if setup.qlora else frozenset()
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters()}
    num_shards = setup.num_shards
    weights = unquantized = experts = 0
    for name, tensor in _tensors(model):
        shape = cut(tuple(tensor.shape), num_shards) if name in named else tuple(tensor.shape)
        if name in nf4:
            weights += nf4_bytes(math.prod(shape))
        else:
            itemsize = 4 if setup.qlora and id(tensor) in norms else tensor.dtype.itemsize
            weights += math.prod(shape) * itemsize
            if setup.qlora and name in named and not tensor.requires_grad:
                unquantized += math.prod(shape) * itemsize
                experts += math.prod(shape) * itemsize if tensor.ndim == 3 and ".experts" in name else 0
    trained = tuple(
        replace(param, shape=cut(param.shape, num_shards), whole_elements=param.num_elements, num_shards=num_shards)
        for param in whole
    )
    communication = 0
    if setup.shard == "ddp":  # its buckets are copies of the gradients
        communication = sum(param.num_bytes for param in whole)
    elif num_shards > 1:
        communication = _unsharded_bytes(model, setup)
    largest = max((named[name].numel() for name in nf4), default=0)
    num_parameters = sum(param.numel() for param in named.values())
    kept = [param for param in named.values() if setup.rank is None or param.requires_grad]
    saved = sum(param.numel() * param.dtype.itemsize for param in kept)
    dequantized = setup.weight_dtype.itemsize * largest
    return Sizes(num_parameters, trained, whole, weights, communication, dequantized, unquantized, experts, saved)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers, tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def nf4_bytes(num_elements: int) -> int:
    """Return the bytes of a matrix in NF4 with double quantization, blocks of 64 and 256.

    They are codes, the blocks' maxima as codes, the maxima of those, an offset and the table of 16 values. Source:
    bitsandbytes 0.50 `quantize_4bit`.
    """
    blocks = math.ceil(num_elements / 64)
    return math.ceil(num_elements / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 + 16 * 4


def _unsharded_bytes(model: nn.Module, setup: Setup) -> int:
    """Return the bytes of whole weights and gradients that FSDP2 has beside the parts.

    Each layer is a unit of its own, and the rest (embeddings, head) is one. Whole at once are the weights of the rest,
    of a layer and of the next layer, and the gradients of the largest unit. Those are there twice: whole, and as sent,
    in fp32 where the model computes in a lower precision than the weights have, as the scripts let it.
    """
    layers = [
        layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module if _size(layer)
    ]
    largest = max(layers, key=_size, default=None)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    itemsize = (setup.autocast or setup.weight_dtype).itemsize
    sent = 4 if setup.autocast else itemsize
    layer = list(largest.parameters()) if largest is not None else []

    def count(params: list[nn.Parameter]) -> int:
        return sum(param.numel() for param in params if param.requires_grad)

    weights = sum(p.numel() for p in rest) + 2 * sum(p.numel() for p in layer)
    return itemsize * weights + (itemsize + sent) * max(count(rest), count(layer))


def _size(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())
