"""`muon8bit tune`: measures the rates of this GPU, by which methods are then chosen."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from datetime import date
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from ..orthogonalize import RatesTable

    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = (
    "Measures, in about a minute, how fast this GPU makes the products of Newton-Schulz, and writes rates.json to the "
    "cache folder ($MUON8BIT_CACHE, or ~/.cache/muon8bit). Optimizers that are made later on such a GPU choose their "
    "methods by it; MUON8BIT_RATES=FILE takes another file, MUON8BIT_RATES=builtin none. A resumed run keeps the table "
    "that it began with."
)


def add_parser(subparsers: _Subparsers) -> None:
    """Add `tune` to the command."""
    parser = subparsers.add_parser("tune", help="measure this GPU's rates, for later runs", description=_DESCRIPTION)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="print the table that new runs choose by; measure nothing")
    what.add_argument("--reset", action="store_true", help="delete this GPU's table; measure nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, show or delete the table; returns 0.

    Raises:
        UsageError: without a CUDA GPU, except for --show; for a job that fails; for a file that cannot be used.
    """
    from ..orthogonalize.rates_table import active_table, current_gpu, table_path, write_table

    if args.show:
        try:
            print(described(active_table()), end="")
        except ValueError as error:
            raise UsageError(f"muon8bit tune: {error}") from None
        return 0
    gpu = current_gpu()
    if gpu is None:
        raise UsageError("muon8bit tune: there is no CUDA GPU of NVIDIA's here, and rates are measured on one")
    path = table_path(gpu[1]["GPU"])
    if args.reset:
        existed = path.exists()
        path.unlink(missing_ok=True)
        print(f"deleted {path}" if existed else f"there is no {path}")
        return 0
    try:
        table = measured(*gpu)
        write_table(table, path)
    except RuntimeError as error:
        raise UsageError(f"muon8bit tune: {error}. Nothing was written") from None
    except OSError as error:
        raise UsageError(f"muon8bit tune: cannot write {path} ({error.strerror}): set MUON8BIT_CACHE") from None
    print(f"{described(table)}written to {path}")
    return 0


def measured(kind: str, facts: dict[str, str]) -> RatesTable:
    """Return the table of this GPU: its kind, its facts and today's date, and what was measured."""
    import torch

    from .. import tune
    from ..orthogonalize import RatesTable

    print(f"measuring {facts['GPU']}: about a minute", file=sys.stderr, flush=True)
    rates = tune.measure(tune.Clock(torch.device("cuda")), kind)
    return RatesTable(kind, rates, tuple(sorted({**facts, "date": date.today().isoformat()}.items())))


def described(table: RatesTable | None) -> str:
    """Return a table as lines of text: its fingerprint, what it was measured on, and its rates."""
    if table is None:
        return "the built-in table\n"
    lines = [f"table {table.fingerprint} of {table.kind}", *[f"  {name}: {value}" for name, value in table.about]]
    for name, value in asdict(table.rates).items():
        by_size = isinstance(value, tuple)
        text = ", ".join(f"{rate} from {n} rows" for n, rate in value) if by_size else str(value)
        lines.append(f"  {name}: {text}")
    return "\n".join(lines) + "\n"
