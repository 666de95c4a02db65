"""Record of a screen: a row for each class, the file of rows, and the table made of them."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

BUILT, NO_MATRIX = "built", "built, nothing for Muon"


@dataclass(frozen=True)
class Row:
    """Result of one class.

    `outcome`: built, or the reason why not; the numbers are of parameters; `lost` are matrices of attention and MLP
    that AdamW has; `faults` are `kind: name [shape]`, joined by `; `.
    """

    module: str
    name: str
    outcome: str
    muon: int = 0
    adamw: int = 0
    flagged: int = 0
    lost: int = 0
    faults: str = ""

    @property
    def is_built(self) -> bool:
        """Whether there was a model to route."""
        return self.outcome in (BUILT, NO_MATRIX)


def read(path: Path) -> tuple[str, list[Row]]:
    """Return the first line of a record, and its rows."""
    if not path.exists():
        return "", []
    with path.open(newline="") as file:
        first = file.readline().strip()
        numbers = [field.name for field in fields(Row) if field.type == "int"]
        return first, [Row(**row | {key: int(row[key]) for key in numbers}) for row in csv.DictReader(file)]


def table(first: str, rows: Iterable[Row]) -> str:
    """Return the Markdown table of a finished record."""
    rows = list(rows)
    built = [row for row in rows if row.is_built]
    faults = [(fault, row.name) for row in built for fault in row.faults.split("; ") if fault]
    reasons = Counter(row.outcome for row in rows if not row.is_built)
    releases = first.removeprefix("# ").rpartition(", sources")[0]
    num_faulty = len({name for _, name in faults})
    lines = [
        "# Routes of every model class of transformers",
        "",
        f"{releases}. Made by `python -m benchmarks.robustness.routing_screen`.",
        "A line for each class is in `routing_screen.csv`.",
        "",
        "| | classes |",
        "| --- | ---: |",
        f"| model classes of transformers, a module that cannot be imported as one | {len(rows)} |",
        f"| built on the meta device at default widths, of 8 layers | {len(built)} |",
        f"| of these with matrices for Muon | {sum(row.outcome == BUILT for row in built)} |",
        f"| parameters that went to Muon, to AdamW | {sum(r.muon for r in built):,}, {sum(r.adamw for r in built):,} |",
        f"| classes with a parameter that the second rule would not give to Muon, or not decay | {num_faulty} |",
        f"| classes with matrices of attention or MLP that AdamW has | {sum(row.lost > 0 for row in built)} |",
        "",
        "## Found by the second rule",
        "",
        *(f"- {name}: {fault}" for fault, name in faults),
        *(["Nothing."] if not faults else []),
        "",
        "## Matrices of attention and MLP that AdamW has",
        "",
        *(f"- {row.name}: {row.lost}" for row in built if row.lost),
        *(["None."] if not any(row.lost for row in built) else []),
        "",
        "## Not built",
        "",
        "| reason | classes | which |",
        "| --- | ---: | --- |",
    ]
    for reason, count in reasons.most_common():
        names = ", ".join(row.name if row.name != "*" else row.module for row in rows if row.outcome == reason)
        lines.append(f"| {reason.replace('|', '/')} | {count} | {names} |")
    return "\n".join(lines) + "\n"
