"""Rows of a run, their CSV file, and what of an earlier file of the same day and GPU is kept."""

from __future__ import annotations

import csv
import re
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from muon8bit.tune.timing import FAILED

DRY = "dry run"
# How a process says that a package is not there: Python, the scripts, an option of theirs.
_MISSING = r"No module named '(\w+)|the scripts need (\w+(?:, \w+)*):|needs (bitsandbytes)"
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
    that one day's run can be made in several calls. With a limit, a call begins no case that could outlast it, and the
    next call goes on with the cases that are left.

    Attributes:
        left: sections with cases that did not fit into the limit.
    """

    def __init__(self, path: Path, dry: bool, limit_s: float | None = None) -> None:
        self.path, self.dry, self.rows = path, dry, list[Measurement]()
        self.left: list[str] = []
        self._limit_s, self._start, self._longest = limit_s, time.monotonic(), 0.0
        self._case_start: float | None = None
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

    def begins(self, section: str, case: str) -> bool:
        """Return whether a case is to be run now; not if it has been or, with a limit, the time is too short.

        What an earlier case of this call took is what this one is given.
        """
        now = time.monotonic()
        if self._case_start is not None:
            self._longest = max(self._longest, now - self._case_start)
            self._case_start = None
        rows = [row for row in self.rows if (row.section, row.case) == (section, case)]
        if rows and not any(row.value.startswith(FAILED) for row in rows):
            return False
        if self._limit_s is not None and now - self._start + self._longest > self._limit_s:
            self.left += [section] * (section not in self.left)
            return False
        self.rows = [row for row in self.rows if row not in rows]
        self._case_start = now
        return True

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


def missing_package(text: str) -> str | None:
    """Return the packages that a process which failed says it needs, None if it failed for another reason."""
    found = re.search(_MISSING, text)
    return None if found is None else next(group for group in found.groups() if group)
