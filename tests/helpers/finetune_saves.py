"""Work of two processes while one of them cannot save, or does not see the other's folder."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from types import SimpleNamespace

import torch.distributed as dist

from finetune.config.errors import OtherRankError, StorageError
from finetune.parallel import ranks, watch


def save(rank, folder, fault, waits_inside):
    """Exit code: 10 and 20 for the two errors, 0 for none; `waits_inside`: the other one waits for the faulty one."""
    sys.stderr = open(f"{folder}/err{rank}", "w", buffering=1)  # noqa: SIM115
    watch.LIMIT_S, watch.GRACE_S = 2.0, 1.0
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=600)
    )
    accelerator = SimpleNamespace(num_processes=2, is_main_process=rank == 0)
    ranks.connect(accelerator)
    dist.barrier()  # a process that dies while the other still connects is not what is tried here

    def write():
        if rank == 1 and isinstance(fault, BaseException):
            raise fault
        if rank == 1 and fault is not None:
            os.kill(os.getpid(), fault)
        if waits_inside:
            dist.barrier()
        return rank

    try:
        assert ranks.write_together(accelerator, write) == [0, 1]
    except StorageError as error:
        print(error, file=sys.stderr)
        os._exit(10)
    except OtherRankError as error:
        print(error, file=sys.stderr)
        os._exit(20)
    dist.barrier()
    os._exit(0)


def look(rank, folder):
    sys.stderr = open(f"{folder}/err{rank}", "w", buffering=1)  # noqa: SIM115
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    accelerator = SimpleNamespace(num_processes=2, is_main_process=rank == 0)
    here = ranks.Path(folder, "runs")
    here.mkdir(exist_ok=True)
    ranks.check_shared(accelerator, here / "new")
    if rank == 1:
        ranks.Path.is_file = lambda _path: False
    try:
        ranks.check_shared(accelerator, here / "new")
    except ranks.InputError as error:
        print(error, file=sys.stderr)
        dist.barrier()
        os._exit(0)
    os._exit(1)
