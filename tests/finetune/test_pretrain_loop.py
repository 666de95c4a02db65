"""The step's loss and gradient do not depend on how the step is cut up; the data order on nothing but the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.training.train_step import (
    Blocks,
    accumulate_gradients,
    clip_gradients,
    evaluate,
    num_targets,
    step_batches,
    step_targets,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def make_batch(num, ignored_after=None):
    """`num` rows of 12 tokens; row i has targets only up to `ignored_after[i]`."""
    generator = torch.Generator().manual_seed(num)
    rows = torch.randint(0, 40, (num, 13), generator=generator)
    targets = rows[:, 1:].clone()
    for row, end in zip(targets, ignored_after or [12] * num, strict=True):
        row[end:] = -100
    return {"input_ids": rows[:, :-1], "targets": targets}


def cut(batch, size):
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, len(batch["targets"]), size)]


def gradients(model, batches):
    model.zero_grad()
    targets = sum(int(num_targets(batch)) for batch in batches)
    nats = accumulate_gradients(Accelerator(), model, batches, targets)
    return float(nats) / targets, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("ends", [None, [12, 1, 3, 12, 2, 2, 1, 0]])
def test_one_batch_of_8_and_4_of_2_have_the_same_loss_and_gradient(model, ends):
    """Also where the numbers of targets differ, for which a mean of means is wrong; torch's mean is the oracle."""
    whole = make_batch(8, ends)
    loss, grad = gradients(model, [whole])
    loss_cut, grad_cut = gradients(model, cut(whole, 2))
    model.zero_grad()
    logits = model(input_ids=whole["input_ids"]).logits
    oracle = cross_entropy(logits.flatten(0, 1), whole["targets"].flatten())
    oracle.backward()
    oracle_grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert loss == pytest.approx(float(oracle.detach()), rel=1e-5)
    assert loss_cut == pytest.approx(loss, rel=1e-5)
    # fp32 sums in another order: relative error well below 1e-5; a mean of means is off by tens of per cent.
    for other in (grad, grad_cut):
        assert float((other - oracle_grad).norm() / oracle_grad.norm()) < 1e-5


def test_evaluation_does_not_depend_on_the_batch_size(model):
    blocks = Blocks(np.random.default_rng(0).integers(0, 40, 12 * 7 + 5).astype(np.uint16), 12)
    assert len(blocks) == 7
    losses = [evaluate(Accelerator(), model, blocks, size) for size in (1, 3, 7)]
    with torch.no_grad():
        rows = torch.from_numpy(blocks.tokens.astype(np.int64))
        inputs, targets = rows[:84].view(7, 12), rows[1:85].view(7, 12)
        oracle = cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
    assert losses == pytest.approx([float(oracle)] * 3, rel=1e-5)


def test_every_epoch_is_another_permutation_of_all_blocks():
    blocks = Blocks(np.zeros(10 * 4 + 1, np.uint16), 4, seed=1)
    epochs = [[blocks.shuffled(10 * e + i) for i in range(10)] for e in range(3)]
    assert [sorted(e) for e in epochs] == [list(range(10))] * 3
    assert len({tuple(e) for e in epochs}) == 3
    again = Blocks(np.zeros(10 * 4 + 1, np.uint16), 4, seed=1)
    assert [again.shuffled(i) for i in (25, 3, 17)] == [epochs[2][5], epochs[0][3], epochs[1][7]]
    other = Blocks(np.zeros(10 * 4 + 1, np.uint16), 4, seed=2)
    assert [other.shuffled(i) for i in range(10)] != epochs[0]


def test_a_block_predicts_the_following_tokens():
    blocks = Blocks(np.arange(30, dtype=np.uint16), 4)
    batch = blocks.batch([2, -1], torch.device("cpu"))
    assert batch["input_ids"][0].tolist() == [8, 9, 10, 11]
    assert batch["targets"].tolist() == [[9, 10, 11, 12], [-100] * 4]


def test_clipping_bounds_the_global_norm_and_names_what_is_not_finite(model):
    gradients(model, [make_batch(2)])
    clip_gradients(model, 0.01)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-4)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=name):
        clip_gradients(model, 0.001).check(Accelerator())
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters() if n != name)


class _Waits(TorchDispatchMode):
    """Counts what copies a value of a tensor to the host, for which a GPU's work would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_a_step_is_queued_without_a_look_at_what_the_device_computes(model, monkeypatch):
    # transformers looks at the positions in every forward.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _positions: None)
    blocks = Blocks(np.random.default_rng(0).integers(0, 40, 12 * 8 + 1).astype(np.uint16), 12)
    accelerator = Accelerator()
    targets = step_targets(blocks, accelerator, 0, 2, 3)
    batches = list(step_batches(blocks, accelerator, 0, 2, 3))
    assert targets == sum(int(num_targets(batch)) for batch in batches) == 72
    with _Waits() as waits:
        accumulate_gradients(accelerator, model, batches, targets)
        norms = clip_gradients(model, 1.0)
    assert waits.num == 0
    with _Waits() as waits:
        norms.check(accelerator)
    assert waits.num == 1
