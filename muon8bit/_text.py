"""Names of parameters and tables, as people read them.

Names are without what wrappers put into them, so that a wrapped and a plain model agree. Repeated layers are one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

# Segments that torch.compile, FSDP1 and activation checkpointing add, anywhere in a name.
_PRIVATE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# DDP's, DataParallel's and DeepSpeed's. A model may call a part of its own so: see `unwrapper`.
_MODULE = "module"
# A segment that is a number.
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def unwrapper(names: Iterable[str]) -> Callable[[str], str]:
    """Return the function that takes wrappers' segments out of the names of one model, of parameters or modules.

    `module` is taken for a wrapper's where every name begins with it. A name is left as it is where two would become
    equal.

    Args:
        names: qualified names of all the model's parameters.

    Source: the prefixes are those of torch 2.11's `nn.Module.state_dict` under each wrapper.
    """
    names = list(dict.fromkeys(names))
    plain = [_without(name, _PRIVATE) for name in names]
    depth = min((_leading_modules(name) for name in plain), default=0)

    def unwrapped(name: str) -> str:
        parts = _without(name, _PRIVATE).split(".")
        return ".".join(parts[depth:]) if parts[:depth] == [_MODULE] * depth else ".".join(parts)

    return unwrapped if len({unwrapped(name) for name in names}) == len(names) else lambda name: name


def is_same(name: str, other: str) -> bool:
    """Return whether two names are equal but for wrappers' segments, `module` anywhere included."""
    return name == other or _without(name, (*_PRIVATE, _MODULE)) == _without(other, (*_PRIVATE, _MODULE))


def _without(name: str, segments: tuple[str, ...]) -> str:
    return ".".join(part for part in name.split(".") if part not in segments)


def _leading_modules(name: str) -> int:
    """Count the segments `module` that a parameter's name begins with, its last segment left out."""
    parts = name.split(".")[:-1]
    return next((i for i, part in enumerate(parts) if part != _MODULE), len(parts))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 tensor`, `2 tensors`."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def format_bytes(num_bytes: int) -> str:
    """Format bytes with thousands separators and, from 1024 on, in binary units: `1,051,648 B (1.00 MiB)`."""
    for size, unit in _UNITS:
        if num_bytes >= size:
            return f"{num_bytes:,} B ({num_bytes / size:.2f} {unit})"
    return f"{num_bytes:,} B"


def gib(num_bytes: int) -> str:
    """Format bytes in GiB, or below a tenth of one in MiB, or of that in KiB: `14.96 GiB`."""
    size, unit = next((each for each in _UNITS[1:3] if abs(num_bytes) >= each[0] / 10), _UNITS[3])
    return f"{num_bytes / size:,.2f} {unit}"


def render(header: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Render a table with one line per row; `align` has one `<` or `>` per column; no trailing blanks."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths, strict=True)).rstrip()
        for line in lines
    )


def in_pieces(sizes: Sequence[int]) -> str:
    """Return `16 + 8 + 8`, or for more than three pieces that repeat `128 x 16` or `64 x (128 + 64)`."""
    for period in (1, 2):
        times, rest = divmod(len(sizes), period)
        if len(sizes) > 3 and not rest and tuple(sizes) == tuple(sizes[:period]) * times:
            return f"{times} x " + (str(sizes[0]) if period == 1 else f"({sizes[0]} + {sizes[1]})")
    return " + ".join(map(str, sizes))


def in_short(value: object) -> str:
    """Return `repr(value)`; of sizes of more than four pieces what `in_pieces` says."""
    is_long = isinstance(value, tuple) and len(value) > 4 and all(type(size) is int for size in value)
    return in_pieces(value) if is_long else repr(value)  # type: ignore[arg-type]


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
