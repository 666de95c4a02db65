"""Rows of a run, their CSV file, and what of an earlier file of the same day and GPU is kept."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from muon8bit.tune.timing import FAILED

DRY = "dry run"
ABOUT = "about"  # the section of what figures depend on


@dataclass(frozen=True)
class Measurement:
    """One figure. `value` is a number, or the words that stand in its place: not installed, does not fit, dry run."""

    section: str
    case: str
    arm: str
    metric: str
    value: str
    unit: str
    note: str = ""


class Record:
    """Rows in the order they came, written to `path` after each section.

    With `dry` every measured figure is written as "dry run". Rows of sections that are not run again are kept, so
    that one day's run can be made in several calls.
    """

    def __init__(self, path: Path, dry: bool) -> None:
        self.path, self.dry, self.rows = path, dry, list[Measurement]()
        if path.exists():
            with path.open(newline="") as file:
                self.rows = [Measurement(**row) for row in csv.DictReader(file)]

    def about(self, facts: dict[str, str], command: str) -> None:
        """Add what the figures depend on, and the command, one of a few.

        Raises:
            ValueError: if an earlier call in the same file had other facts.
        """
        known = {row.metric: row.value for row in self.rows if row.section == ABOUT and row.metric != "command"}
        if known and known != facts:
            raise ValueError(f"{self.path} is of {known}, this is {facts}: give another --out")
        wanted = [
            Measurement(ABOUT, "run", "", name, value, "") for name, value in [*facts.items(), ("command", command)]
        ]
        earlier = [row for row in self.rows if row.section == ABOUT]
        self.rows = earlier + [row for row in wanted if row not in earlier] + self.rows[len(earlier) :]

    def failed(self) -> bool:
        """Return whether an arm raised."""
        return any(row.value.startswith(FAILED) for row in self.rows)

    def restart(self, section: str) -> None:
        """Forget what an earlier call found in this section."""
        self.rows = [row for row in self.rows if row.section != section]

    def measured(
        self, section: str, case: str, arm: str, metric: str, value: float | str, unit: str, note: str = ""
    ) -> None:
        """Add a figure of this run; words stay words."""
        text = value if isinstance(value, str) else DRY if self.dry else f"{value:.6g}"
        self.rows.append(Measurement(section, case, arm, metric, text, unit, note))

    def counted(self, section: str, case: str, arm: str, metric: str, value: float, unit: str, note: str = "") -> None:
        """Add a figure that no clock had a part in: the same on every machine."""
        self.rows.append(Measurement(section, case, arm, metric, f"{value:.6g}", unit, note))

    def find(self, section: str, metric: str, *, case: str | None = None, arm: str | None = None) -> list[Measurement]:
        return [
            row
            for row in self.rows
            if (row.section, row.metric) == (section, metric) and case in (None, row.case) and arm in (None, row.arm)
        ]

    def text(self, section: str, metric: str, case: str, arm: str) -> str:
        """Return the value as written, "-" where there is none."""
        return next((row.value for row in self.find(section, metric, case=case, arm=arm)), "-")

    def number(self, section: str, metric: str, case: str, arm: str) -> float | None:
        """Return the value, None where there is none or it is no number."""
        return as_number(self.text(section, metric, case, arm))

    def write(self) -> None:
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Measurement)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)


def as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
