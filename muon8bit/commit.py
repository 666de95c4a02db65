"""The moment of a step before which it can be taken back, because nothing has been written.

A step reads, allocates, and orthogonalizes its first matrices before it writes. What fails until then leaves
parameters, state and gradients as they were, and the step can be tried again. What fails later leaves some of them a
step ahead of others, which nobody can undo: the optimizer then refuses to go on until a checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Callable


class Commit:
    """Whether a step has begun to write. Call it before the first write; `then` runs at that moment, once."""

    def __init__(self) -> None:
        self.is_done = False
        self._actions: list[Callable[[], None]] = []

    def then(self, action: Callable[[], None]) -> None:
        """Add what is to be done first of all that is written."""
        self._actions.append(action)

    def __call__(self) -> None:
        if not self.is_done:
            self.is_done = True
            for action in self._actions:
                action()
