"""The acceptance targets on a Hopper GPU, bf16, and what a record says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.gpu.optimizers import ADAMUON, BITS32, DYNAMIC, LINEAR, MUON_BF16, NORMUON
from benchmarks.gpu.record import DRY, Measurement, Record, as_number
from benchmarks.gpu.steps import FLOOR
from benchmarks.gpu.workloads import LORA, MODELS, MOE, shape_classes
from muon8bit.config import DEFAULT_WORKSPACE_BYTES

# Part of the planner's FLOP ceiling over torch.optim.Muon that a whole step must reach.
OF_CEILING = 0.85
NOT_RUN = "not run"


@dataclass(frozen=True)
class TargetCheck:
    """One target: what is asked, what was reached (a number with its unit, or why there is none), pass or miss."""

    name: str
    target: str
    reached: str
    verdict: str


def _judge(
    name: str, rows: Iterable[Measurement], worst: Callable[[Iterable[float]], float], bound: float, unit: str
) -> TargetCheck:
    """Compare the worst of `rows` with `bound`: with `worst=min` it must be at least that, with `max` at most.

    A row without a number, or no row at all, is no pass.
    """
    rows, sign = list(rows), "at least" if worst is min else "at most"
    target = f"{sign} {bound:.4g}{unit}"
    words = [row.value for row in rows if as_number(row.value) is None]
    if not rows or words:
        reached = words[0] if words else NOT_RUN
        return TargetCheck(name, target, reached, DRY if reached == DRY else NOT_RUN if reached == NOT_RUN else "miss")
    value = worst(float(row.value) for row in rows)
    where = next(f"{row.case}, {row.arm}" for row in rows if float(row.value) == value)
    passed = value >= bound if worst is min else value <= bound
    shown = f"{value:.4g}{unit}" + (f" ({where})" if len(rows) > 1 else "")
    return TargetCheck(name, target, shown, "pass" if passed else "miss")


def verdicts(record: Record) -> list[TargetCheck]:
    """Return every target of the acceptance, in its order."""
    result = [_first(record), _tests(record)]
    for case in (*MODELS, MOE):
        ceiling = record.number("steps", "FLOP ceiling", case, FLOOR)
        if ceiling is None:
            result.append(
                TargetCheck(f"{case}, over torch Muon", f"{OF_CEILING} of the FLOP ceiling", NOT_RUN, NOT_RUN)
            )
            continue
        rows = record.find("steps", "ratio", case=case, arm=MUON_BF16)
        name = f"{case}, over torch Muon ({OF_CEILING} of the FLOP ceiling {ceiling:.2f})"
        result.append(_judge(name, rows, min, OF_CEILING * ceiling, "x"))
    classes = [workload.name for workload in shape_classes(record.dry)]
    squares = [name for name in classes if _is_square_class(name)]
    ratios = record.find("shapes", "ratio", arm=MUON_BF16)
    result.append(_judge("squares alone", [row for row in ratios if row.case in squares], min, 1.25, "x"))
    result.append(_judge("every shape class alone", ratios, min, 1.0, "x"))
    for codebook in ("linear", "dynamic"):
        rows = [
            row
            for row in record.find("momentum", "of copy")
            if row.case.startswith(codebook) and row.arm != "both" and int(row.case.split()[-1]) >= 256
        ]
        result.append(_judge(f"momentum kernels, {codebook}, blocks from 256", rows, min, 0.75, " of copy bandwidth"))
    for arm in (LINEAR, DYNAMIC):
        result.append(_judge(f"{arm}, time over bits=32", _over_bits32(record, arm), max, 1.0, "x"))
    lora = record.find("steps", "ratio", case=LORA, arm=MUON_BF16)
    result.append(_judge("LoRA, over torch Muon", lora, min, 20.0, "x"))
    arms = (LINEAR, DYNAMIC, BITS32, NORMUON, ADAMUON)
    extra = [row for arm in arms for name in ("steps", "memory") for row in record.find(name, "extra memory", arm=arm)]
    result.append(_judge("memory beside the state", extra, max, DEFAULT_WORKSPACE_BYTES / 2**20, " MiB"))
    for row in record.find("recipes", "at most"):
        peaks = record.find("recipes", "peak", case=row.case)
        result.append(_judge(f"{row.case}, peak", peaks, max, float(row.value), " GiB"))
    return result


def _is_square_class(name: str) -> bool:
    number, _, shape = name.partition(" x ")
    rows, cols = shape.strip("()").split(", ")
    return rows == cols and number != "1"


def _first(record: Record) -> TargetCheck:
    """Check that every check of the first call passed; one that lacks a package is no miss."""
    name, target = "checks of the first call", "all pass"
    verdicts = [row.value for row in record.find("first", "verdict")]
    if not verdicts:
        return TargetCheck(name, target, NOT_RUN, NOT_RUN)
    passed, skipped = verdicts.count("passed"), sum(verdict.startswith("skipped") for verdict in verdicts)
    reached = f"{passed} passed, {skipped} skipped, {len(verdicts) - passed - skipped} not passed"
    if record.dry:
        return TargetCheck(name, target, DRY, DRY)
    return TargetCheck(name, target, reached, "pass" if passed and passed + skipped == len(verdicts) else "miss")


def _tests(record: Record) -> TargetCheck:
    """Check that every decisive GPU test ran and passed, and no other failed."""
    name, target = "tests marked gpu", "the decisive pass, no other fails"
    counts = {row.arm: row.value for row in record.find("correctness", "tests")}
    if not counts:
        return TargetCheck(name, target, NOT_RUN, NOT_RUN)
    reached = ", ".join(f"{value} {word}" for word, value in counts.items())
    if record.dry:
        return TargetCheck(name, target, DRY, DRY)
    good = counts["passed"] != "0" and all(counts[w] == "0" for w in ("failed", "errors", "decisive, not passed"))
    return TargetCheck(name, target, reached, "pass" if good else "miss")


def _over_bits32(record: Record, arm: str) -> list[Measurement]:
    """Return the time of `arm` over that of bits=32, a row for each workload."""
    result = []
    for row in record.find("steps", "time", arm=arm):
        ours, theirs = as_number(row.value), record.number("steps", "time", row.case, BITS32)
        value = row.value if ours is None else NOT_RUN if theirs is None else f"{ours / theirs:.6g}"
        result.append(Measurement("steps", row.case, arm, "over bits=32", value, "times"))
    return result
