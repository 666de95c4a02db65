"""Cross-entropy of a batch: over all logits at once, or a few tokens at a time, whose logits do not stay.

torch's own `linear_cross_entropy` does the latter only since 2.13, and from a weight, not through the model's forward,
where DDP, FSDP2, autocast and adapters do their work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint as recompute
from transformers import PreTrainedModel

from finetune.config.errors import InputError
from finetune.models.build import logits_of

# `targets` [batch, seq_len] int64, -100 where nothing is to be predicted; the rest are arguments of the model.
Batch: TypeAlias = Mapping[str, Tensor]
IGNORED = -100


def summed_nats(model: nn.Module, batch: Batch, chunk: int = 0) -> Tensor:
    """Return the cross-entropy summed over the targets of a batch: fp32 scalar, in nats.

    Args:
        model: causal language model, wrapped or not.
        batch: on the model's device.
        chunk: tokens whose logits exist at once and are recomputed in the backward pass, for a model that
            `check_head` takes; 0: all, kept. bf16 gradients of the head are then summed in bf16, chunk by chunk.
    """
    targets = batch["targets"]
    arguments = {key: value for key, value in batch.items() if key != "targets"}
    if not chunk:
        logits = model(**arguments, use_cache=False).logits
        return _nats(logits, targets, "sum")
    with _nats_for_logits(_head(model), targets, chunk):
        total: Tensor = model(**arguments, use_cache=False).logits.float().sum()
    return total


def _nats(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Return the fp32 cross-entropy, summed or of every token [tokens] ("none"); 0 where nothing is to be predicted."""
    return cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


@contextmanager
def _nats_for_logits(head: nn.Module, targets: Tensor, chunk: int) -> Iterator[None]:
    """Let the head give the nats of every token, [batch, seq_len, 1], in place of its logits.

    Inside the model's forward, since outside of it a sharded weight is not whole, nothing is cast for mixed precision,
    and no wrapper knows of the gradient.
    """
    logits_of, own = head.forward, vars(head).get("forward")

    def part(hidden: Tensor, wanted: Tensor) -> Tensor:
        return _nats(logits_of(hidden), wanted, "none")

    def forward(hidden: Tensor) -> Tensor:
        parts = zip(hidden.flatten(0, -2).split(chunk), targets.flatten().split(chunk), strict=True)
        nats = [recompute(part, states, wanted, use_reentrant=False) for states, wanted in parts]
        return torch.cat(nats).view(*targets.shape, 1)

    head.forward = forward
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Find out whether what the model's head gives are its logits: only then are they computed right in chunks.

    Args:
        model: causal language model, not prepared by Accelerate; its mode is left as it was.

    Raises:
        InputError: it has no head, or changes what the head gives, as by a scale or a softcap.
    """
    given: list[Tensor] = []
    head = _head(model)
    handle = head.register_forward_hook(lambda _module, _args, out: given.append(out))
    try:
        logits = logits_of(model, input_ids=torch.arange(1, 9, device=next(model.parameters()).device).view(2, 4))
    finally:
        handle.remove()
    if len(given) != 1 or not torch.equal(given[0].float(), logits):
        raise InputError("--loss-chunk", f"{_name(model)} changes the logits that its head gives; give 0")


def _head(model: nn.Module) -> nn.Module:
    head: Any = None
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            causal: Any = module
            head = causal.get_output_embeddings()
            break
    if not isinstance(head, nn.Module):
        raise InputError("--loss-chunk", f"{_name(model)} tells of no head (get_output_embeddings); give 0")
    return head


def _name(model: nn.Module) -> str:
    return next((type(m).__name__ for m in model.modules() if isinstance(m, PreTrainedModel)), type(model).__name__)
