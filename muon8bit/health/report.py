"""Report of a run's quantization health: a table, a record, and the warning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .._text import counted, render
from .measures import MatrixHealth


class QuantizationWarning(UserWarning):
    """A matrix whose updates lose to the 8 bits of its momentum more than those of sound runs do."""


@dataclass(frozen=True)
class HealthReport:
    """Measurements of a run so far; `str()` is a table.

    Attributes:
        last: the last measures of each matrix.
        worst: those at which it kept least of the descent.
        warnings: name of a matrix that was below the threshold -> the sentence that was said.
        num_steps: the steps that were seen, without skipped ones.
        num_skipped: those.
        every: the steps from one measurement to the next.
        shadow_bytes: of the fp32 momenta.
        notes: what there is to know about where the fp32 momenta began.
    """

    last: tuple[MatrixHealth, ...]
    worst: tuple[MatrixHealth, ...]
    warnings: dict[str, str]
    num_steps: int
    num_skipped: int
    every: int
    shadow_bytes: int
    notes: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether no matrix of the sample was ever below the threshold."""
        return not self.warnings

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able record: the fields and, under `last` and `worst`, measures by name."""
        return asdict(self) | {key: {of.name: asdict(of) for of in getattr(self, key)} for key in ("last", "worst")}

    def __str__(self) -> str:
        header = ("matrix", "shape", "momentum", "step", "descent", "cosine", "error", "flips", "zeros", "ends")
        worst = {of.name: of for of in self.worst}
        rows = [row for of in self.last for row in _rows(of, worst[of.name])]
        lines = [render(header, rows, "<<<>>>>>>>")] if rows else [f"nothing is measured before step {self.every}"]
        lines += [
            "",
            f"{counted(self.num_steps, 'step')}, measured every {self.every}; fp32 momenta of {self.shadow_bytes:,} B",
        ]
        lines += [f"not counted: {counted(self.num_skipped, 'skipped step')}"] if self.num_skipped else []
        lines += self.notes
        lines += self.warnings.values()
        if rows and self.is_sound:
            least = max(of.min_descent for of in self.last)
            lines.append(f"sound: each update keeps at least {least:.0%} of the descent")
        return "\n".join(lines)


def _rows(last: MatrixHealth, worst: MatrixHealth) -> Sequence[tuple[str, ...]]:
    """Return the cells of a matrix, and of its worst step where that is another one."""
    rows = []
    for of, name in ((last, last.name), (worst, "  its worst")):
        if name == last.name or of.step != last.step:
            shares = (of.momentum_error, of.sign_flips, of.zero_codes, of.extreme_codes)
            shape, form = " x ".join(map(str, of.shape)), of.format.removeprefix("bits=8, ")
            mark = "" if of.is_sound else " !"
            cells = (f"{of.descent:.2%}{mark}", f"{of.update_cosine:.3f}", *(f"{share:.2%}" for share in shares))
            rows.append((name, *((shape, form) if name == last.name else ("", "")), str(of.step), *cells))
    return rows


def warning(of: MatrixHealth, keys: str, pattern: str | None) -> str:
    """Return the sentence that names a matrix, what is wrong, and what to change.

    Args:
        of: its measures.
        keys: the keys of a group that would help, as `advice` gives them.
        pattern: the parameter's name; None where the optimizer was given no names.
    """
    place = "by a group of its own with these keys"
    if pattern is not None:
        place = f'by param_groups(model, patterns=[("{pattern}", {keys})], ...)'
    return (
        f"{of.name}: in 8 bits ({of.format.removeprefix('bits=8, ')}) its update keeps {of.descent:.1%} of the "
        f"descent at watched step {of.step}, where sound runs keep more than {of.min_descent:.0%} (cosine "
        f"{of.update_cosine:.2f}, {of.sign_flips:.1%} of the signs flipped). Better for it: {keys}, {place}"
    )
