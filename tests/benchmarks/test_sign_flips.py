"""The simulated formats of AdaMuon's state, and what is counted of them."""

import math

import pytest
import torch

from benchmarks.robustness.sign_flips import Watched, column_of, signs
from benchmarks.robustness.sign_formats import FORMATS, SimulatedFormat, kept, kept_square
from benchmarks.robustness.sign_models import TrainedMatrix

ROWS = torch.tensor([[1.0, -0.3, 0.003, -1e-4], [0.0, 0.0, 0.0, 0.0], [-2.0, 1.0, 0.0, 0.5]])
# Code steps of a block with the largest magnitude 1, in its lower half, as the docstring of the module has them.
LEVELS = {
    "linear": [i / 127 for i in range(-127, 128)],
    "linear9": [i / 255 for i in range(-255, 256)],
    "square": [math.copysign((i / 127) ** 2, i) for i in range(-127, 128)],
    "half": [i / 255 for i in range(-255, 256, 2)],
    "linear+quarter": [i / 127 for i in range(-127, 128) if i] + [0.25 / 127, -0.25 / 127],
}


@pytest.mark.parametrize("codebook", LEVELS)
def test_formats_read_levels_of_the_block(codebook):
    values = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    found = kept(values, SimulatedFormat(codebook, 4))
    for first in (0, 4, 8):
        block, read = values[:, first : first + 4].double(), found[:, first : first + 4].double()
        scale = block.abs().amax(1, keepdim=True)
        distance = (read.unsqueeze(2) / scale.unsqueeze(2) - torch.tensor(LEVELS[codebook]).double()).abs().amin(2)
        assert distance.max() < 1e-6
        step = 4 / 127 if codebook == "square" else 2 / 127
        assert ((read - block).abs() <= scale * step / 2 * 1.001).all()


def test_signs_that_a_bit_keeps():
    linear, bit, quarter, half = (
        kept(ROWS, SimulatedFormat(name, 256)) for name in ("linear", "linear+sign", "linear+quarter", "half")
    )
    assert linear[0].sign().tolist() == [1, -1, 0, 0]
    assert bit[0].sign().tolist() == quarter[0].sign().tolist() == half[0].sign().tolist() == [1, -1, 1, -1]
    assert torch.equal(bit[0, 2:] + 0.25, torch.tensor([0.25, 0.25]))  # any gradient outweighs it
    for found in (linear, bit, quarter, half):
        assert not found[1].any()
    assert bit[2, 2] == quarter[2, 2] == 0


def test_bytes_of_formats():
    sizes = {form.name: form.bytes_per_param(2048) for form in FORMATS}
    assert sizes["linear 2048"] == 1 + 4 / 2048
    assert sizes["dynamic 256"] == sizes["square 256"] == 1 + 8 * 4 / 2048
    assert sizes["linear+sign 2048"] == sizes["linear9 2048"] == 1.125 + 4 / 2048
    assert sizes["bf16"] == 2


def test_second_moments_keep_a_code_above_zero():
    V = torch.tensor([[1.0, 1e-12, 0.0, 0.25], [0.0, 0.0, 0.0, 0.0]])
    root = kept_square(V, 4).sqrt()
    assert torch.allclose(root[0], torch.tensor([1.0, 1 / 255, 0.0, 128 / 255]))
    assert torch.allclose(kept_square(V, 4, "plain")[0], torch.tensor([1.0, 1 / 255, 0.0, 64 / 255]))
    assert not root[1].any()


def test_a_sign_that_linear_codes_lose():
    """Two gradients, the second zero: m is .95 * .05 * (1, .001), whose second code is 0."""
    param = torch.nn.Parameter(torch.zeros(1, 2))
    watched = Watched(TrainedMatrix("w", param, (1, 1, 2), "q", True))
    param.grad = torch.tensor([[1.0, 0.001]])
    watched.step(False, False)
    param.grad = torch.zeros(1, 2)
    values = watched.step(False, True)
    lost = {form: found["lost"] for form, found in values.items() if "lost" in found}
    assert {form for form, share in lost.items() if share} == {"linear 2", "linear9 2"}
    assert lost["linear 2"] == 0.5
    assert not any(found["flips"] for found in values.values() if "flips" in found)


def test_flips_and_lost_signs_are_apart():
    found, expected = torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.tensor([2.0, 2.0, 2.0, 0.0])
    assert signs(found, expected) == {"flips": 0.25, "lost": 0.25}


def test_long_blocks_are_those_of_the_row():
    record = {"cols": 256, "kind": "q", "values": {"linear 256": [0.1, *[None] * 7], "step before": [0.2, *[None] * 7]}}
    assert column_of([record], "linear 2048", "flips") == [0.1]
    assert column_of([record], "step before", "flips", kind="q") == [0.2]
    assert column_of([record], "linear 256", "flips", kind="k") == []
