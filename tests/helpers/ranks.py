"""Processes that form a gloo group on this machine, for the tests of what runs on several ranks."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from multiprocessing import forkserver

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A rank that waits for one that has failed gives up; a check takes a second, a busy machine longer to start.
TIMEOUT = timedelta(seconds=180)
# Imported once, by a process without threads that the ranks are forked from: else each takes seconds to import them.
PRELOADED = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "accelerate",
    "transformers.models.llama.modeling_llama",
    "muon8bit.integrations.accelerate",
    "muon8bit.integrations.distributed_checkpoint",
    "finetune.training.trainer",
    "finetune.storage.outputs",
    "finetune.setup.prepare",
]


def _run(rank, num_ranks, path, work, args):
    faulthandler.enable()  # a rank that dies of a signal says where it was
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=num_ranks, timeout=TIMEOUT)
    assert dist.get_world_size() == num_ranks
    try:
        work(*args)
        dist.barrier()
    except BaseException:  # the first error of several is the cause, and start_processes shows any
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def prepare():
    """Start the process that ranks are forked from. It has the environment of the first call."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start_processes(work, args, num_processes):
    """Call `work(rank, *args)`, a function of a module, in forked processes; raise an error of one here.

    They are forked from a process that has imported what they need, and have the environment that the first call was
    made in.
    """
    prepare()
    mp.start_processes(work, args, nprocs=num_processes, start_method="forkserver")


def on_ranks(num_ranks, work, *args):
    """Call `work(*args)`, a function of a module, in `num_ranks` processes; an error in one is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_run, (num_ranks, f"{folder}/store", work, args), num_ranks)
