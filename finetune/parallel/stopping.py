"""A polite stop before the last step, on all ranks together."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from finetune.config.errors import StorageError
from finetune.parallel.ranks import gather

TIME_IS_UP = 124  # exit code: that of timeout(1), so that a script which knows that one knows ours


class StopSignal:
    """Reasons to stop before the last step; all ranks agree on them between two steps.

    SIGTERM, SIGINT (Ctrl-C) and SIGHUP (nobody reads what is printed), a time that has passed, and a disk that took no
    metrics, of which `error` tells. The first one counts.

    Args:
        deadline: on the clock of `time.monotonic`, in seconds.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline, self.code = deadline, 0
        self.error = ""

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Watch for the signals inside the block; the handlers before it come back at its end.

        SIGHUP stays ignored where it is: nohup starts a run so.
        """
        heard = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            heard.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        self.code = self.code or 128 + number

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
