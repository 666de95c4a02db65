"""Encoded conversations -> batches, padded or packed, without attention or targets across conversations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from finetune.loop import Batch
from finetune.masks import Encoded


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put conversations into rows of at most `capacity` tokens, best fit, longest first; deterministic.

    Args:
        lengths: tokens of each conversation, each 1 to `capacity`.
        capacity: tokens of a row.

    Returns:
        Rows of indices into `lengths`; every index once.
    """
    raise NotImplementedError


def collate(rows: Sequence[Sequence[Encoded]], device: torch.device, pad_id: int = 0) -> Batch:
    """Rows of conversations -> arguments of the model, with `targets`.

    Args:
        rows: each a sequence of conversations that stand one behind the other; none is empty.
        device: where to put the tensors.
        pad_id: token id behind shorter rows; no target and no conversation sees it.

    Returns:
        `input_ids` and `targets` [rows, longest] int64; `targets[r, t]` is the token that position t predicts, or -100.
        Where a row holds several conversations also `position_ids`, which restart with each. No attention mask:
        transformers isolates packed conversations only without one.
    """
    raise NotImplementedError


class Rows:
    """Encoded conversations as rows of batches; the interface of `finetune.loop.Blocks`.

    The order is a function of (seed, position) alone, epoch after epoch, each a permutation of all rows.

    Args:
        encoded: conversations, each at most `max_length` long.
        max_length: tokens of a packed row.
        packing: put several conversations into a row; else one row each.
        seed: seed of the permutations.
        pad_id: token id of padding.
    """

    def __init__(
        self, encoded: Sequence[Encoded], *, max_length: int, packing: bool, seed: int = 0, pad_id: int = 0
    ) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def num_targets(self) -> int:
        """Targets of all rows: what an evaluation divides by."""
        raise NotImplementedError

    def shuffled(self, position: int) -> int:
        """Index of the row at a position of the endless shuffled sequence."""
        raise NotImplementedError

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """Rows as `collate` gives them; index -1 gives a short row without targets."""
        raise NotImplementedError


def check_isolation(model: nn.Module, num_rows: int = 1) -> None:
    """Find out whether this model keeps packed conversations apart, by running a tiny packed batch twice.

    Args:
        model: causal language model; its mode and gradients are left as they are.
        num_rows: rows per micro-batch (flash attention isolates only with one).

    Raises:
        InputError: a conversation changed the logits of the next one in its row.
    """
    raise NotImplementedError
