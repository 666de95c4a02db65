"""The `muon8bit` command. A subcommand is a module here with `add_parser(subparsers)`, listed in `_SUBCOMMANDS`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import convert, doctor, estimate, report, scripts, transfer, tune
from .errors import UsageError
from .parser import CommandParser, nearest

__all__ = ["CommandParser", "UsageError", "build_parser", "main", "nearest"]

# `add_parser(subparsers)` adds one parser and sets its default `run`, a function from the parsed arguments to an exit
# code, which raises UsageError for bad input. None of these modules imports torch before it runs.
_SUBCOMMANDS = (estimate, report, convert, tune, transfer, doctor, scripts)
_EXAMPLES = """examples:
  muon8bit estimate Llama-3.1-8B --budget 24GB       what fits, as commands
  muon8bit report runs/latest                        bytes of a checkpoint
  muon8bit convert optimizer.bin new.bin --bits 32   another format
  muon8bit tune                                      rates of this GPU
  muon8bit transfer llama_4m --width 640             rates at another width
  muon8bit doctor Llama-3.2-1B                       a page for a report
  muon8bit merge runs/latest                         an adapter into its base
  muon8bit recipes                                   what can be started
  muon8bit pretrain --recipe llama_4m                a few minutes, no download
  muon8bit sft --recipe smollm2_135m                 LoRA on SmolLM2-135M

Each has --help.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = CommandParser(prog="muon8bit", description="Tools around the Muon8bit optimizer.", epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"muon8bit {__version__}", help="print the version")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for module in _SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's), or without a subcommand print the help.

    Returns the exit code: 0, 2 (bad input, told in one line on stderr), or what the subcommand gives.
    """
    try:
        parser = build_parser()
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help()
            return 0
        code: int = args.run(args)
        return code
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
