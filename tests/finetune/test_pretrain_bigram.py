"""The interpolated bigram against counting by hand."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from finetune.data.bigram import bigram_loss


def oracle(train, validation, vocab_size, weight):
    """Nats per token by dictionaries and the formula."""
    pairs, firsts, singles = Counter(pairwise(train)), Counter(train[:-1]), Counter(train)
    nats = 0.0
    for a, b in pairwise(validation):
        unigram = (singles[b] + 1) / (len(train) + vocab_size)
        bigram = pairs[a, b] / firsts[a] if firsts[a] else None
        nats -= math.log(unigram if bigram is None else weight * bigram + (1 - weight) * unigram)
    return nats / (len(validation) - 1)


def markov_tokens(num, vocab_size, seed):
    """Tokens of a Markov chain in which the last id is never followed, and rare."""
    rng = np.random.default_rng(seed)
    chain = rng.dirichlet(np.full(vocab_size - 1, 0.2), size=vocab_size)
    tokens = [0]
    while len(tokens) < num:
        tokens.append(int(rng.choice(vocab_size - 1, p=chain[tokens[-1]])))
    return tokens


def test_loss_equals_the_formula_at_the_fitted_weight():
    train, validation = markov_tokens(3000, 12, 0), [*markov_tokens(400, 12, 1), 11, 3, 11]
    loss, weight = bigram_loss(np.array(train, np.uint16), np.array(validation, np.uint16), 12)
    assert loss == pytest.approx(oracle(train, validation, 12, weight), rel=1e-12)


def test_weight_is_the_best_for_the_held_out_training_text():
    train = markov_tokens(2000, 12, 3)
    _, weight = bigram_loss(np.array(train, np.uint16), np.array(train[:50], np.uint16), 12)
    cut = 1800
    at = {w: oracle(train[:cut], train[cut - 1 :], 12, w) for w in (weight - 0.01, weight, weight + 0.01)}
    assert min(at, key=at.get) == weight


def test_weight_does_not_look_at_the_validation_text():
    train = np.array(markov_tokens(2000, 12, 4), np.uint16)
    weights = {bigram_loss(train, np.array(v, np.uint16), 12)[1] for v in ([1, 2, 3], [5, 5, 5, 5])}
    assert len(weights) == 1


def test_a_text_without_repetition_falls_back_to_the_smoothed_unigram():
    loss, _ = bigram_loss(np.arange(100, dtype=np.uint16), np.array([99, 7], np.uint16), 128)
    assert loss == pytest.approx(-math.log(2 / 228), rel=1e-12)  # 99 is never followed by anything


def test_a_text_that_the_bigram_predicts_perfectly_still_gives_a_finite_loss():
    train = np.array([0, 1, 2, 3] * 100, np.uint16)
    loss, weight = bigram_loss(train, np.array([0, 1, 3, 3, 2], np.uint16), 4)
    assert 0.9 < weight < 1
    assert np.isfinite(loss)
