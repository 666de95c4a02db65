"""On several ranks, what one process does: see `sharded_checks`, whose checks run in one group of 4 gloo processes."""

import pytest
import torch
from helpers import (  # noqa: F401  # they register their checks
    sharded_checks_adamw8,
    sharded_checks_doors,
    sharded_checks_errors,
    sharded_checks_experts,
    sharded_checks_more,
    sharded_checks_reshard,
    sharded_checks_values,
)
from helpers.ranks import on_ranks
from helpers.sharded_checks import CHECKS, NUM_RANKS, run_all


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """By rank, the errors by the name of the check."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(NUM_RANKS, run_all, str(folder))
    return [torch.load(folder / f"errors{rank}.pt") for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("name", CHECKS)
def test_on_ranks(errors, name):
    found = {rank: of_rank[name] for rank, of_rank in enumerate(errors) if name in of_rank}
    assert not found, "\n".join(f"rank {rank}: {error}" for rank, error in found.items())
