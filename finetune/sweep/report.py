"""Tables of a sweep's results, out of its records and of nothing else. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.compare import align
from finetune.sweep.intervals import MeanInterval, interval_of
from finetune.sweep.plan import RateChoice, Results, choose_rate, list_runs
from finetune.sweep.records import loss_of
from finetune.sweep.spec import Sweep, SweepArm, SweepRun


@dataclass(frozen=True)
class ArmResult:
    """One arm at its best rate.

    Args:
        arm: the arm.
        choice: the search for its rate.
        losses: seed -> validation loss at the best rate, infinite where it diverged; of the seeds that are done.
        summary: of these losses; None where there is none, or one is infinite.
    """

    arm: SweepArm
    choice: RateChoice
    losses: Mapping[int, float]
    summary: MeanInterval | None


@dataclass(frozen=True)
class PairedResult:
    """Differences of an arm's losses to those of its reference, both at their best rates, over the seeds of both.

    Args:
        arm, reference: names.
        differences: seed -> arm minus reference; not finite where one diverged.
        summary: of the differences; None where there is none, or one is not finite.
    """

    arm: str
    reference: str
    differences: Mapping[int, float]
    summary: MeanInterval | None


def summarize_arm(sweep: Sweep, arm: SweepArm, results: Results) -> ArmResult:
    """Return an arm's losses at its best rate."""
    choice = choose_rate(sweep, arm, results)
    losses: dict[int, float] = {}
    if choice.best is not None:
        for seed in arm.seeds:
            loss = loss_of(results.get(SweepRun(arm.name, choice.best, seed)))
            if loss is not None:
                losses[seed] = loss
    return ArmResult(arm, choice, losses, interval_of(losses))


def compare_pairs(result: ArmResult, reference: ArmResult) -> PairedResult:
    """Return the differences of two arms, seed by seed."""
    seeds = [seed for seed in result.losses if seed in reference.losses]
    differences = {seed: result.losses[seed] - reference.losses[seed] for seed in seeds}
    return PairedResult(result.arm.name, reference.arm.name, differences, interval_of(differences))


def report(sweep: Sweep, results: Results) -> str:
    """Return the tables: rates, arms at their best rate, differences by seed; then what is missing or went wrong."""
    arms = {name: summarize_arm(sweep, arm, results) for name, arm in sweep.arms.items()}
    parts = [_rates(sweep, list(arms.values())), _arms(list(arms.values()), results)]
    if sweep.paired:
        pairs = [compare_pairs(result, arms[result.arm.reference]) for result in arms.values() if result.arm.reference]
        parts.append(_pairs(pairs))
    return "\n\n".join([*parts, *_notes(sweep, arms, results)])


def _shown(loss: float | None) -> str:
    return "-" if loss is None else "diverged" if loss == math.inf else f"{loss:.4f}"


def _rates(sweep: Sweep, arms: Sequence[ArmResult]) -> str:
    """Return the losses of all rates; the best has a star."""
    on = "means over all seeds" if sweep.rates_on_seed is None else f"on seed {sweep.rates_on_seed}"
    rows = [("arm", "rate", "loss", "")]
    for result in arms:
        for rate, loss in result.choice.losses.items() if result.choice.follows is None else ():
            star = "*" if rate == result.choice.best else ""
            rows.append((result.arm.name, f"{rate:g}", _shown(loss), star))
    return f"validation loss by rate, {on}; * the best\n{align(rows, left=1)}"


def _arms(arms: Sequence[ArmResult], results: Results) -> str:
    rows = [("arm", "best rate", "interior", "seeds", "mean", "SD", "state bytes", "CPU s a run")]
    for result in arms:
        choice, summary = result.choice, result.summary
        records = [results[SweepRun(result.arm.name, choice.best, seed)] for seed in result.losses]
        found = [r["metrics"] for r in records if r["status"] == "finished"]
        interior = {None: "one rate", True: "yes", False: "NO"}[choice.is_interior]
        if choice.best is None or choice.follows:
            interior = "-" if choice.best is None else f"as {choice.follows}"
        deviation = None if summary is None else summary.deviation
        rows.append(
            (
                result.arm.name,
                "-" if choice.best is None else f"{choice.best:g}",
                interior,
                f"{len(result.losses)} of {len(result.arm.seeds)}",
                "-" if summary is None else f"{summary.mean:.4f}",
                "-" if deviation is None else f"{deviation:.4f}",
                f"{found[0]['state_bytes']:,}" if found else "-",
                f"{sum(m['core_seconds'] for m in found) / len(found):.0f}" if found else "-",
            )
        )
    return f"validation loss at the best rate, over seeds\n{align(rows, left=1)}"


def _pairs(pairs: Sequence[PairedResult]) -> str:
    rows = [("arm", "minus", "pairs", "mean", "SD", "95% interval", "by seed")]
    for pair in pairs:
        summary = pair.summary
        ends = None if summary is None else summary.ends
        by_seed = ", ".join(f"{value:+.4f}" for value in pair.differences.values())
        rows.append(
            (
                pair.arm,
                pair.reference,
                str(len(pair.differences)),
                "-" if summary is None else f"{summary.mean:+.4f}",
                "-" if summary is None or summary.deviation is None else f"{summary.deviation:.4f}",
                "-" if ends is None else f"{ends[0]:+.4f} to {ends[1]:+.4f}",
                by_seed or "-",
            )
        )
    return f"differences of losses, seed by seed, with a 95% t-interval of their mean\n{align(rows, left=2)}"


def _notes(sweep: Sweep, arms: Mapping[str, ArmResult], results: Results) -> list[str]:
    """Return what a reader of the tables must know: failures, divergence, what is open, runs that were not alike."""
    lines = [f"{name}: {result.choice.obstacle}" for name, result in arms.items() if result.choice.obstacle]
    lines += [_ended(run, record) for run, record in results.items() if record["status"] != "finished"]
    runs = list_runs(sweep, results)
    left = [run for run in runs if results.get(run) is None]
    if left:
        lines.append(f"open: {len(left)} of {len(runs)} runs")
    others = sorted({run.arm for run in results if run.arm not in sweep.arms})
    if others:
        lines.append(f"left out, of arms that the sweep no longer has: {', '.join(others)}")
    lines += _unlike([record for run, record in results.items() if run.arm in sweep.arms])
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _ended(run: SweepRun, record: Mapping[str, Any]) -> str:
    name = f"{run.arm}, rate {run.rate:g}, seed {run.seed}"
    return f"{name} {record['status']}: {record['error']}"


def _unlike(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each thing in which finished runs that are compared differ."""
    finished = [record for record in records if record["status"] == "finished"]
    lines = []
    for key, text in {
        "data_hash": "data: their losses do not compare",
        "threads": "numbers of threads",
        "commit": "commits",
        "versions": "versions of the software",
    }.items():
        values = {str(record[key]) for record in finished}
        if len(values) > 1:
            lines.append(f"the runs are of {len(values)} {text}")
    if any(record["dirty"] for record in finished):
        lines.append("some runs were of code that was not committed")
    return lines
