"""The loss a few tokens at a time is the loss over all logits, for less memory; a head that is not plain is refused."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config.errors import InputError
from finetune.training.loss import IGNORED, check_head, summed_nats
from finetune.training.train_step import Blocks, evaluate

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make_model(kind="llama", **more):
    torch.manual_seed(0)
    options = {**SIZES, "initializer_range": 0.2, "pad_token_id": 0, **more}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), dtype=torch.float32).train()


def make_batch(rows=2, length=11, vocab=61):
    """Two thirds of the tokens are targets; packed: positions begin anew in the middle."""
    rng = np.random.default_rng(1)
    targets = np.where(rng.random((rows, length)) < 0.66, rng.integers(1, vocab, (rows, length)), IGNORED)
    positions = np.concatenate([np.arange(length // 2), np.arange(length - length // 2)])
    arrays = {"input_ids": rng.integers(1, vocab, (rows, length)), "targets": targets}
    arrays["position_ids"] = np.tile(positions, (rows, 1))
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def loss_and_gradients(model, batch, chunk):
    model.zero_grad()
    loss = summed_nats(model, batch, chunk)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def oracle(model, batch):
    """In float64: numpy's log-softmax of the model's logits, and torch's gradients of its sum."""
    model = model.double()
    arguments = {key: value for key, value in batch.items() if key != "targets"}
    logits, targets = model(**arguments, use_cache=False).logits.detach().numpy(), batch["targets"].numpy()
    wanted = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    nats = np.log(np.exp(logits).sum(-1)) - wanted
    _, gradients = loss_and_gradients(model, batch, 0)
    model.float()
    return nats[targets != IGNORED].sum(), gradients


@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_and_gradients_equal_the_float64_oracle(tied):
    model, batch = make_model(tie_word_embeddings=tied), make_batch()
    check_head(model)
    expected, gradients = oracle(model, batch)
    for chunk in (1, 7, 22, 100, 0):  # 22 tokens
        loss, found = loss_and_gradients(model, batch, chunk)
        assert loss.dtype == torch.float32
        assert float(loss) == pytest.approx(expected, rel=1e-6)
        assert found.keys() == gradients.keys()
        for name, grad in found.items():
            error = (grad - gradients[name]).norm() / gradients[name].norm()
            assert error < 1e-5, (chunk, name)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["lm_head", "q_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["LoRA on the head", "a copy of the head"],
)
def test_chunked_loss_goes_through_an_adapted_head(options):
    model = get_peft_model(make_model(tie_word_embeddings=False), LoraConfig(r=2, init_lora_weights=False, **options))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "modules_to_save" in name:
                param.add_(torch.randn_like(param))
    check_head(model)
    batch = make_batch()
    loss, gradients = loss_and_gradients(model, batch, 0)
    chunked, found = loss_and_gradients(model, batch, 7)
    assert any("lm_head" in name for name in found)
    assert float(chunked) == pytest.approx(float(loss), rel=1e-6)
    for name, grad in gradients.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


def test_a_bf16_heads_gradient_is_summed_in_bf16():
    """Each of 4 sums rounds by half a unit in the last place of 8 bits, beside the rounding of its terms."""
    batch, exact = make_batch(), make_model(tie_word_embeddings=False).bfloat16()
    _, gradients = oracle(exact, batch)
    model = make_model(tie_word_embeddings=False).bfloat16()
    loss, _ = loss_and_gradients(model, batch, 0)
    chunked, found = loss_and_gradients(model, batch, 6)
    assert float(chunked) == pytest.approx(float(loss), rel=1e-6)
    error = (found["lm_head.weight"].double() - gradients["lm_head.weight"]).norm()
    assert error / gradients["lm_head.weight"].norm() < 9 * 2**-9


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_accelerates_forward_and_evaluation_take_chunks(dtype):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="no" if dtype is None else "bf16")
    model, batch = accelerator.prepare(make_model()), make_batch()
    loss, _ = loss_and_gradients(model, batch, 0)
    chunked, found = loss_and_gradients(model, batch, 5)
    # In bf16 the whole logits go through one conversion more; in both the products are bf16's.
    assert float(chunked) == pytest.approx(float(loss), rel=1e-6 if dtype is None else 1e-3)
    assert all(grad.isfinite().all() for grad in found.values())
    blocks = Blocks(np.random.default_rng(0).integers(1, 61, 12 * 7 + 5).astype(np.uint16), 12)
    whole = evaluate(accelerator, model, blocks, 3)
    assert evaluate(accelerator, model, blocks, 3, 10) == pytest.approx(whole, rel=1e-6 if dtype is None else 1e-3)
    assert "forward" not in vars(model.get_output_embeddings())  # generation finds the head as it was


def peak_bytes(chunk):
    """Most bytes of tensors alive at once in a forward and backward pass."""
    model, batch = make_model(vocab_size=2048), make_batch(4, 32, 2048)
    tracker = MemTracker()
    tracker.track_external(model, *batch.values())
    with tracker:
        summed_nats(model, batch, chunk).backward()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def test_memory_falls_by_the_logits_that_do_not_exist_at_once():
    """128 tokens of 2048 logits, at the peak in two or three copies: of 16 tokens an eighth remains."""
    logits = 128 * 2048 * 4
    saved = peak_bytes(None) - peak_bytes(16)
    assert saved > 2 * logits * 7 / 8 - 2048 * 16 * 4  # the head's gradient is added to another one


@pytest.mark.parametrize(
    ("kind", "more", "is_plain"),
    [
        ("qwen2", {}, True),
        ("gpt2", {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}, True),
        ("gemma2", {"final_logit_softcapping": 30.0, "head_dim": 8}, False),
        ("gemma2", {"final_logit_softcapping": None, "head_dim": 8}, True),
        ("granite", {"logits_scaling": 8.0}, False),
        ("granite", {"logits_scaling": 1.0}, True),
        ("cohere", {"logit_scale": 0.0625}, False),
    ],
)
def test_a_model_that_changes_its_heads_logits_is_refused(kind, more, is_plain):
    model = make_model(kind, **more).eval()
    with nullcontext() if is_plain else pytest.raises(InputError, match=r"--loss-chunk: .*ForCausalLM changes"):
        check_head(model)
    if is_plain:
        batch = make_batch()
        del batch["position_ids"]
        assert float(summed_nats(model, batch, 7).detach()) == pytest.approx(
            float(summed_nats(model, batch).detach()), rel=1e-6
        )


def test_a_model_without_a_known_head_is_refused():
    model = make_model()
    model.get_output_embeddings = lambda: None
    with pytest.raises(InputError, match="--loss-chunk: LlamaForCausalLM tells of no head"):
        check_head(model)
