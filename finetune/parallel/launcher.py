"""The process that launched this one: if it ends, so does this one, as if it had been told to. No torch in here."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# How the programs, modules and files end that launch a script.
_LAUNCHERS = (
    *("torchrun", "accelerate", "accelerate-launch", "deepspeed"),
    *("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch"),
    *("distributed/run.py", "distributed/launch.py", "commands/launch.py"),
    "finetune.sweep",
)
_ACCELERATE = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "commands/launch.py")
_SCRIPTS = ("pretrain.py", "sft.py")  # what follows is theirs


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


def processes_asked() -> int:
    """Return how many processes `accelerate launch`, which started this one, was told to start; 1 where it was not.

    Told to run on a CPU it starts a single one, whatever its options or its configuration file say, and passes nothing
    on of a configuration that shards.
    """
    words = _words_of(os.getppid()) if sys.platform == "linux" else []
    if not any(word.endswith(_ACCELERATE) for word in words[:4]):
        return 1
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--num_processes", "--num-processes", type=int)
    options.add_argument("--config_file", "--config-file", type=Path)
    asked, _ = options.parse_known_args(words[: next((i for i, w in enumerate(words) if w.endswith(_SCRIPTS)), None)])
    if asked.num_processes is None and asked.config_file is not None:
        return int(yaml.safe_load(asked.config_file.read_text()).get("num_processes", 1))
    return asked.num_processes or 1


def _is_launcher(pid: int) -> bool:
    """Check whether a process was started as a launcher, by its program and the module or script that it runs."""
    return any(word.endswith(_LAUNCHERS) for word in _words_of(pid)[:4])


def _words_of(pid: int) -> list[str]:
    """Return the command line of a process; nothing where it has just ended, or the system does not tell."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [word.decode(errors="replace") for word in words]
