"""Tables of losses: parity, family, controls, horizons, deciles. Out of the records and nothing else. No torch."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from finetune.evidence.arms import Arms, Record, differences, markdown, shown_interval
from finetune.sweep.intervals import interval_of, mean_interval, t_quantile
from finetune.sweep.records import loss_of
from finetune.sweep.transfer import WidthSeries, slopes_rows

WITHIN = 0.01  # nats per token: how close 8 bits must come
PILOT_SEEDS, HALF_WIDTH = 6, 0.005  # seeds whose spread says how many it takes for an interval of +- so many nats
PLACEBO, MUON32, ADAMW32 = "placebo", "muon32", "adamw32"
PARITY = ("muon8_linear", "muon8_dynamic", PLACEBO)
# Control -> its optimizer with the state in fp32.
CONTROLS = {
    "muon_int8_tensor": MUON32,
    "muon_linear4_row": MUON32,
    "adamw_dynamic8": ADAMW32,
    "adamw_linear8": ADAMW32,
    "cooldown_adamw8": "cooldown_adamw32",
}
# Member of the family in 8 bits -> in 32.
FAMILY = {
    "muon8": MUON32,
    "normuon8": "normuon32",
    "adamuon8_dynamic": "adamuon32",
    "adamuon8_linear": "adamuon32",
}
# The family's own comparison: arm -> the arm of the same bits that it is to beat.
AHEAD = {
    MUON32: "adamw",
    "normuon32": MUON32,
    "adamuon32": MUON32,
    "normuon8": "muon8",
    "adamuon8_dynamic": "muon8",
    "adamuon8_linear": "muon8",
}
LOSSES = ("arm", "lr", "seeds", "mean loss, nats per token", "SD", "state, MB", "CPU s")
MEMORY_LOSSES = (4.0, 2.0, 1.0, 0.5)  # nats, at which the gaps of probabilities are compared
ABLATIONS = ("no_decay", "no_rms_scale")


def parity_tables(arms: Arms) -> str:
    """Return the differences to muon32 by seed, with the spread of the placebo's beside; and losses, state and time."""
    placebo = interval_of(differences(arms, PLACEBO, MUON32))
    rows = []
    for arm in (arm for arm in PARITY if arm in arms):
        values = differences(arms, arm, MUON32)
        interval = interval_of(values)
        ends = None if interval is None else interval.ends
        inside = "-" if ends is None else "yes" if max(map(abs, ends)) <= WITHIN else "no"
        spread = "-"
        if interval and placebo and interval.deviation is not None and placebo.deviation:
            spread = f"{interval.deviation / placebo.deviation:.2f}"
        rows.append([arm, str(len(values)), *shown_interval(interval), inside, spread, seeds_needed(values)])
    head = ["arm minus muon32", "seeds", "mean, nats per token", "SD", "95% interval", f"within {WITHIN:g}"]
    table = markdown([*head, "SD over that of the placebo", f"seeds for +-{HALF_WIDTH:g}"], rows)
    return table and f"{table}\n\n{losses_table(arms)}"


def seeds_needed(values: Mapping[int, float]) -> str:
    """Return how many seeds give an interval of `HALF_WIDTH`, by the spread of the first `PILOT_SEEDS`; "-" below."""
    pilot = interval_of({seed: values[seed] for seed in sorted(values)[:PILOT_SEEDS]})
    if len(values) < PILOT_SEEDS or pilot is None or pilot.deviation is None:
        return "-"
    count = 2
    while t_quantile(0.975, count - 1) * pilot.deviation / math.sqrt(count) > HALF_WIDTH:
        count += 1
    return str(count)


def health_table(arms: Arms) -> str:
    """Return by arm and seed the watched matrix that kept least of the descent, at its worst, and who was warned of."""
    rows = []
    for arm, runs in arms.items():
        for seed, record in runs.items():
            health = record["metrics"].get("health")
            if record["status"] != "finished" or not health:
                continue
            name, worst = min(health["worst"].items(), key=lambda entry: entry[1]["descent"] - entry[1]["min_descent"])
            kept = [f"{worst[key]:.4g}" for key in ("descent", "min_descent", "update_cosine")]
            warned = ", ".join(health["warnings"]) or "none"
            rows.append([arm, str(seed), str(health["num_steps"]), name, str(worst["step"]), *kept, warned])
    head = ["arm", "seed", "steps watched", "worst matrix", "at step", "descent", "threshold", "cosine", "warned of"]
    return markdown(head, rows)


def ahead_table(arms: Arms) -> str:
    """Return the differences of the family's members to Muon of the same bits, and of Muon to AdamW, seed by seed."""
    rows = []
    for arm, reference in AHEAD.items():
        interval = interval_of(differences(arms, arm, reference))
        if interval is None:
            continue
        mean, deviation, ends = shown_interval(interval)
        is_apart = interval.ends is not None and (interval.ends[1] < 0 or interval.ends[0] > 0)
        verdict = ("ahead" if interval.mean < 0 else "behind") if is_apart else "cannot be told apart"
        rows.append([f"{arm} minus {reference}", str(interval.count), mean, deviation, ends, verdict])
    return markdown(["difference of loss", "seeds", "mean", "SD", "95% interval", ""], rows)


def slopes_tables(series: list[WidthSeries]) -> str:
    """Return the best learning rate by width, and its slope over the width, of every rule; "" without a series."""
    if not series:
        return ""
    optima, slopes, _ = slopes_rows(series)
    return f"{markdown(optima[0], optima[1:])}\n\n{markdown(slopes[0], slopes[1:])}"


def losses_table(arms: Arms, names: Collection[str] | None = None) -> str:
    """Return losses, state and time of every arm, or of those with these names."""
    shown = {arm: runs for arm, runs in arms.items() if names is None or arm in names}
    return markdown(LOSSES, [row for arm, runs in shown.items() if (row := _losses_row(arm, runs))])


def family_table(arms: Arms) -> str:
    """Return losses, state and time of every arm of the family's sweep, and the differences of 8 to 32 bits by seed."""
    rows = []
    for arm, runs in arms.items():
        reference = FAMILY.get(arm, "-")
        mean, _, ends = shown_interval(interval_of(differences(arms, arm, reference)))
        if row := _losses_row(arm, runs):
            rows.append([*row, reference, mean, ends])
    return markdown([*LOSSES, "minus", "mean", "95% interval"], rows)


def _losses_row(arm: str, runs: Mapping[int, Record]) -> list[str]:
    """Return the cells of `LOSSES`; none of an arm without a finished run."""
    finished = {seed: record for seed, record in runs.items() if record["status"] == "finished"}
    interval = interval_of({seed: float(record["metrics"]["val_loss"]) for seed, record in finished.items()})
    if interval is None:
        return []
    metrics = [record["metrics"] for record in finished.values()]
    spread = "-" if interval.deviation is None else f"{interval.deviation:.4f}"
    megabytes = f"{metrics[0]['state_bytes'] / 1e6:.1f}"
    seconds = f"{statistics.fmean(m['core_seconds'] for m in metrics):.0f}"
    rate = f"{next(iter(finished.values()))['rate']:g}"
    return [arm, rate, str(len(finished)), f"{interval.mean:.4f}", spread, megabytes, seconds]


def controls_tables(arms: Arms) -> str:
    """Return each control's differences to its optimizer with the state in fp32, and how many of its runs diverged.

    Losses, state and time are beside. The rounded state of a control is kept, and counted, in fp32.
    """
    rows = []
    for arm, reference in CONTROLS.items():
        if arm not in arms:
            continue
        values = differences(arms, arm, reference)
        finite = {seed: value for seed, value in values.items() if math.isfinite(value)}
        diverged = sum(record["status"] == "diverged" for record in arms[arm].values())
        rows.append([arm, reference, str(len(values)), *shown_interval(interval_of(finite)), str(diverged)])
    head = ["control", "minus", "seeds", "mean, nats per token", "SD", "95% interval", "diverged"]
    table = markdown(head, rows)
    return table and f"{table}\n\n{losses_table(arms, {*CONTROLS, *CONTROLS.values()})}"


def steps_to(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Return at how many steps a falling curve reaches a loss, between two points on a line over log steps.

    Args:
        curve: pairs of steps and loss, steps ascending.
        loss: nats per token.

    Returns:
        None where the curve does not reach it, or is below it from its first point on.
    """
    for (before, above), (behind, below) in pairwise(curve):
        if above > loss >= below:
            share = (above - loss) / (above - below)
            return math.exp(math.log(before) + share * math.log(behind / before))
    return None


def horizon_curve(arms: Arms, family: str, seed: int) -> list[tuple[float, float]]:
    """Return pairs of steps and final loss of the arms FAMILY_STEPS on a seed, the shortest run first."""
    points = []
    for arm, runs in arms.items():
        loss = loss_of(runs.get(seed))
        if re.fullmatch(f"{family}_[0-9]+", arm) and loss is not None:
            points.append((float(runs[seed]["metrics"]["steps"]), loss))
    return sorted(points)


def horizons_table(arms: Arms, families: Sequence[str] = ("muon32", "muon8")) -> str:
    """Return steps, tokens and FLOPs to AdamW's final loss, and their shares of AdamW's, by seed with an interval."""
    adamw = arms.get(ADAMW32, {})
    rows = []
    for family in families:
        family_arms = {arm: runs for arm, runs in arms.items() if re.fullmatch(f"{family}_[0-9]+", arm)}
        if not family_arms:
            continue
        shares: dict[str, list[float]] = {"steps": [], "FLOPs": []}
        steps, tokens = [], []
        curves = {seed: curve for seed in adamw if (curve := horizon_curve(arms, family, seed))}
        for seed, curve in curves.items():
            record = adamw[seed]
            target = loss_of(record)
            reached = None if target is None else steps_to(curve, target)
            if reached is None:
                continue
            mine = next(runs[seed] for runs in family_arms.values() if seed in runs)
            steps.append(reached)
            tokens.append(reached * _tokens_per_step(mine))
            shares["steps"].append(reached / record["metrics"]["steps"])
            shares["FLOPs"].append(
                reached * _flops_per_step(mine) / (record["metrics"]["steps"] * _flops_per_step(record))
            )
        if not steps:
            rows.append([family, f"0 of {len(curves)}", *["-"] * 4])
            continue
        shown = [_share(shares[key]) for key in ("steps", "FLOPs")]
        means = [f"{statistics.fmean(steps):.0f}", f"{statistics.fmean(tokens):,.0f}"]
        rows.append([family, f"{len(steps)} of {len(curves)}", *means, *shown])
    head = [
        "arm",
        "seeds that reach it",
        "steps",
        "tokens",
        "share of AdamW's steps and tokens",
        "share of AdamW's FLOPs",
    ]
    return markdown(head, rows)


def _tokens_per_step(record: Record) -> float:
    return float(record["metrics"]["tokens"]) / float(record["metrics"]["steps"])


def _flops_per_step(record: Record) -> float:
    metrics = record["metrics"]
    return float(metrics["flops_per_token"]) * _tokens_per_step(record) + float(metrics["optimizer_flops_per_step"])


def _share(values: Sequence[float]) -> str:
    interval = mean_interval(values)
    width = "" if interval.half_width is None else f" +- {interval.half_width:.0%}"
    return f"{interval.mean:.0%}{width}"


def ablations_table(arms: Arms) -> str:
    """Return what is lost without weight decay, and without the scale by RMS, each at its own best rate."""
    rows = []
    for arm in (arm for arm in ABLATIONS if arm in arms):
        values = differences(arms, arm, MUON32)
        rows.append([arm, str(len(values)), *shown_interval(interval_of(values))])
    return markdown(["arm minus muon32", "seeds", "mean, nats per token", "SD", "95% interval"], rows)


def decile_differences(arms: Arms, arm: str, decile: int, reference: str = MUON32) -> dict[int, float]:
    """Return the differences of the loss in a decile by seed."""

    def loss(record: Record) -> float | None:
        by_decile: Sequence[float | None] | None = record["metrics"].get("loss_by_decile")
        return None if by_decile is None else by_decile[decile]

    return differences(arms, arm, reference, loss)


def deciles_table(arms: Arms, number: int = 10) -> str:
    """Return the differences to muon32 by decile of a token's frequency, the most frequent first."""
    names = [arm for arm in PARITY if arm in arms]
    rows = []
    for decile in range(number if names else 0):
        cells = []
        for arm in names:
            interval = interval_of(decile_differences(arms, arm, decile))
            width = "" if interval is None or interval.half_width is None else f" +- {interval.half_width:.4f}"
            cells.append("-" if interval is None else f"{interval.mean:+.4f}{width}")
        rows.append([str(decile + 1), _ids(arms, decile), *cells])
    return markdown(["decile", "ids of the vocabulary", *names], rows)


def _ids(arms: Arms, decile: int) -> str:
    records: list[Mapping[str, object]] = [r["metrics"] for runs in arms.values() for r in runs.values()]
    found = next((r["ids_by_decile"] for r in records if "ids_by_decile" in r), None)
    return "-" if not isinstance(found, list) else str(found[decile])


def gap_at(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """Return the gap where a curve first reaches a loss, between two of its points; None where it does not."""
    for (above, before), (below, behind) in pairwise(curve):
        if above > loss >= below:
            return before + (behind - before) * (above - loss) / (above - below)
    return None


def memory_table(record: Mapping[str, Any]) -> str:
    """Return the gaps at `MEMORY_LOSSES` by rule and kind of embedding."""
    rows = []
    for kind, by_rule in record["curves"].items():
        for rule, curve in by_rule.items():
            gaps = [gap_at(curve, loss) for loss in MEMORY_LOSSES]
            rows.append([kind, rule, *("-" if gap is None else f"{gap:.3f}" for gap in gaps)])
    return markdown(["embeddings", "rule", *(f"gap at {loss:g} nats" for loss in MEMORY_LOSSES)], rows)
