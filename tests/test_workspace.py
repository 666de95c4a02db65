"""What `step()` allocates at once beyond its state stays within its byte budget, whatever the model's size."""

from __future__ import annotations

import pytest
import torch
from allocator import peak_bytes

from muon8bit import Muon8bit

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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [32 * MIB, 48 * MIB])
def test_a_step_keeps_to_its_budget_and_frees_all(name, budget):
    shapes, dtype, group = CASES[name]
    optimizer = optimizer_of(shapes, dtype, budget, **group)
    peak, left = peak_bytes(optimizer.step)
    assert budget / 4 < peak <= budget
    assert left == 0


@pytest.mark.parametrize("value", [0, 32 * MIB - 1, 1e9, True])
def test_a_budget_too_small_to_work_with_is_refused(value):
    with pytest.raises(ValueError, match=f"workspace_bytes must be an int of at least {32 * MIB}, not {value}"):
        Muon8bit([torch.nn.Parameter(torch.zeros(2, 2))], workspace_bytes=value)
