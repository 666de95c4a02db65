"""The process that launched this one: if it ends, so does this one, as if it had been told to. No torch in here."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# How the programs, modules and files end that launch a script.
_LAUNCHERS = (
    *("torchrun", "accelerate", "accelerate-launch", "deepspeed"),
    *("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch"),
    *("distributed/run.py", "distributed/launch.py", "commands/launch.py"),
)


def follow_launcher() -> None:
    """Let the kernel send SIGTERM to this process when its launcher dies.

    `accelerate launch` of one process does not pass SIGTERM on: it dies, and what it launched would train on unseen.
    The loop takes the signal as any SIGTERM: it finishes the step, saves and says how to resume. A parent that is no
    launcher, such as a shell that is left (nohup), may die. Only Linux has this.
    """
    parent = os.getppid()
    if sys.platform != "linux" or not _is_launcher(parent):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl: {os.strerror(number)}")
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)


def tell_launcher(text: str) -> None:
    """Leave the reason why this process ends where torchrun looks for it; torchrun prints it last.

    It is the file that torch's `record` writes, with a sentence in place of a traceback, and without importing torch.
    Without torchrun, which `accelerate launch` runs for several processes, nothing is written.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        record = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": record}))


def _is_launcher(pid: int) -> bool:
    """Check whether a process was started as a launcher, by its program and the module or script that it runs."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:4]
    except OSError:  # it has just ended, or the system does not tell
        return False
    return any(word.decode(errors="replace").endswith(_LAUNCHERS) for word in words)
