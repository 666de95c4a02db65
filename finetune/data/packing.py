"""Encoded conversations -> batches, padded or packed; neither attention nor a target crosses from one to the next."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from finetune.config.errors import InputError
from finetune.data.tokenize_chat import Encoded
from finetune.models.build import logits_of
from finetune.models.weights import first_line
from finetune.training.loss import IGNORED, Batch
from finetune.training.train_step import Sequences

TRIAL = 8  # tokens of each conversation by which isolation is tried
# How much further than apart the logits may move in one row, since both are the largest of random roundings; and by how
# many standard deviations where they do not move apart: a few roundings of fp32.
LEAK, ROUNDING = 4.0, 1e-5


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put conversations into rows of at most `capacity` tokens, longest first, each where the least space remains.

    Args:
        lengths: tokens of each conversation, each 1 to `capacity`.
        capacity: tokens of a row.

    Returns:
        Rows of indices into `lengths`, every index once; a function of the arguments alone.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []  # ascending, without repeats: space left in some row
    with_space: defaultdict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(spaces, lengths[i])
        if place == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del spaces[place]
        rows[row].append(i)
        left = space - lengths[i]
        if not with_space[left]:
            insort(spaces, left)
        with_space[left].append(row)
    return rows


def collate(rows: Sequence[Sequence[Encoded]], device: torch.device, pad_id: int = 0) -> Batch:
    """Make the model's arguments, with `targets`, from rows of conversations.

    Args:
        rows: each a sequence of conversations that stand one behind the other.
        device: where to put the tensors.
        pad_id: token id behind shorter rows; no target and no conversation sees it.

    Returns:
        `input_ids` and `targets` [rows, longest] int64; `targets[r, t]` is the token that position t predicts, or -100.
        Where a row holds several conversations also `position_ids`, which restart with each. There is no attention
        mask: causal attention sees no padding, and transformers isolates packed conversations only without a mask.
    """
    shape = (len(rows), max(sum(len(encoded) for encoded in row) for row in rows))
    input_ids, targets = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
    position_ids = np.zeros(shape, np.int64)
    for r, row in enumerate(rows):
        start = 0
        for encoded in row:
            end = start + len(encoded)
            input_ids[r, start:end] = encoded.input_ids
            position_ids[r, start:end] = np.arange(len(encoded))
            targets[r, start : end - 1] = np.where(encoded.targets[1:], encoded.input_ids[1:], IGNORED)
            start = end
        position_ids[r, start:] = np.arange(shape[1] - start)
    arrays = {"input_ids": input_ids, "targets": targets}
    if any(len(row) > 1 for row in rows):
        arrays["position_ids"] = position_ids
    return {key: torch.from_numpy(array).to(device) for key, array in arrays.items()}


class Rows(Sequences):
    """Encoded conversations as rows of batches. What is packed into a row stays together, in every epoch.

    Args:
        encoded: conversations, each at most `max_length` long, at least one.
        max_length: tokens of a packed row.
        packing: put several conversations into a row; else each has its own.
        seed: seed of the permutations.
        pad_id: token id of padding.
    """

    def __init__(
        self, encoded: Sequence[Encoded], *, max_length: int, packing: bool, seed: int = 0, pad_id: int = 0
    ) -> None:
        super().__init__(seed)
        self.encoded, self.pad_id = encoded, pad_id
        lengths = [len(one) for one in encoded]
        self.rows = pack(lengths, max_length) if packing else [[i] for i in range(len(encoded))]
        # The first token of a conversation is predicted by none.
        self._targets = [sum(int(encoded[i].targets[1:].sum()) for i in row) for row in self.rows]
        self._tokens = [sum(lengths[i] for i in row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_targets(self) -> int:
        """Targets of all rows: what an evaluation divides by."""
        return sum(self._targets)

    def count_targets(self, index: int) -> int:
        """Return the number of targets of a row, 0 for index -1."""
        return self._targets[index] if index >= 0 else 0

    def count_tokens(self, index: int) -> int:
        """Return the number of tokens of a row's conversations, prompts included, 0 for index -1."""
        return self._tokens[index] if index >= 0 else 0

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """Return rows as `collate` makes them; index -1 gives a row without targets."""
        chosen = [[self.encoded[i] for i in self.rows[index]] if index >= 0 else [self._nothing()] for index in indices]
        return collate(chosen, device, self.pad_id)

    def _nothing(self) -> Encoded:
        return Encoded(np.full(1, self.pad_id, np.int32), np.zeros(1, np.bool_), "padding")


@torch.no_grad()
def check_isolation(model: nn.Module, num_rows: int = 1) -> None:
    """Check that this model keeps conversations that are packed into one row apart.

    The first of two conversations is changed. The change of the second one's logits is measured twice: with both in one
    row, and with each in a row of its own.

    In rows of their own the conversations are apart. The logits then move only by what depends on the whole batch, such
    as the rounding of products whose sizes follow from how tokens are routed to experts. Most models move by exactly 0
    in both.

    Args:
        model: causal language model, wrapped or not; its mode is left as it was.
        num_rows: rows of a micro-batch (flash attention isolates only within a single one).

    Raises:
        InputError: the logits moved further in one row, or the model does not take packed rows.
    """
    was_training = model.training
    model.eval()
    num_rows = min(num_rows, 2)
    try:
        packed, apart = (_second_moves(model, num_rows, together) for together in (True, False))
    except Exception as error:
        raise InputError(
            "--packing", f"{type(model).__name__} does not take packed rows: {first_line(error)}; use --no-packing"
        ) from None
    finally:
        model.train(was_training)
    if not packed <= max(LEAK * apart, ROUNDING):
        raise InputError(
            "--packing",
            f"{type(model).__name__} lets a packed conversation see the one before it (with {num_rows} row(s) in a "
            "batch); use --no-packing, --batch-size 1 with flash attention, or attention 'sdpa'",
        )


def _second_moves(model: nn.Module, num_rows: int, together: bool) -> float:
    """Measure how far the second conversation's logits move when the first of two conversations is changed.

    The largest change is returned, in standard deviations of the logits.

    The unit is the standard deviation of the logits.
    """
    device = next(model.parameters()).device
    logits = []
    for first in (1, 2):
        pair = [Encoded(np.full(TRIAL, i, np.int32), np.zeros(TRIAL, np.bool_), "trial") for i in (first, 3)]
        batch = collate([pair] * num_rows if together else [[one] for one in pair] * num_rows, device)
        position_ids = batch.get("position_ids", torch.arange(TRIAL, device=device).expand(2 * num_rows, TRIAL))
        found = logits_of(model, input_ids=batch["input_ids"], position_ids=position_ids)
        logits.append(found[:, TRIAL:] if together else found[1::2])
    change = (logits[0] - logits[1]).abs().max() / logits[0].std().clamp_min(torch.finfo(torch.float32).tiny)
    return float(change)
