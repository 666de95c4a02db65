"""How matrices are found and cut up by a launch; test_interpreted.py runs this file too."""

from __future__ import annotations

import os

import pytest
import torch
from muon8bit_kernels import num_blocks

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("no GPU: test_interpreted.py runs it under TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton_tiles = pytest.importorskip("muon8bit_kernels.triton.tiles")


@triton.jit
def offsets_kernel(offsets, rows, cols, col_stride, over_one, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    _, block, row, _ = triton_tiles.tile_rows(rows, 1, 1, over_one, over_one, ROWS)
    places = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(offsets + places, row * cols + (block * BLOCK + tl.arange(0, BLOCK)[None, :]) * col_stride)


def test_offsets_beyond_two_to_the_31_are_computed_in_64_bits(device):
    offsets = torch.empty(256, 16, dtype=torch.int64, device=device)
    offsets_kernel[(1,)](offsets, 256, 2**30 + 16, 2**28, triton_tiles.packed_divisor(1), ROWS=256, BLOCK=16)
    expected = torch.arange(256)[:, None] * (2**30 + 16) + torch.arange(16) * 2**28
    assert int(expected.max()) > 2**37
    assert torch.equal(offsets.cpu(), expected)


@triton.jit
def divided_kernel(numbers, quotients, divisor, NUM: tl.constexpr):
    place = tl.arange(0, NUM)
    tl.store(quotients + place, triton_tiles.divided(tl.load(numbers + place), divisor))


class Launches:
    """Stands for a kernel and remembers how it was launched."""

    def __init__(self):
        self.grids, self.args, self.constants = [], [], []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.launch

    def launch(self, *args, **constants):
        self.args.append(args)
        self.constants.append(constants)


@pytest.mark.parametrize(("count", "rows", "cols"), [(70_000, 16, 64), (1, 2**31 + 8, 4), (300, 2**18, 5000)])
def test_the_grid_has_one_axis_whatever_the_batch(count, rows, cols):
    launches = Launches()
    tiles = triton_tiles.tiling((rows, cols), 2048)
    triton_tiles.launch(launches, torch.empty(1, rows, cols, device="meta"), count, tiles)
    ((programs,),) = launches.grids
    assert programs == count * -(-rows // tiles.ROWS) * num_blocks(cols, tiles.BLOCK) < 2**31


def test_the_grid_is_divided_up_as_integers_are(device):
    """Every divisor that could round wrongly: powers of two, their neighbours, and random ones of every size."""
    generator = torch.Generator().manual_seed(0)
    near = {max(1, min(2**power + step, 2**31 - 1)) for power in range(32) for step in (-1, 0, 1)}
    sizes = torch.randint(1, 31, (40,), generator=generator)
    divisors = [*near, *(1 + int(torch.randint(0, 2 ** int(size), (), generator=generator)) for size in sizes)]
    for divisor in divisors:
        multiples = torch.randint(0, (2**31 - 1) // divisor + 1, (85,), generator=generator) * divisor
        numbers = torch.cat([multiples, multiples - 1, multiples + divisor - 1, torch.tensor([2**31 - 1])])
        numbers = numbers.clamp(0, 2**31 - 1)
        quotients = torch.empty(256, dtype=torch.int32, device=device)
        packed = triton_tiles.packed_divisor(divisor)
        assert -(2**63) <= packed < -(2**31)  # int64 whatever the divisor
        divided_kernel[(1,)](numbers.int().to(device), quotients, packed, NUM=256)
        assert torch.equal(quotients.cpu(), (numbers // divisor).int()), divisor


@pytest.mark.parametrize(("offset", "cols"), [(0, 32), (1, 32), (8, 32), (1, 40), (0, 40), (1, 33)])
def test_wide_loads_are_promised_of_aligned_matrices_and_of_no_others(triton_kernels, monkeypatch, offset, cols):
    """The second of three, `offset` elements of bf16 into a storage, goes by itself where it is not aligned."""
    launches = Launches()
    monkeypatch.setattr("muon8bit_kernels.triton.momentum.stats_kernel", launches)
    monkeypatch.setattr("muon8bit_kernels.triton.update._update_kernel", launches)
    odd = torch.zeros(4 * cols + offset, dtype=torch.bfloat16)[offset:].view(1, 4, cols)
    even = [torch.zeros(1, 4, cols, dtype=torch.bfloat16) for _ in range(2)]
    assert all(tensor.data_ptr() % 16 == 0 for tensor in even)
    stacks = [even[0], odd, even[1]]
    codes, scales = [torch.zeros(1, 4, cols, dtype=torch.int8) for _ in range(3)], [torch.zeros(1, 4, 1)] * 3
    options = {"codebook": "linear", "block_size": 64, "beta": 0.9, "nesterov": True}
    triton_kernels.momentum_stats(codes, scales, stacks, **options)
    triton_kernels.update_params(stacks, torch.zeros(3, 4, cols), decay=1.0, scale=1.0)
    expected = [[0, 1, 2]] if offset % 8 == 0 or cols % 8 else [[0, 2], [1]]
    assert [args[0][:, -1].tolist() for args in launches.args] == expected * 2
    widest = 16 if cols == 32 else 8  # bytes of codes that begin where a row does
    hints = [(widest, 16, 16), (1, 1, 1)] if len(expected) == 2 else [(widest, 16, 16) if cols % 8 == 0 else (1, 1, 1)]
    stats, update = launches.constants[: len(hints)], launches.constants[len(hints) :]
    assert [(one["CODE_ALIGNMENT"], one["GRAD_ALIGNMENT"]) for one in stats] == [hint[:2] for hint in hints]
    assert [one["ALIGNMENT"] for one in update] == [hint[2] for hint in hints]
    assert {one["EIGHTS"] for one in launches.constants} == {cols == 40}
