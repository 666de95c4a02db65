"""Cutting an AdamW state: every element once, in its place, whatever the number of elements of each tensor."""

from __future__ import annotations

import pytest
import torch

from muon8bit.step.adamw_chunks import AdamWChunk


def piece_of(shape, **state):
    param = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    return AdamWChunk(param, -param, {"step": torch.zeros(()), **state}, key=3, first=0, size=param.numel())


@pytest.mark.parametrize("shape", [(9, 4096), (3, 25600), (70001,), (17000,), (20, 70, 50)])
def test_parts_hold_every_element_once_beside_its_state(shape):
    num_elements = torch.Size(shape).numel()
    index = torch.arange(num_elements)
    codes, scales = index.view(shape), torch.arange(-(-num_elements // 256))
    parts = list(piece_of(shape, codes=codes, scales=scales).split(9 * 8192))  # int64: 8.03 bytes an element
    assert len(parts) > 2
    for part in parts:
        assert part.first % 4096 == 0
        assert part.param.tolist() == index[part.first : part.first + part.param.numel()].tolist()
        assert torch.equal(part.grad, -part.param)
        assert torch.equal(part.state["codes"], part.param.long())
        stop = part.first + part.param.numel()
        assert part.state["scales"].tolist() == list(range(part.first // 256, -(-stop // 256)))
        assert part.state_bytes <= 9 * 8192
    assert torch.equal(torch.cat([part.param for part in parts]), index.float())
    assert torch.equal(torch.cat([part.state["scales"] for part in parts]), scales)
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert {part.size for part in parts} == {num_elements}


def test_what_is_small_or_not_in_the_order_of_its_elements_stays_whole():
    small = piece_of((5, 7), exp_avg=torch.zeros(5, 7))
    assert list(small.split(1)) == [small]
    param = torch.zeros(200, 100).T
    turned = AdamWChunk(param, torch.zeros(100, 200), {"exp_avg": torch.zeros(100, 200)}, None, 0, 20000)
    assert list(turned.split(4096)) == [turned]


def test_a_state_with_blocks_that_straddle_the_parts_is_refused():
    with pytest.raises(ValueError, match="state of 80 elements for 8000 cannot be cut at 0"):
        list(piece_of((8000,), scales=torch.zeros(80)).split(10))
