"""Parts that the scripts' command lines share: options from a recipe's fields, resuming, exit codes. No torch here."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from finetune.config.errors import InputError
from finetune.config.options import (
    RESUME_MAY_CHANGE,
    SECTIONS,
    Training,
    flag,
    option_fields,
    option_help,
    option_type,
)
from finetune.parallel.launcher import follow_launcher, tell_launcher
from finetune.storage.run_dir import RunFolder, holds_nothing
from muon8bit import cli

STARTED = time.monotonic()  # s; before torch is imported, which counts against --max-minutes

EXIT_CODES = (
    "Exit codes: 0 done; 1 a gradient or a validation loss was not finite, or the disk is full; 2 bad input; 124 "
    "--max-minutes have passed; 129, 130 or 143 SIGHUP, Ctrl-C or SIGTERM came, or nobody reads what is printed (129). "
    "After 124 and these the run is saved and not complete; before its first step there is nothing to save. torchrun "
    "and accelerate launch make 1 of all but 0; a complete run has a result.json."
)


class Parser(cli.CommandParser):
    """An argument parser that raises InputError, with the options of a recipe class in their sections.

    Args:
        prog: name of the script.
        description: of the script, with examples.
        kind: its option fields become options without a default: what is not given is not in the result.
        recipes: names of its recipes.
        more: options of this script alone, by name, with their help; they take one value.
    """

    def __init__(
        self, prog: str, description: str, kind: type[Training], recipes: Sequence[str], more: Mapping[str, str]
    ) -> None:
        usage = f"{prog} [--recipe NAME] [--OPTION VALUE ...]"
        super().__init__(prog=prog, usage=usage, description=description, epilog=EXIT_CODES)
        run = self.add_argument_group("run", "A recipe's values come before the defaults that are shown here.")
        which = f"one of {', '.join(recipes)}, or a YAML file; {more['--recipe']}"
        run.add_argument("--recipe", metavar="NAME", help=which)
        for name in [name for name in more if name != "--recipe"]:
            run.add_argument(name, metavar="FILE", help=more[name])
        run.add_argument("--output-dir", metavar="FOLDER", help="a new or empty folder (default: runs/RECIPE-TIME/)")
        run.add_argument("--resume", metavar="FOLDER", help="a run's folder, or 'latest' (default: a new run)")
        groups = {section: self.add_argument_group(section) for section in SECTIONS}
        for f in option_fields(kind):
            keys: dict[str, Any] = {"type": option_type(f), "choices": f.metadata["choices"]}
            if option_type(f) is bool:
                keys = {"action": argparse.BooleanOptionalAction}
            elif not f.metadata["choices"]:
                keys["metavar"] = {int: "N", float: "X"}.get(option_type(f), "TEXT")
            names = [flag(f.name), *map(flag, f.metadata["aliases"])]
            text = option_help(f).replace("%", "%%")
            groups[f.metadata["section"]].add_argument(
                *names, dest=f.name, help=text, default=argparse.SUPPRESS, **keys
            )

    def error(self, message: str) -> NoReturn:
        """Raise InputError in place of argparse's exit."""
        end = "" if message.endswith("?") else ";"
        raise InputError(self.prog, f"{message}{end} see --help")


def absolute(value: Any, option: str) -> Any:
    """Make a local path absolute, so that a recorded run can be resumed from any working directory.

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
    """Check that the options of a resumed run change nothing of what the run was.

    Raises:
        InputError: an option asks for something else.
    """
    was = dataclasses.asdict(saved)
    for key, value in overrides.items():
        if key not in RESUME_MAY_CHANGE and value != was[key]:
            raise InputError(flag(key), f"{folder.path} was run with {was[key]!r}; leave it out, or start anew")


def say_on_main(lines: Sequence[str]) -> None:
    """Print lines on the main process, before there is an Accelerator."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(line, flush=True)


class Terminated(KeyboardInterrupt):
    """SIGTERM came where nothing takes it but this: it ends a script as Ctrl-C does."""


def stopped_early(folder: RunFolder) -> str:
    """Return what is said last of a run that is stopped before a step."""
    if folder.candidates:
        return f"stopped before another step; {folder.path} is as it was: resume it"
    gone = f" ({folder.path} can be deleted)" if holds_nothing(folder.path) else ""
    return f"stopped before the first step: nothing to resume; start anew{gone}"


@contextmanager
def told_when_stopped(folder: RunFolder) -> Iterator[None]:
    """Say last, where Ctrl-C or SIGTERM ends the block in which a run is set up, what is left and what is not."""
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(stopped_early(folder), file=sys.stderr)
        tell_launcher(stopped_early(folder))
        raise


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` inside the block, in a run of one process.

    One of several may wait in a collective, where Python hears no signal: it ends at once, as ever.
    """

    def end(_number: int, _frame: Any) -> NoReturn:
        raise Terminated

    alone = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Output:
    """A text stream that outlasts its reader: a terminal that is closed, or the other end of a pipe.

    A write that nobody can read is dropped. Where a handler of SIGHUP listens, as between steps, it counts as that
    signal, which of a terminal may come later, and of a pipe never comes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text; return its length."""
        self._unless_unread(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        self._unless_unread(self._stream.flush)

    def _unless_unread(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            if callable(signal.getsignal(signal.SIGHUP)):
                signal.raise_signal(signal.SIGHUP)


@contextmanager
def outlasting_readers() -> Iterator[None]:
    """Let prints inside the block fail for no reader's end."""
    streams = sys.stdout, sys.stderr  # None where the process was started without
    sys.stdout, sys.stderr = (_Output(stream) if stream else stream for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in filter(None, streams):
            try:
                stream.flush()
            except OSError:  # what is left in it goes nowhere, or the interpreter's last flush would fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_script(work: Callable[[], int], typed: Mapping[str, str] | None = None) -> int:
    """Do the work; return the exit code, see EXIT_CODES.

    Args:
        work: returns the exit code.
        typed: name of an option -> the former name that was typed for it, by which bad input is told.
    """
    follow_launcher()
    try:
        # Accelerate warns at every checkpoint that a tied weight is saved once (loading ties it again; resuming is
        # bitwise).
        logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
        with outlasting_readers(), _sigterm_as_ctrl_c():
            return work()
    except InputError as error:
        text = str(error)
        for now, former in (typed or {}).items():
            text = text.replace(now, former)
        if os.environ.get("RANK", "0") == "0":
            print(text, file=sys.stderr)
        tell_launcher(text)
        return 2
    except Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:  # before or after the training loop, which saves and says how to resume
        return 130
    except Exception as error:
        tell_launcher(f"{type(error).__name__}: {error}")
        raise
