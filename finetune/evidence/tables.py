"""Tables of losses: parity, family, controls, horizons, deciles. Out of the records and nothing else. No torch."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

from finetune.evidence.arms import Arms, Record, differences, markdown, shown_interval
from finetune.sweep.intervals import interval_of, mean_interval, t_quantile
from finetune.sweep.records import loss_of
from finetune.sweep.transfer import WidthSeries, slopes_rows

WITHIN = 0.01  # nats per token: how close 8 bits must come
PILOT_SEEDS, HALF_WIDTH = 6, 0.005  # seeds whose spread says how many it takes for an interval of +- so many nats
PLACEBO, MUON32, ADAMW32 = "placebo", "muon32", "adamw32"
ADAMW_STARTS = (ADAMW32, "adamw32_init")  # from transformers' standard deviation, and from 1/sqrt(width)
LINEAR8, DYNAMIC8 = "muon8_linear", "muon8_dynamic"
MLP_OUT8 = "muon8_mlp_out"  # dynamic codes for the output projections of MLPs, linear ones for all else
PARITY = (LINEAR8, DYNAMIC8, MLP_OUT8, PLACEBO)
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
    "muon8_dynamic": MUON32,
    "normuon8": "normuon32",
    "adamuon8_dynamic": "adamuon32",
    "adamuon8_linear": "adamuon32",
}
# The family's own comparison: arm -> the arm of the same bits that it is to beat.
AHEAD = {
    MUON32: "adamw",
    "normuon32": MUON32,
    "adamuon32": MUON32,
    "muon8_dynamic": "muon8",
    "normuon8": "muon8",
    "adamuon8_dynamic": "muon8",
    "adamuon8_linear": "muon8",
}
LOSSES = ("arm", "lr", "seeds", "mean loss, nats per token", "SD", "state, MB", "CPU time")
NUM_DECILES, NUM_RAREST = 10, 3  # of tokens by their frequency; those at the rare end, which are taken together
MEMORY_LOSSES = (4.0, 2.0, 1.0, 0.5)  # nats, at which the gaps of probabilities are compared
ABLATIONS = ("no_decay", "no_rms_scale")


def parity_tables(arms: Arms) -> str:
    """Return the differences to muon32 by seed, with the spread of the placebo's beside; and losses, state and time."""
    placebo = interval_of(differences(arms, PLACEBO, MUON32))
    rows = []
    for arm, reference in (*((arm, MUON32) for arm in PARITY), (DYNAMIC8, LINEAR8), (MLP_OUT8, LINEAR8)):
        if not (values := differences(arms, arm, reference)):
            continue
        interval = interval_of(values)
        ends = None if interval is None else interval.ends
        inside = "-" if ends is None else "yes" if max(map(abs, ends)) <= WITHIN else "no"
        spread = "-"
        if interval and placebo and interval.deviation is not None and placebo.deviation:
            spread = f"{interval.deviation / placebo.deviation:.3g}"
        name = f"{arm} minus {reference}"
        rows.append([name, str(len(values)), *shown_interval(interval), inside, spread, seeds_needed(values)])
    head = ["difference of loss", "seeds", "mean, nats per token", "SD", "95% interval", f"within {WITHIN:g}"]
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
    """Return losses, state and time of every arm, or of those with these names; times over that of the first one."""
    return markdown(LOSSES, list(_losses_rows({a: runs for a, runs in arms.items() if names is None or a in names})))


def family_table(arms: Arms) -> str:
    """Return losses, state and time of every arm of the family's sweep, and the differences of 8 to 32 bits by seed."""
    rows = []
    for row in _losses_rows(arms):
        reference = FAMILY.get(row[0], "-")
        mean, _, ends = shown_interval(interval_of(differences(arms, row[0], reference)))
        rows.append([*row, reference, mean, ends])
    return markdown([*LOSSES, "minus", "mean", "95% interval"], rows)


def _losses_rows(arms: Arms) -> Iterator[list[str]]:
    """Yield the cells of `LOSSES` of each arm that has a finished run; time is a median over seeds of ratios."""
    done = {arm: {s: r for s, r in runs.items() if r["status"] == "finished"} for arm, runs in arms.items()}
    done = {arm: runs for arm, runs in done.items() if runs}
    times = {arm: {s: r["metrics"]["core_seconds"] for s, r in runs.items()} for arm, runs in done.items()}
    unit = next(iter(times.values()), {})
    for arm, runs in done.items():
        first, losses = next(iter(runs.values())), {s: r["metrics"]["val_loss"] for s, r in runs.items()}
        _, spread, _ = shown_interval(interval_of(losses))
        ratios = [seconds / unit[seed] for seed, seconds in times[arm].items() if seed in unit]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else "-"
        megabytes = f"{first['metrics']['state_bytes'] / 1e6:.1f}"
        mean = f"{statistics.fmean(losses.values()):.4f}"
        yield [arm, f"{first['rate']:g}", str(len(runs)), mean, spread, megabytes, ratio]


def controls_tables(arms: Arms) -> str:
    """Return each control's differences to its optimizer with the state in fp32, of the runs that learned.

    The others, which diverged or ended above the loss before the first step, are counted. Losses, state and time are
    beside. The rounded state of a control is kept, and counted, in fp32.
    """
    rows = []
    for arm, reference in CONTROLS.items():
        if arm not in arms:
            continue
        num_seeds = len(differences(arms, arm, reference))
        learned = differences(arms, arm, reference, _learned_loss)
        lost = sum(_learned_loss(record) is None for record in arms[arm].values())
        rows.append([arm, reference, str(num_seeds), *shown_interval(interval_of(learned)), str(lost)])
    head = ["control", "minus", "seeds", "mean, nats per token", "SD", "95% interval", "ended above untrained"]
    table = markdown(head, rows)
    return table and f"{table}\n\n{losses_table(arms, {*CONTROLS, *CONTROLS.values()})}"


def _learned_loss(record: Record) -> float | None:
    """Return a run's loss; None where it diverged or ended above the loss before the first step."""
    loss = loss_of(record)
    if loss is None or loss == math.inf:
        return None
    return loss if loss < record["metrics"]["validation_curve"][0][1] else None


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
    """Return pairs of steps and final loss of the arms FAMILY_STEPS on a seed, the shortest run first.

    FAMILY, of all the recipe's steps, is the last one where the seed has shorter runs.
    """
    runs = [runs[seed] for runs in _shorter_runs(arms, family) if seed in runs]
    if runs and (whole := arms.get(family, {}).get(seed)):
        runs.append(whole)
    return sorted((float(run["metrics"]["steps"]), loss) for run in runs if (loss := loss_of(run)) is not None)


def _shorter_runs(arms: Arms, family: str) -> list[Mapping[int, Record]]:
    """Return the runs by seed of each arm FAMILY_STEPS."""
    return [runs for arm, runs in arms.items() if re.fullmatch(f"{family}_[0-9]+", arm)]


def horizons_table(arms: Arms, families: Sequence[str] = ("muon32", "muon8")) -> str:
    """Return steps, tokens and FLOPs to AdamW's final loss from each of its starts, and their shares of AdamW's.

    Shares are by seed, with an interval.
    """
    rows = [row for adamw, family in product(ADAMW_STARTS, families) if (row := _horizon_row(arms, adamw, family))]
    head = ["loss of", "arm", "seeds that reach it", "steps", "tokens"]
    return markdown([*head, "share of AdamW's steps and tokens", "share of AdamW's FLOPs"], rows)


def _horizon_row(arms: Arms, adamw: str, family: str) -> list[str]:
    """Return the cells of `horizons_table` for an arm of AdamW and a family; none where they share no seed."""
    steps, tokens, step_shares, flop_shares, tried = [], [], [], [], 0
    for seed, record in arms.get(adamw, {}).items():
        curve, target = horizon_curve(arms, family, seed), loss_of(record)
        if not curve or target is None:
            continue
        tried += 1
        if (reached := steps_to(curve, target)) is not None:
            mine = next(runs[seed] for runs in _shorter_runs(arms, family) if seed in runs)
            share = reached / record["metrics"]["steps"]
            steps.append(reached)
            tokens.append(reached * _tokens_per_step(mine))
            step_shares.append(share)
            flop_shares.append(share * _flops_per_step(mine) / _flops_per_step(record))
    if not steps:
        return [adamw, family, f"0 of {tried}", *["-"] * 4] if tried else []
    means = [f"{statistics.fmean(steps):.0f}", f"{statistics.fmean(tokens):,.0f}"]
    return [adamw, family, f"{len(steps)} of {tried}", *means, _share(step_shares), _share(flop_shares)]


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


def decile_differences(arms: Arms, arm: str, deciles: Sequence[int]) -> dict[int, float]:
    """Return the differences to muon32 of the mean loss of some deciles by seed; none where one has no tokens."""

    def loss(record: Record) -> float | None:
        by_decile: Sequence[float | None] = record["metrics"].get("loss_by_decile") or [None] * NUM_DECILES
        known = [value for decile in deciles if (value := by_decile[decile]) is not None]
        return statistics.fmean(known) if len(known) == len(deciles) else None

    return differences(arms, arm, MUON32, loss)


def deciles_table(arms: Arms) -> str:
    """Return the differences to muon32 by decile of a token's frequency, the most frequent first, and of its rarest."""
    names = [arm for arm in PARITY if arm in arms]
    every = range(NUM_DECILES)
    records: list[Mapping[str, Any]] = [r["metrics"] for runs in arms.values() for r in runs.values()]
    ids: Sequence[int] = next((r["ids_by_decile"] for r in records if "ids_by_decile" in r), [])
    if not ids:
        return ""
    rows = []
    for deciles in (*([decile] for decile in every), every[:-NUM_RAREST], every[-NUM_RAREST:]):
        cells = []
        for arm in names:
            interval = interval_of(decile_differences(arms, arm, deciles))
            width = "" if interval is None or interval.half_width is None else f" +- {interval.half_width:.4f}"
            cells.append("-" if interval is None else f"{interval.mean:+.4f}{width}")
        called = f"{deciles[0] + 1}" if len(deciles) == 1 else f"{deciles[0] + 1} to {deciles[-1] + 1}"
        rows.append([called, str(sum(ids[decile] for decile in deciles)), *cells])
    return markdown(["decile", "ids of the vocabulary", *names], rows)


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
