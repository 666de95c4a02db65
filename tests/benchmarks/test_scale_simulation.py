"""The simulation against hand counts, its acceptance target, and its command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from benchmarks.gpu.workloads import Llama
from benchmarks.scaling import replicated, simulation
from benchmarks.scaling.model import Machine, SimulatedTraffic, matrices_of, moonlight, operations, shards_of, simulate
from benchmarks.scaling.simulation import MODELS

KIND, MACHINE = "cuda_sm90", Machine()
TINY = Llama(hidden=64, intermediate=160, layers=3, kv=32)


def test_load_of_llama_70b_on_64_gpus_is_balanced():
    row = simulate("70B", MODELS["Llama-3.1-70B"], 64, 64, KIND, MACHINE)
    assert row.num_matrices == 560
    assert 1 <= row.balance <= 1.05
    # [8192, 8192] and [1024, 8192] twice, [28672, 8192] three times, 80 layers; every rank holds 1/64 of each
    elements = 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192)
    scales = 80 * (4 * (2 * 8192 + 2 * 1024 + 2 * 28672) + 14 * 8192)  # of 4 and 14 blocks a row
    assert row.state_bytes == (elements + 4 * scales) / 64
    assert row.fp32_state_bytes == 4 * elements / 64
    assert row.gathered_fp32_bytes == 4 * elements * 63 / 64
    assert row.sums_bytes == 4 * scales * 63 / 64
    # X and O in half precision: 63/64 of each matrix there and back, shared by 64 ranks
    assert row.mean_bytes == 2 * 2 * elements * 63 / 64 / 64
    assert row.mean_bytes <= row.most_received_bytes <= 1.01 * row.mean_bytes
    # Gram form with a restart 8 m^2 n + 28 m^3 (none of them pays for square ones: 30 m^3), m <= n, at 400 TFLOP/s
    m, flops = 8192, 0.0
    for rows, count in ((1024, 160), (28672, 240)):
        small, large = min(rows, m), max(rows, m)
        flops += count * (8 * small**2 * large + 28 * small**3)
    mean_ms = (flops + 160 * 30 * m**3) / 64 / 400e9
    # at least: every round waits for its slowest owner, and the budget leaves one matrix a round to each
    assert mean_ms <= row.arithmetic_ms <= 1.15 * mean_ms


def test_replicas_get_all_of_their_share_of_o():
    """Two replicas of 8: X from the owner's replica, O to both."""
    row = simulate("tiny", TINY, 16, 8, KIND, MACHINE)
    elements = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64)
    assert row.mean_bytes == 2 * elements * (7 / 8 + 15 / 8) / 16
    assert row.state_bytes == (elements + 4 * 3 * (2 * 64 + 2 * 32 + 2 * 160 + 64)) / 8


def test_bytes_of_a_rank_are_split_between_node_and_network():
    """One matrix at rank 0 of 4, in nodes of two: one piece stays in the node, two come over the network."""
    machine = replace(MACHINE, node_size=2, node_gb_s=100.0, network_gb_s=10.0)
    traffic = SimulatedTraffic(4, machine)
    for source in (1, 2, 3):
        traffic.add(source, 0, 10**6)
    assert traffic.received == [[10**6, 0, 0, 0], [2 * 10**6, 0, 0, 0]]
    assert traffic.totals(traffic.sent) == [0, 10**6, 10**6, 10**6]
    assert traffic.ms() == pytest.approx(0.2)  # 2 MB at 10 GB/s; the other takes 0.01 ms
    traffic.add(2, 3, 10**8)
    assert traffic.ms() == pytest.approx(1.0)


@pytest.mark.parametrize("num_ranks", [1, 3, 8, 50])
def test_moonlight_matches_a_painted_flat_buffer(num_ranks):
    matrices = matrices_of(TINY, num_ranks, 1, KIND)
    traffic, work = moonlight(matrices, num_ranks, MACHINE)
    which = np.repeat(np.arange(len(matrices)), [m.rows * m.cols for m in matrices])
    cuts = [len(which) * rank // num_ranks for rank in range(num_ranks + 1)]
    owner = np.repeat(np.arange(num_ranks), np.diff(cuts))
    for rank in range(num_ranks):
        touched = np.unique(which[owner == rank])
        missing = np.isin(which, touched) & (owner != rank)
        assert traffic.totals(traffic.received)[rank] == 2 * missing.sum()
        assert work[rank] == sum(operations(matrices[index]) for index in touched)
    assert sum(traffic.totals(traffic.sent)) == sum(traffic.totals(traffic.received))


def test_a_replica_holds_weights_gradients_and_state_in_half_a_card():
    """6.98e9, 68.45e9 and 402e9 elements of 5 bytes, 40e9 bytes a GPU: 0.9, 8.6 and 50.3 GPUs at least."""
    assert [shards_of(model) for model in MODELS.values()] == [8, 16, 64]


def test_command_writes_both_records(tmp_path, monkeypatch):
    table, figures = tmp_path / "table.md", tmp_path / "figures.json"
    arguments = ["--models", "Llama-3.1-8B", "--gpus", "8", "16", "--out", table, "--json", figures]
    monkeypatch.setattr(sys, "argv", ["scale_simulation.py", *map(str, arguments)])
    simulation.main()
    record = json.loads(figures.read_text())
    found = [(row["num_gpus"], row["num_shards"]) for row in record["rows"]]
    assert found == [(8, 8), (16, 16), (16, 8)]
    assert record["assumed"] == {
        "kind": KIND,
        "tflops": 400.0,
        "node_gb_s": 360.0,
        "network_gb_s": 40.0,
        "node_size": 8,
    }
    lines = [line for line in table.read_text().splitlines() if line.startswith("| Llama")]
    assert len(lines) == 3
    assert all(f"| {row['balance']:.3f} |" in line for row, line in zip(record["rows"], lines, strict=True))


def test_command_refuses_gpus_that_are_no_whole_replicas(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale_simulation.py", "--models", "Llama-3.1-8B", "--gpus", "12"])
    with pytest.raises(SystemExit) as error:
        simulation.main()
    assert error.value.code == 2
    assert "--gpus 12 is no multiple of the 8 of a replica of Llama-3.1-8B" in capsys.readouterr().err


def test_times_of_cheap_matrices_by_hand(monkeypatch):
    """Two shapes on 4 GPUs: one takes 3 ms each, and 1 to send all of its O; the other 1 and 2."""
    monkeypatch.setattr(replicated, "_seconds", lambda rows, *_: {8: 3e-3, 4: 1e-3}[rows])
    matrices = {(8, 16): 4, (4, 64): 4}
    ways = replicated.ways_of(matrices, 4, 2 * 8 * 16 / 1e-3)
    assert ways.divided == pytest.approx((3 + 1, 3 + 6))
    assert ways.replicated == pytest.approx((12 + 4, 0))
    assert ways.chosen == pytest.approx((3 + 4, 3))
    assert (ways.num_replicated, ways.num_matrices) == (4, 8)
    assert ways.gain(overlaps=False) == pytest.approx(13 / 10)
    assert ways.gain(overlaps=True) == pytest.approx(9 / 7)


def test_replicating_cheap_matrices_gains_under_3_percent_over_nvlink():
    """The ground of a line in docs/design/negative-results.md."""
    for matrices, num_gpus in product(replicated.models().values(), replicated.NUM_GPUS):
        ways = replicated.ways_of(matrices, num_gpus, replicated.LINKS["NVLink"])
        assert max(ways.gain(overlaps=False), ways.gain(overlaps=True)) < 1.03
