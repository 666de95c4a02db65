"""ASCII tables, sizes in bytes and names of repeated layers, for the routing table and the report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def format_bytes(num_bytes: int) -> str:
    """Format bytes with thousands separators and, from 1024 on, in binary units: `1,051,648 B (1.00 MiB)`."""
    for size, unit in _UNITS:
        if num_bytes >= size:
            return f"{num_bytes:,} B ({num_bytes / size:.2f} {unit})"
    return f"{num_bytes:,} B"


def render(header: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Render a table with one line per row; `align` has one `<` or `>` per column; no trailing blanks."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths, strict=True)).rstrip()
        for line in lines
    )


def template(name: str) -> str:
    """Replace every all-digit component of `name` by `{}`, so that the repeated layers of a model become equal."""
    return _INDEX.sub("{}", name)


def collapse(names: Sequence[str]) -> str:
    """Return one name for names of one template: `layers.{0..11}.mlp.weight x12`; a single name stays as it is."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(_INDEX.findall(name) for name in names), strict=True)
    filled = [_ranges({int(index) for index in column}) for column in columns]
    return f"{template(names[0]).format(*filled)} x{len(names)}"


def _ranges(indices: set[int]) -> str:
    """Format {0, 2, 3, 4, 5} as `{0,2..5}`; a single index stands bare."""
    if len(indices) == 1:
        return str(next(iter(indices)))
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    parts = (str(a) if a == b else f"{a},{b}" if b == a + 1 else f"{a}..{b}" for a, b in runs)
    return "{" + ",".join(parts) + "}"
