"""The baseline that a trained model must beat: an interpolated bigram model of the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.models.tokens import Tokens

# Training tokens that are counted at most: bounds memory to about 1 GB and time to seconds.
MAX_TOKENS = 2**24
# Share at the end of the training tokens that the interpolation weight is fitted on.
HELD_OUT = 0.1
EM_STEPS = 50


@dataclass(frozen=True)
class Counts:
    """Counts of a token sequence: pairs as sorted keys `first * vocab_size + second`, and how often each occurs."""

    vocab_size: int
    keys: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]
    firsts: npt.NDArray[np.int64]
    unigrams: npt.NDArray[np.int64]

    @classmethod
    def of(cls, tokens: Tokens, vocab_size: int) -> Counts:
        """Count tokens [n] and their n - 1 pairs."""
        ids = tokens.astype(np.int64)
        keys, pairs = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
        firsts = np.bincount(ids[:-1], minlength=vocab_size)
        return cls(vocab_size, keys, pairs, firsts, np.bincount(ids, minlength=vocab_size))

    def probabilities(self, tokens: Tokens) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """Return three arrays [n - 1], an element for each pair of neighbours in `tokens` [n].

        They are p(second | first) by counts (0 where `first` is unseen), the add-one smoothed unigram p(second), and
        whether `first` was seen.
        """
        ids = tokens.astype(np.int64)
        wanted = ids[:-1] * self.vocab_size + ids[1:]
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        found = np.where(self.keys[at] == wanted, self.pairs[at], 0)
        seen = self.firsts[ids[:-1]]
        unigram = (self.unigrams[ids[1:]] + 1) / (self.unigrams.sum() + self.vocab_size)
        return found / np.maximum(seen, 1), unigram, seen > 0


def bigram_loss(train: Tokens, validation: Tokens, vocab_size: int) -> tuple[float, float]:
    """Return the cross-entropy of `weight * bigram + (1 - weight) * unigram`, Jelinek and Mercer's interpolation.

    The weight maximizes the likelihood of the last tenth of the training tokens under the counts of the rest (by
    expectation maximization); the counts are then taken from all of them. After an unseen token the unigram
    stands alone.

    Args:
        train: token ids [n], of which at most `MAX_TOKENS` are counted.
        validation: token ids [m]; all m - 1 successors are predicted.
        vocab_size: number of different ids.

    Returns:
        (nats per token, weight).
    """
    counted = train[:MAX_TOKENS]
    cut = max(2, int(len(counted) * (1 - HELD_OUT)))
    weight = _fit_weight(Counts.of(counted[:cut], vocab_size), counted[cut - 1 :])
    bigram, unigram, seen = Counts.of(counted, vocab_size).probabilities(validation)
    mixed = np.where(seen, weight * bigram + (1 - weight) * unigram, unigram)
    return float(-np.log(mixed).mean()), weight


def _fit_weight(counts: Counts, held_out: Tokens) -> float:
    bigram, unigram, seen = counts.probabilities(held_out)
    bigram, unigram = bigram[seen], unigram[seen]
    weight = 0.5
    for _ in range(EM_STEPS if len(bigram) else 0):
        weight = float(np.mean(weight * bigram / (weight * bigram + (1 - weight) * unigram)))
    return min(weight, 1 - 1e-4)  # a pair that no count foresees must keep some probability
