"""What accumulation costs in precision where parameters are sharded."""

from __future__ import annotations

import json

from helpers import finetune_sharded
from helpers.ranks import on_ranks


def test_accumulation_over_two_ranks_is_as_precise_as_one_process_without_it(tmp_path):
    """32 micro-batches a rank, in bf16. Kept in bf16 until the last one (`no_sync`) they are off by 1.25 times."""
    on_ranks(2, finetune_sharded.errors, str(tmp_path), {"sharded": (2,), "replicated": (2, 1)})
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert errors["sharded"] <= 1.2 * errors["one"]
    assert errors["replicated"] <= 1.2 * errors["one"]
