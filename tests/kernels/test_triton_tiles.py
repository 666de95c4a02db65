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
def offsets_kernel(offsets, rows, cols, col_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    _, block, row, _ = triton_tiles.tile_rows(rows, cols, ROWS, BLOCK)
    places = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(offsets + places, row * cols + (block * BLOCK + tl.arange(0, BLOCK)[None, :]) * col_stride)


def test_offsets_beyond_two_to_the_31_are_computed_in_64_bits(device):
    offsets = torch.empty(256, 16, dtype=torch.int64, device=device)
    offsets_kernel[(1,)](offsets, 256, 2**30 + 16, 2**28, ROWS=256, BLOCK=16)
    expected = torch.arange(256)[:, None] * (2**30 + 16) + torch.arange(16) * 2**28
    assert int(expected.max()) > 2**37
    assert torch.equal(offsets.cpu(), expected)


class Launches:
    """Stands for a kernel and remembers how it was launched."""

    def __init__(self):
        self.grids, self.constants = [], []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **constants: self.constants.append(constants)  # noqa: ARG005


@pytest.mark.parametrize(("count", "rows", "cols"), [(70_000, 16, 64), (1, 2**31 + 8, 4), (300, 2**18, 5000)])
def test_the_grid_has_one_axis_whatever_the_batch(count, rows, cols):
    launches = Launches()
    tiles = triton_tiles.tiling((rows, cols), 2048)
    triton_tiles.launch(launches, torch.empty(1, rows, cols, device="meta"), count, tiles)
    ((programs,),) = launches.grids
    assert programs == count * -(-rows // tiles.ROWS) * num_blocks(cols, tiles.BLOCK) < 2**31


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_wide_loads_are_promised_only_of_aligned_matrices(triton_kernels, monkeypatch, offset):
    """Rows of 32 codes: 16 bytes apart; `offset` elements of bf16 into a storage."""
    launches = Launches()
    monkeypatch.setattr("muon8bit_kernels.triton.momentum.stats_kernel", launches)
    monkeypatch.setattr("muon8bit_kernels.triton.update._update_kernel", launches)
    grads = torch.zeros(4 * 32 + offset, dtype=torch.bfloat16)[offset:].view(1, 4, 32)
    even = torch.zeros(1, 4, 32, dtype=torch.bfloat16)
    assert even.data_ptr() % 16 == 0
    codes, scales = torch.zeros(2, 4, 32, dtype=torch.int8), torch.zeros(2, 4, 1)
    options = {"codebook": "linear", "block_size": 64, "beta": 0.9, "nesterov": True}
    triton_kernels.momentum_stats([codes], [scales], [even, grads], **options)
    triton_kernels.update_params([even, grads], torch.zeros(2, 4, 32), decay=1.0, scale=1.0)
    assert [constants["ALIGNED"] for constants in launches.constants] == [offset % 8 == 0] * 2
