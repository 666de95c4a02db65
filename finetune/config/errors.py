"""Errors that end a run with a sentence instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Bad input: one clear sentence that names the option and the way out. `main` prints it and returns 2.

    Args:
        option: the option as typed, such as `--dataset`.
        problem: what is wrong, and what to do instead; no final full stop.
    """

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(option, problem)  # both, so that it survives being sent between ranks

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


@contextmanager
def named_here(option: str, here: str) -> Iterator[None]:
    """Raise bad input of an option under the name that this command has for it.

    Args:
        option: as the scripts name it, such as `--width`.
        here: as it was typed, such as `--widths`.

    Raises:
        InputError: what the block raises, with `here` for `option`.
    """
    try:
        yield
    except InputError as error:
        name, problem = error.args
        raise InputError(here if name == option else name, problem) from None


class StorageError(Exception):
    """The disk is full, or fails: a run could not write what it must. Its text is the cause."""


class OtherRankError(Exception):
    """A process of a run has failed, for another reason than the disk. Its text is the cause."""
