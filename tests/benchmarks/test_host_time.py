"""The harness of host time and of bytes sent with parts: its counts against counts by hand, and a small step."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.shardings import sharded

from benchmarks.scaling import host_time
from benchmarks.scaling.parts_of_tree import ratio, sent_by_part
from muon8bit.distributed.assignment import Matrix, plan
from muon8bit.orthogonalize import NSMethod


def test_parts_are_counted_as_they_are_sent():
    """One matrix [8, 8] in bf16 on two ranks: a half to the owner, and a half back."""
    method = NSMethod("standard", torch.bfloat16, cost=1.0)
    planned = plan([Matrix(8, 8, sharded(8, 8, 2), method)], 2, 2**20)
    assert list(sent_by_part(planned)) == [[0, 64], [64, 0]]
    assert ratio(planned) == {"ratio": 2.0, "parts": 2, "most_sent_of_a_part": 64}


def test_a_step_of_this_tree_is_timed_with_nothing_computed():
    found = host_time.run_in(Path(host_time.ROOT), "step_of_tree.py", "1", "2")
    for setting in host_time.SETTINGS:
        assert len(found[setting]["ms"]) == 1
        assert found[setting]["triton"]["stats_kernel"] >= 4  # of four shapes
