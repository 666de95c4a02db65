"""The training loop's parts: batches, one optimizer step, evaluation, and a polite stop. Shared by all scripts."""

from __future__ import annotations

import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from finetune.errors import StorageError
from finetune.launch import whole
from finetune.loss import IGNORED, Batch, summed_nats
from finetune.tokens import Tokens

TIME_IS_UP = 124  # exit code: that of timeout(1), so that a script which knows that one knows ours


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
    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """These sequences as one batch; index -1 stands for a sequence without targets."""

    def shuffled(self, position: int) -> int:
        """Index of the sequence at a position of the endless shuffled order."""
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

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """Blocks as {input_ids, targets}, each [len(indices), seq_len] int64; index -1 gives ignored targets."""
        starts = [max(i, 0) * self.seq_len for i in indices]
        rows = np.stack([self.tokens[s : s + self.seq_len + 1] for s in starts]).astype(np.int64)
        blocks = torch.from_numpy(rows)
        targets = blocks[:, 1:].clone()
        targets[torch.tensor(indices) < 0] = IGNORED
        return {"input_ids": blocks[:, :-1].to(device), "targets": targets.to(device)}


def step_batches(
    sequences: Sequences, accelerator: Accelerator, position: int, batch_size: int, num_batches: int
) -> Iterator[Batch]:
    """This rank's micro-batches of one optimizer step, which takes positions
    [position, position + num_batches * ranks * batch_size) of the shuffled order."""
    for i in range(num_batches):
        first = position + (i * accelerator.num_processes + accelerator.process_index) * batch_size
        indices = [sequences.shuffled(first + j) for j in range(batch_size)]
        yield sequences.batch(indices, accelerator.device)


def num_targets(batch: Batch) -> Tensor:
    """Targets of a batch that count: int64 scalar."""
    return (batch["targets"] != IGNORED).sum()


def total_targets(accelerator: Accelerator, batches: Sequence[Batch]) -> int:
    """Targets that count in the micro-batches of all ranks together; a collective call."""
    return int(_sum(accelerator, torch.stack([num_targets(batch) for batch in batches]).sum()))


def accumulate_gradients(
    accelerator: Accelerator, model: nn.Module, batches: Sequence[Batch], loss_chunk: int = 0
) -> float:
    """Add the gradient of one optimizer step's loss to `.grad` and return that loss.

    The loss is the sum over targets divided by the targets of the *whole* step, all micro-batches and ranks, so it
    does not depend on how the step is cut up. (A mean of means is wrong where the counts differ.)

    Args:
        accelerator: with gradient_accumulation_steps 1; the cutting is done here.
        model: a prepared causal language model.
        batches: this rank's micro-batches; all ranks have equally many.
        loss_chunk: of `summed_nats`.

    Returns:
        Loss in nats per target, equal on all ranks.
    """
    targets = total_targets(accelerator, batches)
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            nats = summed_nats(model, batch, loss_chunk)
            # Data parallelism averages gradients over ranks: undo its division.
            accelerator.backward(nats * (accelerator.num_processes / max(targets, 1)))
        total += nats.detach()
    return float(_sum(accelerator, total)) / max(targets, 1)


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scale all gradients so that their global 2-norm is at most `limit`; 0 turns it off.

    Sharded gradients (DTensors) take all ranks, which get the same norm.

    Returns:
        The norm before clipping.

    Raises:
        FloatingPointError: a gradient holds NaN or Inf; names the parameters. Nothing was scaled.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    total = whole(get_total_norm(grads))
    norm = float(total)
    if not math.isfinite(norm):
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not math.isfinite(_peak(p.grad))]
        names = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise FloatingPointError(f"the gradient of {names or 'the whole model'} is not finite")
    if limit:
        clip_grads_with_norm_(model.parameters(), limit, total)
    return norm


def _peak(grad: Tensor) -> float:
    """Largest magnitude; NaN or Inf where the gradient holds one."""
    return float(whole(grad.abs().amax()))


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, sequences: Sequences, batch_size: int, loss_chunk: int = 0
) -> float:
    """Cross-entropy over all sequences in nats per target, equal on all ranks; `loss_chunk` as in `summed_nats`."""
    was_training = model.training
    model.eval()
    stride = batch_size * accelerator.num_processes
    nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    targets = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    # Every rank runs equally many batches (a forward of a wrapped model may be collective), padded with ignored ones.
    for start in range(0, len(sequences), stride):
        first = start + accelerator.process_index * batch_size
        indices = [i if i < len(sequences) else -1 for i in range(first, first + batch_size)]
        if accelerator.num_processes == 1:
            indices = [i for i in indices if i >= 0]
        batch = sequences.batch(indices, accelerator.device)
        nats += summed_nats(model, batch, loss_chunk)
        targets += num_targets(batch)
    model.train(was_training)
    return float(_sum(accelerator, nats)) / max(int(_sum(accelerator, targets)), 1)


def _sum(accelerator: Accelerator, value: Tensor) -> Tensor:
    reduced: Tensor = accelerator.reduce(value, "sum")
    return reduced


class Stop:
    """Reasons to stop before the last step; all ranks agree on them between two steps.

    SIGTERM and SIGINT, a time that has passed, and a disk that took no metrics.

    Args:
        deadline: on the clock of `time.monotonic`, in seconds.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline, self.code = deadline, 0
        self.error: OSError | None = None

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Catch both signals inside the block; the handlers before it come back at its end."""
        before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        self.code = 128 + number

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any rank has a reason to stop; a collective call. `code` is then the exit code, equal on all ranks.

        Raises:
            StorageError: some rank's disk took no metrics; on all ranks.
        """
        code = self.code or (TIME_IS_UP if time.monotonic() >= self.deadline else 0)
        own = torch.tensor([0 if self.error is None else 1, code], device=accelerator.device)
        failed, self.code = accelerator.gather(own).view(-1, 2).amax(0).tolist()
        if failed:
            raise StorageError(f"cannot write metrics.jsonl: {self.error or 'on the main process'}")
        return self.code > 0
