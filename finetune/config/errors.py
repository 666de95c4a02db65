"""Errors that end a run with a sentence instead of a traceback."""

from __future__ import annotations


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


class StorageError(Exception):
    """The disk is full, or fails: a run could not write what it must. Its text is the cause."""


class OtherRankError(Exception):
    """A process of a run has failed, for another reason than the disk. Its text is the cause."""
