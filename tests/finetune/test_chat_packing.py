"""Packed and padded batches against the same conversations one by one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune.config.errors import InputError
from finetune.data.packing import Rows, check_isolation, collate, pack
from finetune.data.tokenize_chat import Encoded
from finetune.training.loss import IGNORED, summed_nats
from finetune.training.train_step import accumulate_gradients, num_targets

CPU = torch.device("cpu")
LENGTHS = (7, 12, 5, 9, 2, 6, 11, 8)


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def conversations(lengths=LENGTHS, vocab=64, seed=0):
    """Random ids; about half of the tokens are targets, the last always, the first never."""
    rng = np.random.default_rng(seed)
    found = []
    for i, length in enumerate(lengths):
        targets = rng.random(length) < 0.5
        targets[0], targets[-1] = False, True
        found.append(Encoded(rng.integers(3, vocab, length).astype(np.int32), targets, f"row {i + 1}"))
    return found


def tiny_llama(attention="sdpa", checkpointing=False, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # attention that matters
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    return model


def logits_and_gradients(model, batches, more=None):
    """([logits of each batch], [gradients of the summed cross-entropy of all])."""
    logits = []
    handle = model.register_forward_hook(lambda _m, _a, output: logits.append(output.logits.detach()))
    model.zero_grad()
    for batch in batches:
        summed_nats(model, {**batch, **(more or {})}).backward()
    handle.remove()
    return logits, [p.grad.clone() for p in model.parameters()]


def test_rows_hold_every_conversation_once_and_are_nearly_full():
    lengths = np.random.default_rng(0).integers(1, 100, 500).tolist()
    rows = pack(lengths, 128)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 128 for row in rows)
    assert len(rows) <= 1.03 * -(-sum(lengths) // 128)  # best fit decreasing wastes little on small pieces
    assert rows == pack(lengths, 128)
    assert pack([4, 4, 2, 2, 3], 6) == [[0, 3], [1, 2], [4]]


def test_targets_are_the_next_token_and_never_cross_a_border():
    """By hand: the last token of a conversation predicts nothing, though the next one's first token follows it."""
    one = Encoded(np.array([5, 6, 7], np.int32), np.array([False, True, True]), "")
    two = Encoded(np.array([8, 9], np.int32), np.array([True, True]), "")  # a first token cannot be predicted
    batch = collate([[one, two], [two]], CPU, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [8, 9, 9, 9, 9]]
    assert batch["targets"].tolist() == [[6, 7, IGNORED, 9, IGNORED], [9] + [IGNORED] * 4]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert set(batch) == {"input_ids", "targets", "position_ids"}
    assert set(collate([[one], [two]], CPU)) == {"input_ids", "targets"}
    assert int(num_targets(batch)) == 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", [True, False])
def test_batched_logits_and_gradients_equal_the_separate_ones(packing, attention, checkpointing):
    model = tiny_llama(attention, checkpointing)
    examples = conversations()
    rows = [list(row) for row in (pack(LENGTHS, 20) if packing else [[i] for i in range(len(LENGTHS))])]
    assert any(len(row) > 1 for row in rows) == packing
    separate, gradients = logits_and_gradients(model, [collate([[e]], CPU) for e in examples])
    batch = collate([[examples[i] for i in row] for row in rows], CPU)
    (together,), batched_gradients = logits_and_gradients(model, [batch])
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            torch.testing.assert_close(together[r, start : start + LENGTHS[i]], separate[i][0], rtol=1e-5, atol=1e-5)
            start += LENGTHS[i]
    for got, expected in zip(batched_gradients, gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    if packing:  # the comparison notices what it is there for: a mask of ones switches isolation off
        ones = {"attention_mask": torch.ones_like(batch["input_ids"])}
        (crossed,), crossed_gradients = logits_and_gradients(model, [batch], ones)
        second = LENGTHS[rows[0][0]]
        assert (crossed - together)[0, second:].abs().max() > 0.1
        change = sum(float((a - b).norm()) for a, b in zip(crossed_gradients, gradients, strict=True))
        assert change > 0.05 * sum(float(g.norm()) for g in gradients)


def micro_batched(packing, size, num):
    model = tiny_llama()
    examples = conversations()
    rows = Rows(examples, max_length=20, packing=packing)
    assert len(rows) == size * num
    batches = [rows.batch(range(i * size, (i + 1) * size), CPU) for i in range(num)]
    targets = sum(int(num_targets(batch)) for batch in batches)
    assert targets == sum(map(rows.count_targets, range(len(rows))))
    nats = accumulate_gradients(Accelerator(cpu=True), model, batches, targets)
    return float(nats) / targets, [p.grad for p in model.parameters()]


def test_gradients_do_not_depend_on_the_micro_batches():
    """8x1, 2x4, 4x2 and 1x8 give the mean over all targets, which a mean of means does not."""
    loss, gradients = micro_batched(packing=False, size=8, num=1)
    for size, num in ((2, 4), (4, 2), (1, 8)):
        other_loss, others = micro_batched(packing=False, size=size, num=num)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for got, expected in zip(others, gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    rows = Rows(conversations(), max_length=20, packing=True)
    packed_loss, packed = micro_batched(packing=True, size=len(rows), num=1)
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    for got, expected in zip(packed, gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    model = tiny_llama()
    for example in conversations():
        batch = collate([[example]], CPU)
        (summed_nats(model, batch) / num_targets(batch) / len(LENGTHS)).backward()
    mean_of_means = torch.cat([p.grad.flatten() for p in model.parameters()])
    right = torch.cat([g.flatten() for g in gradients])
    assert torch.nn.functional.cosine_similarity(mean_of_means, right, dim=0) < 0.99


@pytest.mark.parametrize("packing", [True, False])
def test_rows_come_shuffled_by_seed_and_count_their_targets(packing):
    examples = conversations()
    rows = Rows(examples, max_length=20, packing=packing, seed=3, pad_id=1)
    n = len(rows)
    epochs = [[rows.shuffled(position) for position in range(e * n, (e + 1) * n)] for e in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = Rows(examples, max_length=20, packing=packing, seed=3)
    assert [again.shuffled(position) for position in range(2 * n, 3 * n)] == epochs[2]
    batch = rows.batch([*range(n), -1], CPU)
    assert int(num_targets(batch)) == rows.num_targets == sum(int(e.targets.sum()) for e in examples)
    assert (batch["targets"][-1] == IGNORED).all()
    assert (batch["input_ids"][-1] == 1).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_isolates_passes_and_keeps_its_mode(attention):
    model = tiny_llama(attention)
    check_isolation(model, num_rows=4)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    check_isolation(model.eval())
    assert not model.training


class Forgetful(nn.Module):
    """A model that drops what isolates: it makes a mask of ones, or knows nothing of position ids."""

    def __init__(self, kind):
        super().__init__()
        self.model, self.kind = tiny_llama(), kind

    def forward(self, input_ids, position_ids, **more):
        if self.kind == "mask":
            more["attention_mask"] = torch.ones_like(input_ids)
        if self.kind == "cumulative":
            hidden = self.model.get_input_embeddings()(input_ids).cumsum(1)
            return SimpleNamespace(logits=self.model.get_output_embeddings()(hidden))
        if self.kind == "one row" and len(input_ids) > 1:
            position_ids = None
        output = self.model(input_ids=input_ids, position_ids=position_ids, **more)
        if self.kind == "carries over":  # as a short convolution does: one token sees a little of the one before it
            hidden = self.model.get_input_embeddings()(input_ids).roll(1, 1)
            output.logits = output.logits + 2e-3 * self.model.get_output_embeddings()(hidden)
        if self.kind == "rounds by batch":  # as grouped products do, whose sizes follow from all tokens
            spread = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(int(input_ids.sum())))
            output.logits = output.logits * (1 + 1e-2 * spread)
        return output


def test_a_model_whose_rounding_depends_on_the_batch_passes():
    """Its logits move as much where conversations have rows of their own."""
    check_isolation(Forgetful("rounds by batch"), num_rows=2)


def test_a_model_that_takes_no_packed_rows_is_refused_in_one_sentence():
    model = tiny_llama()
    model.forward = lambda input_ids: input_ids
    with pytest.raises(InputError, match=r"--packing: LlamaForCausalLM does not take packed rows: .*--no-packing"):
        check_isolation(model)
    assert model.training


@pytest.mark.parametrize(("kind", "num_rows"), [("mask", 1), ("cumulative", 1), ("carries over", 1), ("one row", 2)])
def test_a_model_that_does_not_isolate_is_refused(kind, num_rows):
    with pytest.raises(InputError, match="--packing: Forgetful lets a packed conversation see the one before it"):
        check_isolation(Forgetful(kind), num_rows)
    if kind == "one row":
        check_isolation(Forgetful(kind), 1)
