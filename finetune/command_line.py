"""What the command lines of the scripts share: options from a recipe's fields, resuming, exit codes. No torch here."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from finetune.config.errors import InputError
from finetune.config.options import RESUME_MAY_CHANGE, Training, flag, option_fields, option_type
from finetune.parallel.launcher import follow_launcher
from finetune.storage.run_dir import RunFolder

STARTED = time.monotonic()  # s; before torch is imported, which counts against --max-minutes

EXIT_CODES = (
    "Exit codes: 0 done; 1 a gradient or a validation loss was not finite, or the disk is full; 2 bad input; 124 "
    "--max-minutes have passed; 130 or 143 Ctrl-C or SIGTERM came. After 124, 130 and 143 the run is saved and not "
    "complete. torchrun and accelerate launch make 1 of all but 0; a complete run has a result.json."
)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError, with the options of a recipe class.

    Args:
        prog: name of the script.
        description: one line.
        kind: its option fields become options without a default: what is not given is not in the result.
    """

    def __init__(self, prog: str, description: str, kind: type[Training]) -> None:
        super().__init__(prog=prog, description=description, epilog=EXIT_CODES, allow_abbrev=False)
        self.add_argument("--output-dir", help="a new or empty folder; default: runs/<recipe>-<time>/")
        self.add_argument("--resume", metavar="FOLDER", help="a run's folder to continue, or 'latest'")
        for f in option_fields(kind):
            keys: dict[str, Any] = {"type": option_type(f), "choices": f.metadata["choices"]}
            if option_type(f) is bool:
                keys = {"action": argparse.BooleanOptionalAction}
            self.add_argument(flag(f.name), help=f.metadata["help"], default=argparse.SUPPRESS, **keys)

    def error(self, message: str) -> NoReturn:
        raise InputError(self.prog, f"{message}; see --help")


def absolute(value: Any, option: str) -> Any:
    """Local paths are recorded absolute, so that a run can be resumed from any working directory.

    Raises:
        InputError: a path that the system refuses to look up, such as one in a folder that may not be entered.
    """
    if not isinstance(value, str) or value == "stdlib":
        return value
    try:
        path = Path(value).expanduser()
        return str(path.resolve()) if path.exists() else value
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of nobody
        shown = value if len(value) < 300 else f"{value[:300]}..."
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(option, f"cannot look up {shown}: {reason}; give a path that can be read") from None


def check_resumable(folder: RunFolder, saved: Training, overrides: Mapping[str, Any]) -> None:
    """A resumed run stays the run that it was.

    Raises:
        InputError: an option asks for something else.
    """
    was = dataclasses.asdict(saved)
    for key, value in overrides.items():
        if key not in RESUME_MAY_CHANGE and value != was[key]:
            raise InputError(flag(key), f"{folder.path} was run with {was[key]!r}; leave it out, or start anew")


def run_script(work: Callable[[], int]) -> int:
    """Do the work. Returns the exit code, see EXIT_CODES."""
    follow_launcher()
    try:
        # Accelerate imports bitsandbytes, which warns on some CPUs that a 4-bit product will be slow, and warns at
        # every checkpoint that a tied weight is saved once (loading ties it again; resuming is bitwise).
        for name in ("bitsandbytes.backends.cpu.ops", "accelerate.utils.other"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return work()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before or after the training loop, which saves and says how to resume
        return 130
