"""The moment of a step before which it can be taken back, because nothing has been written.

A step reads, allocates, and orthogonalizes its first matrices before it writes. What fails until then leaves
parameters, state and gradients as they were, and the step can be tried again. What fails later leaves some of them a
step ahead of others, which nobody can undo: the optimizer then refuses to go on until a checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Callable


class Commit:
    """Moment of a step's first write: call it just before; `actions` then run, once.

    Args:
        confirm: called just before that moment, once; an error that it raises leaves the step not begun.
    """

    def __init__(self, confirm: Callable[[], None] | None = None) -> None:
        self.is_done, self.is_confirmed = False, confirm is None
        self._confirm = confirm
        self.actions: list[Callable[[], None]] = []

    def confirm(self) -> None:
        """Ask whether the other ranks go on too, for what cannot be held back until `commit` itself is called."""
        if not self.is_confirmed and self._confirm is not None:
            self._confirm()
            self.is_confirmed = True

    def __call__(self) -> None:
        """Run the actions, if it is the first call."""
        if not self.is_done:
            if not self.is_confirmed:
                self.confirm()
            self.is_done = True
            for action in self.actions:
                action()
