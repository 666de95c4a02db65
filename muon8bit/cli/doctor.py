"""`muon8bit doctor [MODEL]`: one page on this machine, to be pasted into a report."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = (
    "Prints versions, GPUs, what is known not to work here, whether the kernels give the reference's bits, the table "
    "of rates, and, for a model, the method by which each shape is orthogonalized. Paste it into a report."
)


def add_parser(subparsers: _Subparsers) -> None:
    """Add `doctor` to the command."""
    parser = subparsers.add_parser(
        "doctor", help="print a page on this machine, to paste into a report", description=_DESCRIPTION
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a preset (Llama-3.1-8B), a config.json, its folder, a GGUF file or a hub name",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the page; returns 0.

    Raises:
        UsageError: for a model that is not known, or a table of rates that cannot be used.
    """
    try:
        print(page(args.model), end="")
    except ValueError as error:
        raise UsageError(f"muon8bit doctor: {error}") from None
    return 0


def page(model: str | None) -> str:
    """Return the page: titles, and lines under them.

    Args:
        model: the name of a model whose methods are shown, or None.

    Raises:
        ValueError: for a model that is not known, or a file in MUON8BIT_RATES that cannot be used.
    """
    from .. import __version__, doctor
    from ..orthogonalize import active_table

    machine, table = doctor.this_environment(), active_table()
    kind = doctor.kind_of(machine)
    sections = {
        "environment": list(doctor.environment_lines(__version__, machine)),
        "known not to work": list(doctor.known_bad(machine)) or ["nothing"],
        "self-check": list(doctor.self_checks(machine)),
        "table of rates": list(doctor.rates_lines(table, kind)),
    }
    if model is not None:
        try:
            lines = list(doctor.method_lines(doctor.model_shapes(model), table, kind))
        except ImportError as error:
            lines = [f"not shown: {error}"]
        sections[f"methods of {model}"] = lines
    return "\n".join(f"{title}\n" + "".join(f"  {line}\n" for line in lines) for title, lines in sections.items())
