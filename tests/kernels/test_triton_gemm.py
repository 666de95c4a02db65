"""The symmetric product in Triton against a float64 oracle: interpreted on small tiles, on a GPU as shipped.

The interpreter's bf16 is no number format of any GPU: fp32 and fp16 there, bf16 under the `gpu` marker.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl
from muon8bit_kernels.triton import gemm
from muon8bit_kernels.triton.gemm_tilings import (
    DESCRIBED,
    NUM_PROCESSORS,
    TILINGS,
    UNALIGNED_TILING,
    GemmTiling,
    num_tiles,
    tiling_for,
)

SQUARE, WIDE = GemmTiling(16, 16, 16, 4, 2), GemmTiling(16, 32, 16, 4, 2)
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# (batch, n, k): less than a tile, exactly one, one and a bit, several, tails along k, more than a group of squares
SHAPES = [(1, 1, 1), (1, 5, 3), (3, 16, 16), (1, 17, 40), (3, 33, 16), (1, 48, 50), (1, 100, 32), (1, 150, 16)]


def matrices(batch: int, n: int, k: int, dtype: torch.dtype, device: torch.device, tall: bool, seed: int) -> Any:
    """X [batch, n, k], and polynomials P, Q [batch, n, n] of one symmetric matrix: P Q is symmetric."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((batch, n, k)) / np.sqrt(k)
    S = rng.standard_normal((batch, n, n)) / n
    S = S + S.swapaxes(1, 2)
    P, Q = S + np.eye(n), S @ S - 0.5 * S
    X, P, Q = (torch.from_numpy(matrix).to(device, dtype) for matrix in (X, P, Q))
    return (X.mT.contiguous().mT if tall else X), P, Q


def assert_close_to_float64(C: Tensor, A: Tensor, B: Tensor, alpha: float, D: Tensor | None, rest: Any) -> None:
    """Each element of the lower triangle to half a unit in the last place beside fp32's bound for k + 4 additions of
    its terms (doubled: tensor cores truncate), the upper its mirror image to the bit.
    """
    beta, diagonal = rest
    n, k = A.shape[1:]
    a, b = A.double().cpu().numpy(), B.double().cpu().numpy()
    d = np.zeros((1, n, n)) if D is None else D.double().cpu().numpy()
    expected = alpha * a @ b.swapaxes(1, 2) + beta * d + diagonal * np.eye(n)
    size = abs(alpha) * abs(a) @ abs(b).swapaxes(1, 2) + abs(beta) * abs(d) + abs(diagonal) * np.eye(n)
    bound = HALF_ULP[A.dtype] * abs(expected) * 1.01 + (k + 4) * 2.0**-23 * size
    bound += 2.0**-25 if A.dtype == torch.float16 else 0.0  # half of its smallest subnormal
    assert C.dtype == A.dtype
    assert C.is_contiguous()
    assert torch.equal(C, C.mT)
    assert (np.tril(abs(C.double().cpu().numpy() - expected)) <= np.tril(bound)).all()


def in_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel leaves unwritten is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))


@triton.jit
def _numbering_kernel(rows, cols, side, COUNT: tl.constexpr, GROUP: tl.constexpr):
    index = tl.arange(0, COUNT)
    row, col = gemm._square(tl.minimum(index, side * (side + 1) // 2 - 1), side, GROUP)
    tl.store(rows + index, row)
    tl.store(cols + index, col)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_squares_are_numbered_once_each_and_by_groups_of_rows(device, group):
    for side in range(1, 45):
        count = side * (side + 1) // 2
        rows, cols = torch.empty(2, 1024, dtype=torch.int32, device=device)
        _numbering_kernel[(1,)](rows, cols, side, COUNT=1024, GROUP=group)
        found = list(zip(rows[:count].tolist(), cols[:count].tolist(), strict=True))
        assert sorted(found) == [(row, col) for row in range(side) for col in range(row + 1)]
        assert [row // group for row, _ in found] == sorted(row // group for row, _ in found)


@triton.jit
def _triangle_kernel(indices, rows, cols, COUNT: tl.constexpr):
    place = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    row, col = gemm._triangle(tl.load(indices + place))
    tl.store(rows + place, row)
    tl.store(cols + place, col)


def test_triangle_is_exact_at_every_row_change(device):
    row = np.arange(1, 2**14, dtype=np.int64)  # numbers below 2**27
    index = np.stack([row * (row + 1) // 2 - 1, row * (row + 1) // 2])
    expected_row, expected_col = np.stack([row - 1, row]), np.stack([row - 1, 0 * row])
    index, expected_row, expected_col = (np.pad(x.ravel(), (0, 2)) for x in (index, expected_row, expected_col))
    indices = torch.from_numpy(index.astype(np.int32)).to(device)
    rows, cols = torch.empty_like(indices), torch.empty_like(indices)
    _triangle_kernel[(len(index) // 2048,)](indices, rows, cols, COUNT=2048)
    assert (rows.cpu().numpy() == expected_row).all()
    assert (cols.cpu().numpy() == expected_col).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tiling", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("tall", [False, True], ids=["flat", "tall"])
@pytest.mark.parametrize("with_descriptors", [False, True], ids=["pointers", "descriptors"])
def test_product_of_a_matrix_with_itself_matches_float64(
    device, shape, tiling, tall, with_descriptors, monkeypatch, request
):
    dtype = torch.float16 if shape[1] % 2 else torch.float32
    X, P, _ = matrices(*shape, dtype, device, tall, seed=len(request.node.name))
    in_poisoned_memory(monkeypatch)
    C = gemm._launch(X, X, P, (-2.5, 0.75, 3.0), tiling, with_descriptors)
    assert_close_to_float64(C, X, X, -2.5, P, (0.75, 3.0))


@pytest.mark.parametrize(("batch", "n"), [(1, 7), (3, 16), (1, 40), (2, 48), (1, 150)])
@pytest.mark.parametrize("tiling", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("with_descriptors", [False, True], ids=["pointers", "descriptors"])
def test_product_of_commuting_matrices_matches_float64_and_is_symmetric(
    device, batch, n, tiling, with_descriptors, monkeypatch
):
    _, P, Q = matrices(batch, n, 1, torch.float32, device, False, seed=n)
    in_poisoned_memory(monkeypatch)
    C = gemm._launch(P, Q, None, (1.0, 0.0, 0.0), tiling, with_descriptors)
    assert_close_to_float64(C, P, Q, 1.0, None, (0.0, 0.0))


def test_upper_triangle_is_the_mirror_image_even_where_the_product_is_not_symmetric(device):
    rng = np.random.default_rng(0)
    A, B, D = (torch.from_numpy(rng.standard_normal((1, 50, 50)).astype(np.float32)).to(device) for _ in range(3))
    for tiling in (SQUARE, WIDE):
        C = gemm._launch(A, B, D, (1.0, 0.5, 0.0), tiling, False)
        assert_close_to_float64(C, A, B, 1.0, D, (0.5, 0.0))


def test_fp16_sums_are_held_in_fp32(device):
    """Terms of 2**-12 beside 1.0, which fp16 sums would lose one by one."""
    X = torch.full((1, 16, 1025), 2.0**-6, dtype=torch.float16, device=device)
    X[..., 0] = 1.0
    C = gemm._launch(X, X, None, (1.0, 0.0, 0.0), SQUARE, False)
    assert torch.equal(C, torch.full_like(C, 1.25))


@pytest.mark.parametrize("with_descriptors", [False, True], ids=["pointers", "descriptors"])
def test_views_are_read_in_place(device, with_descriptors):
    """Every other matrix of a stack, columns of wider rows; one operand flat and one tall; addresses off 16 bytes."""
    rng = np.random.default_rng(1)
    stack = torch.from_numpy(rng.standard_normal((6, 20, 64)).astype(np.float32)).to(device)
    for first in (8, 3):
        X = stack[::2, :, first : first + 24]
        C = gemm._launch(X, X.mT.contiguous().mT, None, (1.0, 0.0, 0.0), WIDE, with_descriptors)
        assert_close_to_float64(C, X, X, 1.0, None, (0.0, 0.0))


class Recorder:
    """Stands for the kernel and keeps what it was launched with."""

    def __getitem__(self, grid: tuple[int]) -> Recorder:
        self.grid = grid
        return self

    def __call__(self, *args: Any, **constants: Any) -> None:
        self.args, self.constants = args, constants


@pytest.mark.parametrize(("batch", "n"), [(1, 1), (1, 16), (3, 17), (2, 150)])
def test_programs_are_those_of_one_triangle(batch, n, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(gemm, "_symmetric_product_kernel", recorder)
    X = torch.zeros(batch, n, 8)
    side = (n + 15) // 16
    gemm._launch(X, X, None, (1.0, 0.0, 0.0), SQUARE, False)
    assert recorder.grid == (batch * side * (side + 1) // 2,)
    side = (n + 31) // 32
    gemm._launch(X, X, None, (1.0, 0.0, 0.0), WIDE, False)
    assert recorder.grid == (batch * 2 * (side * (side + 1) // 2),)


@pytest.mark.parametrize(
    ("view", "described"),
    [
        (lambda x: x, True),
        (lambda x: x.mT, True),
        (lambda x: x[:, :, 8:40], True),
        (lambda x: x[:, :, 4:40], False),  # the address
        (lambda x: x.reshape(4, 16, 128)[:, :, :36].mT, True),
        (lambda x: x.reshape(4, 128, 16).mT[:, :, 1:], True),
        (lambda x: x.reshape(-1)[: 4 * 14 * 36].view(4, 14, 36), False),  # rows of 72 bytes
        (lambda x: x[:1].expand(2, 32, 64), False),  # distance 0
        (lambda x: x[:, :, :0], False),
    ],
)
def test_descriptors_are_taken_where_addresses_and_strides_allow_them(view, described, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(gemm, "_symmetric_product_kernel", recorder)
    X = view(torch.zeros(4, 32, 64, dtype=torch.float16))
    gemm._launch(X, X, None, (1.0, 0.0, 0.0), SQUARE, True)
    assert recorder.constants["DESCRIBED"] is described
    gemm._launch(X, X, None, (1.0, 0.0, 0.0), SQUARE, False)
    assert recorder.constants["DESCRIBED"] is False


@pytest.mark.parametrize(("n", "stored"), [(32, True), (40, True), (36, False), (33, False)])
def test_results_are_described_where_their_rows_are_multiples_of_16_bytes(n, stored, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(gemm, "_symmetric_product_kernel", recorder)
    X, D = torch.zeros(2, n, 64, dtype=torch.float16), torch.zeros(2, n, n, dtype=torch.float16)
    for added in (None, D):
        gemm._launch(X, X, added, (1.0, 0.5, 0.0), SQUARE, True)
        assert recorder.constants["STORED"] is stored
        assert not recorder.constants["EIGHTS"]  # the operands are described; of results 33 and 36 nothing is known
    gemm._launch(X, X, D, (1.0, 0.5, 0.0), SQUARE, False)
    assert recorder.constants["STORED"] is False
    assert recorder.constants["EIGHTS"] is (n == 40)


def test_large_tiles_are_for_aligned_operands_alone():
    """On GPUs with descriptors, for those that these take: through pointers such tiles spill."""
    for architecture, tilings in TILINGS.items():
        assert tiling_for(4096, 4, torch.float16, architecture).block_n > 64
        assert tiling_for(4096, 4, torch.float16, architecture, is_aligned=False) == UNALIGNED_TILING
        through_pointers = tiling_for(4096, 4, torch.float16, architecture, is_described=False)
        assert (through_pointers == UNALIGNED_TILING) is (architecture in (90, 100))
        assert all(tiling.block_n <= 128 for tiling in tilings) or architecture in (90, 100)


@pytest.mark.parametrize(("batch", "n", "k"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty_operands_give_what_is_added(device, batch, n, k):
    X = torch.zeros(batch, n, k, device=device)
    D = torch.ones(batch, n, n, device=device)
    expected = 2.0 * D.cpu() + 3.0 * torch.eye(n)
    assert torch.equal(gemm.symmetric_product(X, X, D=D, beta=2.0, diagonal=3.0).cpu(), expected)


def test_public_function_adds_and_ignores_d_where_beta_is_zero(device):
    X, P, _ = matrices(1, 70, 40, torch.float32, device, False, seed=3)
    C = gemm.symmetric_product(X, X, alpha=0.5, D=P, beta=-1.0, diagonal=0.25)
    assert_close_to_float64(C, X, X, 0.5, P, (-1.0, 0.25))
    C = gemm.symmetric_product(X, X, D=torch.full_like(P, torch.nan))
    assert_close_to_float64(C, X, X, 1.0, None, (0.0, 0.0))
    with pytest.raises(ValueError, match="contiguous rows or columns"):
        gemm.symmetric_product(X[..., ::2, ::2], X[..., ::2, ::2])


@pytest.mark.parametrize("architecture", TILINGS)
def test_tiling_leaves_no_processor_more_than_the_others_would(architecture):
    """The choice, against every tiling's longest queue; single precision has one."""
    assert tiling_for(1, 1, torch.float32, architecture) == tiling_for(4096, 64, torch.float32, architecture)
    for n in (65, 256, 1000, 4096):
        for batch in (1, 7, 64):
            queues = {}
            for tiling in TILINGS[architecture]:
                squares = batch * sum(range(1, int(np.ceil(n / tiling.block_n)) + 1))
                tiles = squares * tiling.block_n / tiling.block_m
                assert num_tiles(n, batch, tiling) == tiles
                longest = np.ceil(tiles / NUM_PROCESSORS[architecture])
                queues[tiling] = longest * tiling.block_m * tiling.block_n / tiling.rate
            assert queues[tiling_for(n, batch, torch.float16, architecture)] == min(queues.values())


@pytest.mark.gpu
@pytest.mark.decisive
@pytest.mark.parametrize("dtype", HALF_ULP)
@pytest.mark.parametrize("tall", [False, True], ids=["flat", "tall"])
@pytest.mark.parametrize(
    "shape", [(1, 64, 64), (2, 200, 304), (1, 1025, 513), (2, 1032, 520), (3, 1024, 4096), (1, 2048, 2048)]
)
def test_shipped_tilings_match_float64_on_a_gpu(device, dtype, tall, shape, monkeypatch):
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    X, P, Q = matrices(*shape, dtype, device, tall, seed=int(torch.randint(2**31, ()).item()))
    in_poisoned_memory(monkeypatch)
    architecture = gemm._architecture(device)
    is_described = architecture in DESCRIBED and dtype != torch.float32
    how = {"is_aligned": shape[1] % 8 == shape[2] % 8 == 0}
    tilings = {tiling_for(*shape[1::-1], dtype, architecture, **how)}
    if dtype != torch.float32 and how["is_aligned"]:
        tilings |= {*TILINGS[architecture], UNALIGNED_TILING}
    for tiling in tilings:
        # Through pointers, where there are descriptors, the small tiles alone ship: others compile long, and spill.
        for with_descriptors in {is_described, is_described and tiling != UNALIGNED_TILING}:
            C = gemm._launch(X, X, P, (-2.5, 0.75, 3.0), tiling, with_descriptors)
            assert_close_to_float64(C, X, X, -2.5, P, (0.75, 3.0))
            C = gemm._launch(P, Q, None, (1.0, 0.0, 0.0), tiling, with_descriptors)
            assert_close_to_float64(C, P, Q, 1.0, None, (0.0, 0.0))


def test_float32_is_refused_where_it_would_run_in_tf32(device, monkeypatch):
    monkeypatch.setattr(gemm, "_architecture", lambda _: 100)
    A = torch.zeros(1, 4, 8, device=device)
    with pytest.raises(ValueError, match="float32 is not supported on compute capability 10"):
        gemm.symmetric_product(A, A)
