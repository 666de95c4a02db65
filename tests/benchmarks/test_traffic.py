"""A sharded layer of Llama-3.2-1B: what its plan moves, and that the script counts just that."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.scaling import family_bytes, launches, traffic
from benchmarks.scaling.model import matrices_of
from benchmarks.scaling.transfers import bytes_received, gathered_bytes
from muon8bit.distributed.assignment import plan
from muon8bit.orthogonalize import choose_method, resolve_coefficients


def test_a_layer_in_bf16_moves_a_quarter_of_its_momenta_in_fp32():
    """On 4 ranks: pieces there and back in bf16, and one fp32 sum a row and block of 2048."""
    layer, schedule = traffic.LAYER, resolve_coefficients("jordan", 5)
    matrices = [
        matrix._replace(
            method=choose_method(matrix.rows, matrix.cols, schedule, "cuda_sm90", torch.bfloat16, tiny=False)
        )
        for matrix in matrices_of(layer, 4, 1, "cuda_sm90")
    ]
    elements = sum(rows * cols for rows, cols in layer.linears())
    sums = sum(rows // 4 * -(-cols // 2048) for rows, cols in layer.linears())
    moved = sum(bytes_received(plan(matrices, 4, 2**27))) + 4 * gathered_bytes([sums] * 4)
    assert moved == 3 * elements * (2 + 2) // 4 * 1 + 4 * 3 * 4 * sums
    assert moved / (3 * 4 * elements) <= 0.26


def test_the_script_counts_what_is_planned(tmp_path):
    out = tmp_path / "record.json"
    assert traffic.main(["--ranks", "2", "--divisor", "32", "--modes", "fsdp", "--out", str(out)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert len(result["ranks"]) == 2
    assert result["ranks"][0]["counted"]["received"] > 0
    assert result["ranks"][0]["counted"] == result["ranks"][0]["predicted"]


def test_columns_of_a_rank_take_a_table_and_a_kernel_a_phase():
    """However many matrices there are, a call each."""
    pytest.importorskip("triton")
    import muon8bit_kernels.triton.cut as in_triton

    with launches.counting() as counter:
        x = torch.empty(4, 4, device="meta")
        x.view(16).add_(1).mul(2)
    assert counter.total == 2
    assert {launches.launches(in_triton, 14336, rank, count) for rank in (0, 5) for count in (1, 3)} == {4}


def test_bytes_of_the_family_are_those_of_what_is_sent():
    """X and O in bf16, or signs in a byte, codes or fp32: 7 of 8 parts of each move, and rows' numbers."""
    every = family_bytes.rows("Llama-3.1-8B", 8, "cuda_sm90")
    for (name, _, each), itemsizes in zip(every, (2 + 2, 2 + 2, 2 + 2, 1 + 1 + 2, 1 + 4 + 2), strict=True):
        assert itemsizes * 7 / 8 <= each <= itemsizes * 7 / 8 + 0.006, name
    assert family_bytes.table(every) in (Path(__file__).parents[2] / "docs/guide/several-gpus.md").read_text()
