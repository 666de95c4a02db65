"""Runs of the records by arm and seed, and what is computed of pairs of them. No torch in here."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.config.errors import InputError
from finetune.sweep.intervals import MeanInterval
from finetune.sweep.records import latest, loss_of, read_records

Record = Mapping[str, Any]
# Arm -> seed -> record, at the arm's one rate.
Arms = Mapping[str, Mapping[int, Record]]


def read_arms(file: Path) -> Arms:
    """Read the runs of a sweep that finished or diverged, of each arm at the rate that it was given to all seeds.

    That is the rate with most seeds, which the sweep chose as the best one; of equally many that of the lower loss.

    Raises:
        InputError: a line of the file is no record.
    """
    by_rate: dict[str, dict[float, dict[int, Record]]] = {}
    for run, record in latest(read_records(file)).items():
        if record["status"] != "failed" and run.rate is not None:
            by_rate.setdefault(run.arm, {}).setdefault(run.rate, {})[run.seed] = record
    return {arm: dict(sorted(max(rates.values(), key=_rank).items())) for arm, rates in by_rate.items()}


def _rank(runs: Mapping[int, Record]) -> tuple[int, float]:
    return len(runs), -statistics.fmean(loss_of(record) or math.inf for record in runs.values())


def differences(
    arms: Arms, arm: str, reference: str, value: Callable[[Record], float | None] = loss_of
) -> dict[int, float]:
    """Return arm minus reference by seed, over the seeds of both; not finite where one diverged.

    Args:
        arms: of `read_arms`.
        arm, reference: names; of one without records there are no differences.
        value: of a record; seeds where it is None are left out.
    """
    mine, theirs = arms.get(arm, {}), arms.get(reference, {})
    pairs = {seed: (value(mine[seed]), value(theirs[seed])) for seed in mine if seed in theirs}
    return {seed: a - b for seed, (a, b) in pairs.items() if a is not None and b is not None}


def shown_interval(interval: MeanInterval | None, digits: int = 4) -> tuple[str, str, str]:
    """Return mean, standard deviation and 95% interval as text, "-" where there is none."""
    if interval is None:
        return "-", "-", "-"
    mean = f"{interval.mean:+.{digits}f}"
    if interval.deviation is None or interval.ends is None:
        return mean, "-", "-"
    low, high = interval.ends
    return mean, f"{interval.deviation:.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}"


def fill_marks(page: str, names: Collection[str], make: Callable[[str], str]) -> str:
    """Return a page with what `make` gives for each of `names` between its marks.

    Those are `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        InputError: marks of another name.
    """

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in names:
            raise InputError("--page", f"has marks of the table {name!r}; the tables are {', '.join(names)}")
        return f"<!-- begin {name} -->\n\n{make(name)}\n\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", block, page, flags=re.DOTALL)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; "" without a row."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
