"""`muon8bit report PATH`: bytes of a checkpoint, measured and predicted."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: _Subparsers) -> None:
    """Add `report` to the command."""
    parser = subparsers.add_parser("report", help="measure a checkpoint's bytes beside the predicted ones")
    parser.add_argument("path", metavar="PATH", type=Path, help="an optimizer's file, a checkpoint, or a run's folder")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 0.

    Raises:
        InputError: the path holds no state of an optimizer that is known.
    """
    from muon8bit.estimate import print_report, report  # with torch, which --help does not wait for

    try:
        found = report(args.path)
        if args.json:
            print(json.dumps(found.to_dict(), indent=1))
        else:
            print_report(found, sys.stdout)
    except (ValueError, ImportError) as error:
        raise UsageError(f"muon8bit report: {error}") from None
    return 0
