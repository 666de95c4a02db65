"""A rank that fails in a step ends it on all ranks in time. All cases: `benchmarks/robustness/fault_injection.py`."""

from __future__ import annotations

import pytest

from benchmarks.robustness.fault_injection import impossible, run_case

# Only a rank that has stopped is waited for so long, the others do not wait.
TIMEOUT_S = {"stopped": 8.0}
EARLY = [
    (2, "gathering", "memory", "shard_state"),
    (3, "first NS", "exception", "process_group"),
    (2, "saving", "memory", "shard_state"),
]
LATE = [(2, "later NS", "memory", "fully_shard"), (3, "writing", "stopped", "process_group")]


@pytest.mark.parametrize(("num_ranks", "phase", "failure", "way"), EARLY)
def test_what_fails_before_the_first_write_changes_nothing_and_can_be_tried_again(num_ranks, phase, failure, way):
    found = run_case(num_ranks, (phase, failure, way), TIMEOUT_S.get(failure, 60.0))
    assert found["all_raise"], found
    assert found["bitwise_as_before"], found
    assert found["retry_works"], found
    others = found["outcome"][:-1]
    assert all(f"rank {num_ranks - 1} " in error and "planted" in error for error in others), found


@pytest.mark.parametrize(("num_ranks", "phase", "failure", "way"), LATE)
def test_what_fails_later_ends_the_step_on_all_ranks_which_then_refuse(num_ranks, phase, failure, way):
    found = run_case(num_ranks, (phase, failure, way), TIMEOUT_S.get(failure, 60.0))
    assert found["all_raise"], found
    assert found["refuses_to_go_on"], found
    cause = "did not answer within step_timeout=8" if failure == "stopped" else "failed inside the step: OutOfMemory"
    assert all(f"rank {num_ranks - 1} {cause}" in error for error in found["outcome"][: num_ranks - 1]), found


def test_a_rank_killed_before_the_first_write_leaves_the_others_as_they_were():
    found = run_case(2, ("first NS", "killed", "fully_shard"), 60.0)
    assert found["all_raise"], found
    assert found["bitwise_as_before"], found
    assert not found["refuses_to_go_on"], found
    assert "rank 1 is gone" in found["outcome"][0]


def test_the_table_says_why_a_case_does_not_exist():
    assert "read" in impossible("writing", "dtype", "process_group")
    assert impossible("reading", "dtype", "process_group") is None
