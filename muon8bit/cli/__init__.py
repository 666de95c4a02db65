"""The `muon8bit` command. A subcommand is a module here with `add_parser(subparsers)`, listed in `_SUBCOMMANDS`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from muon8bit import __version__

from . import convert, estimate, report
from .errors import UsageError

# `add_parser(subparsers)` adds one parser and sets its default `run`, a function from the parsed arguments to an exit
# code, which raises InputError for bad input.
_SUBCOMMANDS = (convert, estimate, report)


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of printing its usage and leaving. No option is abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = _Parser(prog="muon8bit", description="Tools around the Muon8bit optimizer.")
    parser.add_argument("--version", action="version", version=f"muon8bit {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for module in _SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's). Returns the exit code: 0, 2 (bad input, told in one line on
    stderr), or what the subcommand gives."""
    try:
        args = build_parser().parse_args(argv)
        code: int = args.run(args)
        return code
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
