"""The training loop's parts: batches, one optimizer step, and evaluation. Shared by all scripts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_

from finetune.models.tokens import Tokens
from finetune.parallel.launch import is_sharded, plain_parameters, whole
from finetune.parallel.ranks import gather
from finetune.training.balancing import Balancing
from finetune.training.loss import IGNORED, Batch, summed_nats


class Sequences(ABC):
    """Numbered sequences to train or evaluate on.

    The order is a function of (seed, position) alone, so a resumed run continues it without any saved state:
    epoch after epoch, each a permutation of all sequences.

    Args:
        seed: seed of the permutations.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def count_targets(self, index: int) -> int:
        """Return how many targets a sequence has, without a device; 0 for index -1."""

    @abstractmethod
    def count_tokens(self, index: int) -> int:
        """Return how many tokens a sequence has without padding, at its start, targets or not; 0 for index -1."""

    @abstractmethod
    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """Return these sequences as one batch; index -1 stands for a sequence without targets."""

    def shuffled(self, position: int) -> int:
        """Return the index of the sequence at a position of the endless shuffled order."""
        epoch, place = divmod(position, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self))
        return int(self._order[place])


class Blocks(Sequences):
    """Consecutive blocks of a token sequence: block i predicts tokens [i * seq_len + 1, (i + 1) * seq_len].

    Args:
        tokens: token ids [n], memory-mapped; only the blocks asked for are read.
        seq_len: tokens per block.
        seed: seed of the permutations.
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int = 0) -> None:
        super().__init__(seed)
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def count_targets(self, index: int) -> int:
        """Return the number of targets of a block, 0 for index -1."""
        return self.seq_len if index >= 0 else 0

    def count_tokens(self, index: int) -> int:
        """Return the number of tokens of a block, 0 for index -1."""
        return self.count_targets(index)

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """Return blocks as {input_ids, targets}, each [len(indices), seq_len] int64; index -1 gives ignored targets."""
        starts = [max(i, 0) * self.seq_len for i in indices]
        rows = np.stack([self.tokens[s : s + self.seq_len + 1] for s in starts]).astype(np.int64)
        blocks = torch.from_numpy(rows)
        targets = blocks[:, 1:].clone()
        targets[torch.tensor(indices) < 0] = IGNORED
        return {"input_ids": blocks[:, :-1].to(device), "targets": targets.to(device)}


def step_rows(
    sequences: Sequences, accelerator: Accelerator, position: int, batch_size: int, num_batches: int
) -> Iterator[list[int]]:
    """Yield the indices of the sequences in each of this rank's micro-batches of one optimizer step.

    All ranks together take positions [position, position + num_batches * ranks * batch_size) of the shuffled order.
    """
    for i in range(num_batches):
        first = position + (i * accelerator.num_processes + accelerator.process_index) * batch_size
        yield [sequences.shuffled(first + j) for j in range(batch_size)]


def step_batches(
    sequences: Sequences, accelerator: Accelerator, position: int, batch_size: int, num_batches: int
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of one optimizer step, of `step_rows`."""
    for rows in step_rows(sequences, accelerator, position, batch_size, num_batches):
        yield sequences.batch(rows, accelerator.device)


def step_targets(
    sequences: Sequences, accelerator: Accelerator, position: int, batch_size: int, num_batches: int
) -> int:
    """Count the targets of one optimizer step on all ranks. Every rank knows them all, so none asks another."""
    num = num_batches * accelerator.num_processes * batch_size
    return sum(sequences.count_targets(sequences.shuffled(position + i)) for i in range(num))


def begin_balancing(
    balancing: Balancing,
    sequences: Sequences,
    accelerator: Accelerator,
    position: int,
    batch_size: int,
    num_batches: int,
) -> None:
    """Tell of one optimizer step which tokens count, those of all ranks. No rank asks another."""
    rows = step_rows(sequences, accelerator, position, batch_size, num_batches)
    num = num_batches * accelerator.num_processes * batch_size
    num_tokens = sum(sequences.count_tokens(sequences.shuffled(position + i)) for i in range(num))
    balancing.begin_step([[sequences.count_tokens(i) for i in row] for row in rows], num_tokens, accelerator)


def num_targets(batch: Batch) -> Tensor:
    """Count the targets of a batch that are not ignored: int64 scalar."""
    return (batch["targets"] != IGNORED).sum()


def accumulate_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Sequence[Batch],
    targets: int,
    loss_chunk: int = 0,
    balancing: Balancing | None = None,
) -> Tensor:
    """Add the gradient of one optimizer step's loss to `.grad` and return that loss times `targets`.

    The loss is the sum over targets divided by the targets of the *whole* step, all micro-batches and ranks, so it
    does not depend on how the step is cut up. (A mean of means is wrong where the counts differ.) Nothing here waits
    for the device.

    Args:
        accelerator: with gradient_accumulation_steps 1; the cutting is done here.
        model: a prepared causal language model.
        batches: this rank's micro-batches; all ranks have equally many.
        targets: those that count, in the micro-batches of all ranks.
        loss_chunk: of `summed_nats`.
        balancing: that has begun the step; the losses of its routers are not in what is returned.

    Returns:
        Summed nats of all ranks, fp32 scalar on the device, equal on all ranks.
    """
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        with _reduced(accelerator, model, is_last=i == len(batches) - 1):
            with balancing.forward(i, batch) if balancing else nullcontext():
                nats = summed_nats(model, batch, loss_chunk)
            # Data parallelism averages gradients over ranks: undo its division.
            accelerator.backward(nats * (accelerator.num_processes / max(targets, 1)))
        total += nats.detach()
    if balancing:
        balancing.reduce(accelerator)
    return _sum(accelerator, total)


@contextmanager
def _reduced(accelerator: Accelerator, model: Any, is_last: bool) -> Iterator[None]:
    """Say which ranks add up their gradients after the backward pass inside.

    DDP does so after the last micro-batch. FSDP2's shards take every one: without that each rank keeps the gradients
    of the whole model between micro-batches, in the dtype that the backward pass has. Replicas of shards (HSDP) are
    added up after the last, from sums in fp32.
    """
    if not is_sharded(accelerator):
        with nullcontext() if is_last else accelerator.no_sync(model):
            yield
        return
    model.set_requires_all_reduce(is_last)
    try:
        yield
    finally:
        model.set_requires_all_reduce(True)


@dataclass(frozen=True)
class Norms:
    """2-norms of a model's gradients, on their device.

    Attributes:
        names: of the parameters that have a gradient.
        each: fp32 [len(names)], of this rank's part of each.
        total: fp32 scalar, of all gradients, equal on all ranks.
    """

    names: list[str]
    each: Tensor
    total: Tensor

    def check(self, accelerator: Accelerator) -> None:
        """Refuse a total that is not finite; then a collective call, on all ranks alike.

        Raises:
            FloatingPointError: names the parameters whose gradient holds NaN or Inf.
        """
        if bool(self.total.isfinite()):
            return
        bad = {name for name, norm in zip(self.names, self.each.tolist(), strict=True) if not math.isfinite(norm)}
        everywhere = set().union(*gather(accelerator, bad))
        found = [name for name in self.names if name in everywhere]
        names = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise FloatingPointError(f"the gradient of {names or 'the whole model'} is not finite")


def clip_gradients(model: nn.Module, limit: float) -> Norms:
    """Clip all gradients so that their global 2-norm is at most `limit`; 0 leaves them. Does not wait for the device.

    Gradients that are not finite stay as they are: see `Norms.check`. Sharded ones (DTensors) take all ranks, which
    get the same norm.

    Returns:
        The norms before clipping.
    """
    named = [(name, param.grad) for name, param in plain_parameters(model) if param.grad is not None]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm([grad for _, grad in named])])
    total = whole(torch.linalg.vector_norm(norms))
    if limit:
        clip_grads_with_norm_(model.parameters(), limit, torch.where(total.isfinite(), total, 0))
    each = norms.to_local() if isinstance(norms, DTensor) else norms
    return Norms([name for name, _ in named], each, total)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, sequences: Sequences, batch_size: int, loss_chunk: int = 0
) -> float:
    """Return the cross-entropy over all sequences in nats per target, equal on all ranks.

    `loss_chunk` is as in `summed_nats`.
    """
    was_training = model.training
    model.eval()
    stride = batch_size * accelerator.num_processes
    parts = []
    # Every rank runs equally many batches (a forward of a wrapped model may be collective), padded with ignored ones.
    for start in range(0, len(sequences), stride):
        first = start + accelerator.process_index * batch_size
        indices = [i if i < len(sequences) else -1 for i in range(first, first + batch_size)]
        if accelerator.num_processes == 1:
            indices = [i for i in indices if i >= 0]
        parts.append(summed_nats(model, sequences.batch(indices, accelerator.device), loss_chunk))
    model.train(was_training)
    # In float64, which some devices have not: on the CPU.
    nats = sum(gather(accelerator, sum(torch.stack(parts).tolist())))
    return nats / max(sum(map(sequences.count_targets, range(len(sequences)))), 1)


def _sum(accelerator: Accelerator, value: Tensor) -> Tensor:
    reduced: Tensor = accelerator.reduce(value, "sum")
    return reduced
