"""More checks of `sharded_checks`: bad values on one rank of two raise on both, and nothing changes on either."""

from __future__ import annotations

import copy

import torch.distributed as dist
from bad_values import (
    BY_HAND,
    GROUP_VALUES,
    MISFITS,
    MISSING_KEYS,
    SAVED,
    assert_unchanged,
    everything,
    make,
    refused,
    without,
    written,
)
from sharded_checks import check as on_ranks


@on_ranks("bad values on one rank are refused on both, and the step is taken once they are gone", ranks=2)
def _(world):
    params, optimizer = make(process_group=world.lines[2].get_group())
    rank = dist.get_rank()

    def check(damage, words, elsewhere):
        undo = damage() if rank else None
        before = everything(params, optimizer)
        refused(optimizer.step, words if rank else ["rank 1", *elsewhere], ValueError if rank else RuntimeError)
        assert_unchanged(params, optimizer, before)
        if undo:
            undo()

    for write, table in ((written, GROUP_VALUES), (without, MISSING_KEYS)):
        for of in table:
            words = [f"group {of[0]}", of[1]]
            check(lambda write=write, of=of: write(optimizer, *of)[1], words, words)
    for *of, words in MISFITS:
        check(lambda of=of: written(optimizer, *of)[1], words, [f"group {of[0]}", of[1]])
    for damage, words in BY_HAND.values():
        check(lambda damage=damage: damage(params, optimizer), words, words)
    saved = copy.deepcopy(optimizer.state_dict())
    before = everything(params, optimizer)
    for change, words in SAVED.values():
        damaged = copy.deepcopy(saved)
        change(damaged)
        refused(lambda damaged=damaged: optimizer.load_state_dict(damaged), words)
        assert_unchanged(params, optimizer, before)
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert all(param.isfinite().all() for param in params.values())
