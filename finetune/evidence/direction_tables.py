"""Tables of what 8-bit codes cost the direction after Newton-Schulz along a run, out of the records. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from finetune.evidence.arms import markdown

BLOCKS = (64, 256, 2048)
LONGER = (4096, 8192)
CODEBOOKS = ("linear", "dynamic")
WARM_UP = "warm-up"
ERROR = 5  # place of Muon's error among the values of a format
OUTPUTS = ("MLP out", "expert out")  # matrices whose columns are neurons

Matrix = Mapping[str, Any]
WAYS = (
    "linear",
    "dynamic",
    "dynamic for output projections of MLPs and experts",
    "of each matrix the better one at the end of the warm-up",
    "of each matrix the better one at each time",
)


def read_matrices(file: Path) -> list[Matrix]:
    """Return the matrices of a record of `benchmarks.robustness.sign_flips`, each at one phase of a run."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def error_of(matrix: Matrix, codebook: str, block: int) -> float:
    """Return the error of O over its norm in a format; in a row that is shorter the longest block that was measured."""
    values = matrix["values"]
    known = [int(name.split()[1]) for name in values if name.startswith(f"{codebook} ")]
    return float(values[f"{codebook} {max(size for size in known if size <= block)}"][ERROR])


def errors_by_way(matrices: Sequence[Matrix]) -> dict[str, list[tuple[str, float]]]:
    """Return way to choose a codebook -> the model and the error of each matrix behind the warm-up, longest blocks."""

    def errors(matrix: Matrix) -> list[float]:
        return [error_of(matrix, codebook, BLOCKS[-1]) for codebook in CODEBOOKS]

    before = {(of["model"], of["kind"]): errors(of) for of in matrices if of["phase"] == WARM_UP}
    found: dict[str, list[tuple[str, float]]] = {way: [] for way in WAYS}
    for of in (of for of in matrices if of["phase"] != WARM_UP):
        (linear, dynamic), (was_linear, was_dynamic) = errors(of), before[of["model"], of["kind"]]
        by_kind = dynamic if of["kind"] in OUTPUTS else linear
        by_warm_up = dynamic if was_dynamic < was_linear else linear
        for way, error in zip(WAYS, (linear, dynamic, by_kind, by_warm_up, min(linear, dynamic)), strict=True):
            found[way].append((of["model"], error))
    return found


def direction_tables(matrices: Sequence[Matrix]) -> str:
    """Return the error of O by kind of matrix, by phase, and by the way in which codebooks are chosen."""
    models = list(dict.fromkeys(of["model"] for of in matrices))
    ways = [
        [way, *(_shown([e for name, e in errors if name in of]) for of in (models, *([name] for name in models)))]
        for way, errors in errors_by_way(matrices).items()
    ]
    return "\n\n".join(
        [
            "Mean, and in parentheses the most, of a kind of matrix:",
            _table(matrices, "kind", BLOCKS),
            "Over a run, at the end of its warm-up, in its middle and at its end:",
            _table(matrices, "phase", BLOCKS),
            "Ways to choose the codebook, blocks of 2048, in the middle and at the end of a run, by model:",
            markdown(["codebook", "all", *models], ways),
        ]
    )


def long_rows_table(matrices: Sequence[Matrix]) -> str:
    """Return the error of O of matrices whose rows are longer than the longest of `BLOCKS`, up to one block a row."""
    long = [{**of, "kind, columns": f"{of['kind']}, {of['cols']}"} for of in matrices if of["cols"] > BLOCKS[-1]]
    return _table(long, "kind, columns", (*BLOCKS, *LONGER))


def _table(matrices: Sequence[Matrix], key: str, blocks: Sequence[int]) -> str:
    formats = [(codebook, block) for codebook in CODEBOOKS for block in blocks]
    rows = []
    for value in dict.fromkeys(of[key] for of in matrices):
        members = [of for of in matrices if of[key] == value]
        rows.append([value, *(_shown([error_of(of, *form) for of in members]) for form in formats)])
    return markdown([key, *(f"{codebook} {block}" for codebook, block in formats)], rows)


def _shown(errors: Sequence[float]) -> str:
    return f"{100 * fmean(errors):.0f}% ({100 * max(errors):.0f}%)"
