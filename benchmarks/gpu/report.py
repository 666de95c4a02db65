"""The short Markdown table of a record."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.gpu.acceptance import verdicts
from benchmarks.gpu.host_state import COPY, ON_HOST, PLACES
from benchmarks.gpu.optimizers import ARMS, LINEAR, MUON_BF16
from benchmarks.gpu.record import ABOUT, Record, as_number
from benchmarks.gpu.steps import FLOOR


def _table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    rows = [head, ["---"] * len(head), *[list(line) for line in lines]]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _short(text: str, digits: str = ".3g") -> str:
    value = as_number(text)
    return text if value is None else f"{value:{digits}}"


def _cases(record: Record, section: str) -> list[str]:
    return list(dict.fromkeys(row.case for row in record.rows if row.section == section))


def markdown(record: Record) -> str:
    """Return the facts of the run, targets, and a table for each section that was run."""
    title = "# Dry run on a CPU: nothing here is a measurement" if record.dry else "# Measured on a GPU"
    facts = [(row.metric, row.value) for row in record.rows if row.section == ABOUT]
    parts = [title + "\n", _table(["", ""], facts)]
    parts.append("## Targets\n")
    parts.append(
        _table(["target", "asked", "reached", ""], [(v.name, v.target, v.reached, v.verdict) for v in verdicts(record)])
    )
    sections = (_first, _ceilings, _steps, _shapes, _memory, _host, _momentum, _products, _paths, _recipes)
    parts += [part for section in sections for part in section(record)]
    return "\n".join(parts)


def _first(record: Record) -> list[str]:
    rows = record.find("first", "verdict")
    if not rows:
        return []
    lines = [[row.case, row.value, _short(record.text("first", "time", row.case, ""))] for row in rows]
    return ["## Checks of the first call\n", _table(["", "", "s, compilation included"], lines)]


def _memory(record: Record) -> list[str]:
    cases = _cases(record, "memory")
    if not cases:
        return []
    arms = list(dict.fromkeys(row.arm for row in record.find("memory", "extra memory")))
    lines = [[case, *[_short(record.text("memory", "extra memory", case, arm)) for arm in arms]] for case in cases]
    return ["## Peak inside `step()`, MiB\n", _table(["", *arms], lines)]


def _recipes(record: Record) -> list[str]:
    rows = record.find("recipes", "peak")
    if not rows:
        return []
    head = ["recipe", "optimizer", "peak, GiB", "estimate, GiB"]
    lines = [[r.case, r.arm, _short(r.value), _short(record.text("recipes", "estimate", r.case, r.arm))] for r in rows]
    return ["## Peaks of the recipes of record\n", _table(head, lines)]


def _ceilings(record: Record) -> list[str]:
    rows = record.find("ceilings", "rate")
    if not rows:
        return []
    return [
        "## Ceilings\n",
        _table(["", "rate", ""], [(r.case, _short(r.value, ".4g"), f"{r.unit}, {r.note}") for r in rows]),
    ]


def _steps(record: Record) -> list[str]:
    cases = _cases(record, "steps")
    if not cases:
        return []
    arms = [*ARMS, FLOOR]

    def lines(metric: str, names: Iterable[str]) -> list[list[str]]:
        return [[case, *[_short(record.text("steps", metric, case, arm)) for arm in names]] for case in cases]

    return [
        "## Step time, ms\n",
        "Median from an idle device, events around `step()`. The floor: the planner's operations and the least bytes, "
        "at this run's ceilings.\n",
        _table(["", *arms], lines("time", arms)),
        f"## Time over `{LINEAR}`\n",
        _table(["", *ARMS], lines("ratio", ARMS)),
        "## Time over the floor\n",
        _table(["", *ARMS], lines("over floor", ARMS)),
        "## Memory beside parameters, gradients and state, MiB\n",
        _table(["", *ARMS], lines("extra memory", ARMS)),
        "## Until `step()` returned, ms\n",
        _table(["", *ARMS], lines("host time", ARMS)),
    ]


def _shapes(record: Record) -> list[str]:
    cases = _cases(record, "shapes")
    if not cases:
        return []
    arms = list(dict.fromkeys(row.arm for row in record.find("shapes", "time")))
    lines = [
        [
            case,
            *[_short(record.text("shapes", "time", case, arm)) for arm in arms],
            _short(record.text("shapes", "ratio", case, MUON_BF16)),
        ]
        for case in cases
    ]
    return ["## Shape classes alone, ms\n", _table(["", *arms, f"{MUON_BF16} over {LINEAR}"], lines)]


def _host(record: Record) -> list[str]:
    cases = [case for case in _cases(record, "host") if case != COPY]
    if not cases:
        return []
    head = ["", *[f"{arm}: {metric}" for metric in ("ms", "MiB at the peak") for arm in PLACES], "ratio of times"]
    lines = [
        [
            case,
            *[_short(record.text("host", metric, case, arm)) for metric in ("time", "peak") for arm in PLACES],
            _short(record.text("host", "ratio", case, ON_HOST)),
        ]
        for case in cases
    ]
    rates = ", ".join(f"{_short(row.value)} GB/s {row.arm}" for row in record.find("host", "rate", case=COPY))
    return [
        "## State on the host\n",
        _table(head, lines),
        f"The peak is above parameters and gradients. Copies of pinned memory alone: {rates}.\n",
    ]


def _momentum(record: Record) -> list[str]:
    cases, arms = _cases(record, "momentum"), ["stats", "apply", "both"]
    if not cases:
        return []
    lines = [[case, *[_short(record.text("momentum", "of copy", case, arm)) for arm in arms]] for case in cases]
    return ["## Momentum kernels, part of the copy's bandwidth\n", _table(["", *arms], lines)]


def _products(record: Record) -> list[str]:
    cases = _cases(record, "products")
    if not cases:
        return []
    lines = [
        [
            case,
            *[_short(record.text("products", "rate", case, arm)) for arm in ("symmetric", "vendor")],
            _short(record.text("products", "gain", case, "symmetric")),
        ]
        for case in cases
    ]
    head = ["", "symmetric", "vendor", "vendor's time over it"]
    row = record.text("rates", "row", record.text(ABOUT, "kind", "run", ""), "tune")
    return [
        "## X X^T, TFLOP/s of 2 n^3\n",
        _table(head, lines),
        f"Row that the steps chose by, as `muon8bit tune` measures it: `{row}`\n",
    ]


def _paths(record: Record) -> list[str]:
    cases = _cases(record, "paths")
    if not cases:
        return []
    arms = list(dict.fromkeys(row.arm for row in record.find("paths", "time")))
    lines = [[case, *[_short(record.text("paths", "time", case, arm)) for arm in arms]] for case in cases]
    return ["## Orthogonalizations, ms\n", _table(["", *arms], lines)]
