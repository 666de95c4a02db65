"""One of two processes fails, is killed or is stopped while both save: neither waits, and both know why."""

from __future__ import annotations

import errno
import signal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import finetune_saves
from helpers.ranks import prepare

from finetune.parallel import ranks

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
FULL = OSError(errno.ENOSPC, "No space left on device")
TORCH_FULL = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
NCCL = dist.DistBackendError("NCCL error: unhandled system error")


@pytest.mark.parametrize(
    ("error", "from_disk"),
    [
        (FULL, True),
        (TORCH_FULL, True),
        (OUT_OF_MEMORY, False),
        (NCCL, False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ConnectionResetError("peer"), False),
        (ranks.CheckpointException("save", {1: (FULL, None)}), True),
        (ranks.CheckpointException("save", {0: (OUT_OF_MEMORY, None), 1: (FULL, None)}), False),
    ],
)
def test_only_the_disks_errors_are_told_as_a_full_disk(error, from_disk):
    assert ranks.is_storage_error(error) == from_disk


def _start(work, *args):
    prepare()
    both = [mp.get_context("forkserver").Process(target=work, args=(rank, *args)) for rank in range(2)]
    for process in both:
        process.start()
    return both


@pytest.mark.parametrize(
    ("fault", "waits_inside", "codes", "words"),
    [
        (None, True, (0, 0), ""),
        (FULL, False, (10, 10), "No space left"),
        (OUT_OF_MEMORY, False, (20, 20), "process 1 failed: OutOfMemoryError: CUDA out of memory"),
        (OUT_OF_MEMORY, True, (1, None), "process 1 failed: OutOfMemoryError: CUDA out of memory"),
        (KeyboardInterrupt("stop"), True, (1, None), "process 1 failed: KeyboardInterrupt"),
        (signal.SIGKILL, False, (1, -signal.SIGKILL), "another process is gone"),
        (signal.SIGSTOP, True, (1, None), "no sign for 2 s"),
    ],
    ids=["none", "full disk", "out of memory", "out of memory, waited for", "interrupted", "killed", "stopped"],
)
def test_no_process_waits_for_one_that_cannot_save(tmp_path, fault, waits_inside, codes, words):
    both = _start(finetune_saves.save, str(tmp_path), fault, waits_inside)
    try:
        both[0].join(120)
        assert both[0].exitcode == codes[0], (tmp_path / "err0").read_text()
        if codes[1] is not None:
            both[1].join(120)
            assert both[1].exitcode == codes[1], (tmp_path / "err1").read_text()
    finally:
        for process in both:
            process.kill()
    assert words in (tmp_path / "err0").read_text()


def test_a_folder_that_only_one_machine_sees_is_named_before_anything_is_done(tmp_path):
    """The second process looks for the token in vain, as on a machine without the shared disk."""
    both = _start(finetune_saves.look, str(tmp_path))
    for rank, process in enumerate(both):
        process.join(120)
        assert process.exitcode == 0, (tmp_path / f"err{rank}").read_text()
    for rank in range(2):
        text = (tmp_path / f"err{rank}").read_text()
        assert text.startswith("--output-dir: process 1 (on ")
        assert f"does not see {tmp_path}/runs/new of process 0" in text
    assert not list(tmp_path.glob("runs/.token*"))
