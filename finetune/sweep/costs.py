"""Core-hours of a sweep: measured of the runs that have ended, predicted of the others. No torch in here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.compare import align
from finetune.sweep.plan import Results, list_runs
from finetune.sweep.spec import Sweep, SweepArm, SweepRun

PROBE_STEPS = 4  # the first one allocates, and is left out
HOUR = 3600


@dataclass(frozen=True)
class RunCost:
    """CPU seconds of one run that is not done; None where they cannot be told. `basis` says out of what."""

    seconds: float | None
    basis: str


def probe_options(arm: SweepArm) -> dict[str, Any]:
    """Return options that make an arm's run a short one of `PROBE_STEPS` steps, validated once."""
    short = {"max_steps": PROBE_STEPS, "eval_every": PROBE_STEPS, "save_every": PROBE_STEPS, "warmup_steps": 0}
    return {**arm.options, **short, **({"decay_steps": 1} if arm.recipe.decay_steps else {})}


def finished_seconds(arm: SweepArm, results: Results) -> list[float]:
    """Return the CPU seconds of an arm's finished runs."""
    mine = (record for run, record in results.items() if run.arm == arm.name and record["status"] == "finished")
    return [record["metrics"]["core_seconds"] for record in mine]


def predict(arm: SweepArm, results: Results, probe: Mapping[str, Any] | None) -> RunCost:
    """Predict the CPU seconds of one run of an arm: the mean of its finished runs, else by its probe.

    Of a probe the steps and the validations are counted up to those of the run; what is left of it is set-up.
    """
    if seconds := finished_seconds(arm, results):
        return RunCost(statistics.fmean(seconds), f"{len(seconds)} finished")
    if probe is None:
        return RunCost(None, "nothing measured")
    if probe["status"] != "finished":
        return RunCost(None, f"its probe {probe['status']}: {probe['error']}")
    max_steps: int | None = vars(arm.recipe)["max_steps"]  # fine-tuning may count epochs instead
    if max_steps is None:
        return RunCost(None, "max_steps is not given")
    metrics = probe["metrics"]
    share = metrics["core_seconds"] / metrics["wall_seconds"]  # the clock runs on while the machine does other work
    validation = share * (metrics.get("evaluation_seconds") or 0.0)
    (_, first), *_, (last_step, last) = metrics["step_seconds"]
    step = share * (last - first) / (last_step - 1)
    validated = validation * len(metrics["validation_curve"])
    fixed = max(0.0, metrics["core_seconds"] - share * metrics["seconds"] - validated)
    validations = 1 + math.ceil(max_steps / arm.recipe.eval_every)
    total = fixed + step * max_steps + validation * validations
    return RunCost(total, f"probe, {PROBE_STEPS} steps")


def plan_table(
    sweep: Sweep,
    results: Results,
    probes: Mapping[str, Mapping[str, Any]],
    taken: Mapping[SweepRun, str],
    only: Sequence[str],
    processes: int,
) -> str:
    """Return the runs with their state, then core-hours by arm, measured and predicted.

    Args:
        sweep: the sweep.
        results: of its records.
        probes: arm -> record of its probe.
        taken: run -> the process that has it.
        only: of `list_runs`.
        processes: side by side.
    """
    costs = {arm.name: predict(arm, results, probes.get(arm.name)) for arm in sweep.arms.values()}
    rows = [("run", "state", "core-hours")]
    done: dict[str, float] = {}
    left: dict[str, list[SweepRun]] = {}
    for run in list_runs(sweep, results, only):
        record, cost = results.get(run), costs[run.arm].seconds
        rate = "best" if run.rate is None else f"{run.rate:g}"
        state, hours = "open", "-" if cost is None else f"~{cost / HOUR:.3f}"
        if record is not None:
            state, hours = record["status"], f"{record['metrics']['core_seconds'] / HOUR:.3f}"
            done[run.arm] = done.get(run.arm, 0.0) + record["metrics"]["core_seconds"]
        if run in taken:
            state = f"running: {taken[run]}"
        elif record is None or record["status"] == "failed":
            left.setdefault(run.arm, []).append(run)
        rows.append((f"{run.arm}, rate {rate}, seed {run.seed}", state, hours))
    arms = [("arm", "predicted by", "open", "core-hours of each", "measured", "to come")]
    to_come: list[float | None] = []
    for name in dict.fromkeys([*done, *left]):
        cost, number = costs[name].seconds, len(left.get(name, ()))
        to_come.append(0.0 if not number else None if cost is None else cost * number)
        each = "-" if cost is None else f"{cost / HOUR:.3f}"
        coming = "-" if to_come[-1] is None else f"{to_come[-1] / HOUR:.3f}"
        arms.append((name, costs[name].basis, str(number), each, f"{done.get(name, 0.0) / HOUR:.3f}", coming))
    unknown = " and what could not be predicted" if None in to_come else ""
    total = sum(seconds or 0.0 for seconds in to_come) / HOUR
    summary = (
        f"{sum(done.values()) / HOUR:.3f} core-hours measured; {total:.3f} predicted to come{unknown}: "
        f"{total / processes:.3f} hours with {processes} processes side by side"
    )
    return "\n\n".join([align(rows, left=2), align(arms, left=2), summary])
