"""The planner's counts against counts by hand."""

import pytest
import torch

from benchmarks.scaling.step_plan import StepPlan, flop_ceiling, plan
from muon8bit.orthogonalize import RATES, Rates, flops, resolve_coefficients

JORDAN = resolve_coefficients("jordan", 5)

# bf16 gradients and parameters, blocks of 2048, half-precision X and O unless said. Per element: stats 1 + 2; apply
# 1 + 2 read, 1 + 2 written; update 2 + 2 read, 2 written. Per block: stats 4 + 4; apply 4 + 4. Per matrix: apply 4.
HAND_COUNTS = {
    # 1048576 elements, 1024 blocks; 30 * 1024^3 operations
    (1024, 1024): StepPlan(32212254720, 32212254720, 3153920, 6299652, 6291456),
    # 4194304 elements, 2 * 1024 blocks; Gram with a restart: (8 * 4 + 28) * 1024^3, standard (20 * 4 + 10) * 1024^3
    (1024, 4096): StepPlan(64424509440, 96636764160, 12599296, 25182212, 25165824),
    # 4194304 elements, 4096 blocks
    (4096, 1024): StepPlan(64424509440, 96636764160, 12615680, 25198596, 25165824),
    # 300 * 700 = 210000 elements, 300 blocks; standard, of fewer launches: 20 * 63e6 + 10 * 27e6
    (300, 700): StepPlan(1530000000, 1530000000, 632400, 1262404, 1260000),
    # tiny: no X, no O, and no restart. 32768 elements, 16 blocks; 4 * 16^2 * 2048 + 34 * 16^3, 20 .. + 10 ..
    (16, 2048): StepPlan(2236416, 10526720, 98432, 131204, 131072),
}


@pytest.mark.parametrize("shape", HAND_COUNTS)
def test_plan_matches_a_hand_count(shape):
    assert plan({shape: 1}, JORDAN, "cuda_sm90") == HAND_COUNTS[shape]


def test_plan_of_unquantized_columns_and_fp32():
    """7 columns stay fp32: 4 bytes and no scales. fp32 gradients and parameters, X in fp32 on this CPU."""
    options = {"grad_dtype": torch.float32, "param_dtype": torch.float32}
    counted = plan({(100, 7): 3}, JORDAN, "cpu", **options)
    assert counted.stats_bytes == 3 * (700 * (4 + 4) + 100 * 4)
    assert counted.apply_bytes == 3 * (700 * (4 + 4 + 4 + 4) + 4)
    assert counted.update_bytes == 3 * 700 * (4 + 4 + 4)
    assert counted.num_bytes == 3 * (700 * (8 + 16 + 12) + 404)
    whole = plan({(100, 64): 1}, JORDAN, "cpu", bits=32, **options)
    assert whole.stats_bytes == 6400 * 8 + 400
    assert plan({(100, 130): 1}, JORDAN, "cpu", block_size=64, **options).stats_bytes == 13000 * 5 + 300 * 8


def test_plan_counts_triangles_where_the_symmetric_kernel_runs(monkeypatch):
    rates = Rates(bf16=((0, 8.0),), fp16=((0, 8.0),), symmetric_kind="kernel", symmetric=((0, 1.9),))
    monkeypatch.setitem(RATES, "cuda_sm90", rates)
    counted = plan({(1024, 1024): 2, (1024, 4096): 1}, JORDAN, "cuda_sm90")
    assert counted.flops == 2 * 20 * 1024**3 + (6 * 4 + 14) * 1024**3
    assert counted.torch_flops == 2 * flops("standard", 1024, 1024, 5) + flops("standard", 1024, 4096, 5)


# q and o, k and v, gate, up and down of one layer.
LLAMA = {
    "Llama-3.2-1B": ({(2048, 2048): 2, (512, 2048): 2, (8192, 2048): 2, (2048, 8192): 1}, 2.14),
    "Llama-3.2-3B": ({(3072, 3072): 2, (1024, 3072): 2, (8192, 3072): 2, (3072, 8192): 1}, 1.93),
    "Llama-3.1-8B": ({(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}, 2.07),
}


@pytest.mark.parametrize("name", LLAMA)
def test_ceilings_of_llama_layers_are_the_published_ones(name):
    matrices, ceiling = LLAMA[name]
    assert flop_ceiling(matrices, JORDAN) == pytest.approx(ceiling, abs=0.006)
    assert flop_ceiling({(4096, 4096): 7}, JORDAN) == 1.5


def test_no_ceiling_for_a_schedule_beyond_fp16():
    with pytest.raises(ValueError, match="fp16 cannot hold"):
        flop_ceiling({(64, 64): 1}, resolve_coefficients((60.0, -70.0, 11.0), 3))
