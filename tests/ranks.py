"""Processes that form a gloo group on this machine, for the tests of what runs on several ranks."""

from __future__ import annotations

import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A rank that waits for one that has failed gives up; a check takes a second, a busy machine longer to start.
TIMEOUT = timedelta(seconds=180)


def _run(rank, num_ranks, path, work, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=num_ranks, timeout=TIMEOUT)
    assert dist.get_world_size() == num_ranks
    try:
        work(*args)
        dist.barrier()
    except BaseException:  # the first error of several is the cause, and mp.spawn shows any
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def on_ranks(num_ranks, work, *args):
    """Call `work(*args)`, a function of a module, in `num_ranks` processes; an error in one is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (num_ranks, f"{folder}/store", work, args), nprocs=num_ranks)
