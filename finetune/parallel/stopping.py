"""A polite stop before the last step, on all ranks together."""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO

from accelerate import Accelerator

from finetune.config.errors import StorageError
from finetune.parallel.ranks import gather

TIME_IS_UP = 124  # exit code: that of timeout(1), so that a script which knows that one knows ours


class _Terminal:
    """A text stream to a terminal that may be closed: a write may learn of it before the signal is handled.

    Args:
        stream: whose other attributes it has.
        closed: called when a write fails since the terminal is gone; then the text is dropped.
    """

    def __init__(self, stream: TextIO, closed: Callable[[], None]) -> None:
        self._stream, self._closed = stream, closed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text; return its length."""
        self._unless_closed(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        self._unless_closed(self._stream.flush)

    def _unless_closed(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self._closed()


class StopSignal:
    """Reasons to stop before the last step; all ranks agree on them between two steps.

    SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a terminal that is closed), a time that has passed, and a disk that took no
    metrics, of which `error` tells. The first one counts.

    Args:
        deadline: on the clock of `time.monotonic`, in seconds.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline, self.code = deadline, 0
        self.error = ""
        self._terminals = [number for number in (1, 2) if os.isatty(number)]  # one that is gone does not tell

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Watch for the signals inside the block; the handlers before it come back at its end.

        SIGHUP stays ignored where it is: nohup starts a run so.
        """
        heard = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            heard.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in heard}
        streams = sys.stdout, sys.stderr
        closed = partial(self._note, signal.SIGHUP, None) if signal.SIGHUP in heard else self._leave_terminal
        sys.stdout, sys.stderr = (_Terminal(of, closed) if of.isatty() else of for of in streams)
        try:
            yield self
        finally:
            sys.stdout, sys.stderr = streams
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        self.code = self.code or 128 + number
        if number == signal.SIGHUP:
            self._leave_terminal()

    def _leave_terminal(self) -> None:
        """Let what goes to the terminal go nowhere: it has been closed, and a print to it would fail."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Check whether any rank has a reason to stop; a collective call.

        `code` is then the exit code, equal on all ranks.

        Raises:
            StorageError: some rank's disk took no metrics; on all ranks.
        """
        code = self.code or (TIME_IS_UP if time.monotonic() >= self.deadline else 0)
        reasons = gather(accelerator, (self.error, code))
        self.code = max(code for _, code in reasons)
        for error, _ in reasons:
            if error:
                raise StorageError(error)
        return self.code > 0
