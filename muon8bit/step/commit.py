"""The moment of a step before which it can be taken back, because nothing has been written.

A step reads, allocates, and orthogonalizes its first matrices before it writes. What fails until then leaves
parameters, state and gradients as they were, and the step can be tried again. What fails later leaves some of them a
step ahead of others, which nobody can undo: the optimizer then refuses to go on until a checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Commit:
    """Moment of a step's first write: call it just before; `actions` then run, once.

    Attributes:
        ask_ranks: called just before that moment, once; an error that it raises leaves the step not begun.
        actions: what is to run then.
        is_confirmed: the other ranks have said that they go on too.
        is_done: the moment has passed.
    """

    ask_ranks: Callable[[], None] | None = None
    actions: list[Callable[[], None]] = field(default_factory=list)
    is_confirmed: bool = False
    is_done: bool = False

    def confirm(self) -> None:
        """Ask whether the other ranks go on too, for what cannot be held back until `commit` itself is called."""
        if self.ask_ranks is not None and not self.is_confirmed:
            self.ask_ranks()
        self.is_confirmed = True

    def __call__(self) -> None:
        """Run the actions, if it is the first call."""
        if self.is_done:
            return
        if self.ask_ranks is not None:
            self.confirm()
        self.is_done = True
        for action in self.actions:
            action()
