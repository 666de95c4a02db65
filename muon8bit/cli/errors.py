"""The one error that a user of the command can cause."""

from __future__ import annotations


class UsageError(Exception):
    """Bad input: one clear sentence that names the file or option and the way out. `main` prints it and returns 2."""
