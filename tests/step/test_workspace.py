"""What `step()` allocates at once beyond its state stays within its byte budget, whatever the model's size."""

from __future__ import annotations

import pytest
import torch
from helpers.allocator import peak_bytes
from muon8bit_kernels import reference

from muon8bit import Muon8bit
from muon8bit.step import adamw, adamw8bit
from muon8bit.step.adamw_chunks import AdamWChunk
from muon8bit.step.group_options import AdamWOptions

MIB = 2**20


def optimizer_of(shapes, dtype=torch.float32, budget=None, **group):
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    optimizer = Muon8bit([{"params": params, **group}], workspace_bytes=budget)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()  # the state, and what a process allocates once
    return optimizer


# Of each at least 64 MiB in fp32, so that all at once would break either budget.
CASES = {
    "matrices": ([(64, 4096)] * 64, torch.float32, {}),
    "tall, bf16": ([(4096, 64)] * 64, torch.bfloat16, {"codebook": "dynamic"}),
    "experts": ([(64, 64, 4096)], torch.float32, {}),
    "pieces of rows": ([(32, 128, 4096)], torch.float32, {"split_sizes": (64, 64)}),
    "pieces of columns": ([(32, 64, 8192)], torch.float32, {"split_sizes": (4096, 4096), "split_dim": -1}),
    "adamw": ([(4096, 4096)], torch.bfloat16, {"algorithm": "adamw", "lr": 1e-3}),
}

ADAMUON = {"second_moment": "element", "rescale": "rms", "sign_momentum": True}
FAMILY_CASES = {
    "signs": ([(64, 4096)] * 64, torch.float32, {"sign_momentum": True}),
    "adamuon": ([(24, 64, 4096)], torch.bfloat16, {**ADAMUON, "cautious_weight_decay": True}),
    "adamuon in fp32, rows": ([(2048, 1, 4096)], torch.float32, {**ADAMUON, "bits": 32}),
    "adamuon, pieces": ([(16, 64, 8192)], torch.float32, {**ADAMUON, "split_sizes": (4096, 4096), "split_dim": -1}),
}


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_second_moments_and_signs_keep_to_the_budget(name):
    shapes, dtype, group = FAMILY_CASES[name]
    peak, left = peak_bytes(optimizer_of(shapes, dtype, 32 * MIB, **group).step)
    assert 8 * MIB < peak <= 32 * MIB
    assert left == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [32 * MIB, 48 * MIB])
def test_a_step_keeps_to_its_budget_and_frees_all(name, budget):
    shapes, dtype, group = CASES[name]
    optimizer = optimizer_of(shapes, dtype, budget, **group)
    peak, left = peak_bytes(optimizer.step)
    assert budget / 4 < peak <= budget
    assert left == 0


@pytest.mark.parametrize("bits", [32, 8])
def test_rounding_adamws_weights_takes_no_more_than_its_copies(bits, monkeypatch):
    """By hand, for each element of a piece: parameter and gradient in fp32, and in 8 bits, with the verdict not waited
    for, the codes. Rounding and bitsandbytes' update, replaced here, allocate nothing else in their kernels."""
    monkeypatch.setattr(reference, "round_stochastic", lambda values, **_: values.bfloat16())
    monkeypatch.setattr(adamw8bit, "_update_", lambda *_: None)
    budget = 32 * MIB
    size = adamw8bit.chunk_size("cpu", budget) if bits == 8 else budget // 16
    param, grad = torch.randn(2, 3 * size).bfloat16()
    layout = adamw.layout(param.shape, bits)
    state = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in layout.items()}
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
    options = AdamWOptions(None, None, budget, torch.zeros(()) if bits == 8 else None, adamw_bits=bits, **group)
    chunks = [AdamWChunk(param, grad, state, 7, 0, param.numel())]
    adamw.apply(chunks, options)  # what a process allocates once
    peak, left = peak_bytes(lambda: adamw.apply(chunks, options))
    per_element = 4 + 4 + (2 + 8 / adamw8bit.ADAMW8_BLOCK_SIZE if bits == 8 else 0)
    assert per_element * size <= peak <= per_element * size + 1024
    assert left == 0


@pytest.mark.parametrize("value", [0, 32 * MIB - 1, 1e9, True])
def test_a_budget_too_small_to_work_with_is_refused(value):
    with pytest.raises(ValueError, match=f"workspace_bytes must be an int of at least {32 * MIB}, not {value}"):
        Muon8bit([torch.nn.Parameter(torch.zeros(2, 2))], workspace_bytes=value)
