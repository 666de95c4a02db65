"""Figures of the evidence, out of the records and nothing else. Lines differ in style too, not in colour alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from finetune.evidence.arms import Arms, differences
from finetune.evidence.rare_tables import accuracy, comparison_step, middle_group, num_groups, steps_of
from finetune.evidence.spectra_tables import measured_steps, values_of
from finetune.evidence.tables import ADAMW_STARTS, MUON32, NUM_DECILES, PARITY, decile_differences, horizon_curve
from finetune.storage.plots import color_of, line_style, new_figure, point_style
from finetune.sweep.intervals import interval_of
from finetune.sweep.records import loss_of

FONT_SIZE = 10  # points, of everything in a figure
MEMORIES = ("VO", "W_out")  # the groups that arXiv 2509.26030 takes for associative memories


def new_axes(xlabel: str, ylabel: str, title: str, panels: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure without a window, and its axes beside each other with one scale of y, each fully labelled."""
    from matplotlib import rc_context

    with rc_context({"font.size": FONT_SIZE, "axes.titlesize": FONT_SIZE, "legend.fontsize": FONT_SIZE}):
        figure = new_figure(2.2 + 4.3 * panels, 4.6, "constrained")
        axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
        for one in axes:
            one.set(xlabel=xlabel, ylabel=ylabel)
        figure.suptitle(title, fontsize=FONT_SIZE)
    return figure, axes


def line(axes: Any, number: int, xs: Sequence[float], ys: Sequence[float], label: str) -> None:
    """Draw the line of one arm, in the colour and style of its number."""
    axes.plot(xs, ys, label=label, **line_style(number))


def legend_beside(figure: Any, axes: Any) -> None:
    """Name the lines of the axes once, beside all panels."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=FONT_SIZE)


def rare_figure(arms: Arms) -> Any:
    """Draw first-token accuracy over steps of the rarest group, of that two before, and of that four before."""
    groups = num_groups(arms)
    shown = [group for group in (groups - 5, middle_group(groups), groups - 1) if group >= 0]
    figure, panels = new_axes("optimizer step", "first-token accuracy", "Biographies by frequency", len(shown))
    step = comparison_step(arms)
    for axes, group in zip(panels, shown, strict=True):
        axes.set_title(f"group {group} of 0 to {groups - 1}, {2 ** (groups - 1 - group)} selections a pass")
        for number, arm in enumerate(arms):
            points = [(s, a) for s in steps_of(arms) if (a := accuracy(arms, arm, s, group)) is not None]
            line(axes, number, [s for s, _ in points], [a for _, a in points], arm)
        if step is not None:
            axes.axvline(step, color="gray", lw=0.8)
    legend_beside(figure, panels[0])
    return figure


def spectra_figure(arms: Arms) -> Any:
    """Draw the entropy of weights over steps, of the groups that are memories, the mean over seeds of each arm."""
    title = "Evenness of singular values"
    figure, panels = new_axes("optimizer step", "normalized SVD entropy of weights", title, len(MEMORIES))
    for axes, group in zip(panels, MEMORIES, strict=True):
        axes.set_title(group)
        for number, (arm, runs) in enumerate(arms.items()):
            steps = [(s, v) for s in measured_steps(arms) if (v := values_of(runs, s, "weights", group, "entropy"))]
            line(axes, number, [s for s, _ in steps], [statistics.fmean(v) for _, v in steps], arm)
    legend_beside(figure, panels[0])
    return figure


def parity_figure(arms: Arms, title: str) -> Any:
    """Draw each seed's difference to muon32, and its mean with the 95% interval, by arm."""
    names = [arm for arm in PARITY if arm in arms]
    figure, (axes,) = new_axes("arm minus muon32", "difference of validation loss, nats per token", title)
    for number, arm in enumerate(names):
        values = differences(arms, arm, MUON32)
        style = point_style(number)
        axes.plot([number - 0.15] * len(values), list(values.values()), ls="", ms=4, label=arm, **style)
        if (interval := interval_of(values)) is not None and interval.half_width is not None:
            axes.errorbar(number + 0.15, interval.mean, interval.half_width, capsize=4, **style | {"color": "black"})
    axes.axhline(0, color="gray", ls=":")
    axes.set_xticks(range(len(names)), names, fontsize=FONT_SIZE)
    return figure


def horizons_figure(arms: Arms, families: Sequence[str] = ("muon32", "muon8")) -> Any:
    """Draw the final loss over the steps of a run, the mean over seeds, and AdamW's."""
    figure, (axes,) = new_axes("steps of the run", "validation loss, nats per token", "Runs tuned to their length")
    for number, family in enumerate(families):
        curves = [horizon_curve(arms, family, seed) for seed in sorted({s for runs in arms.values() for s in runs})]
        by_steps: dict[float, list[float]] = {}
        for steps, value in (point for curve in curves for point in curve):
            by_steps.setdefault(steps, []).append(value)
        xs = sorted(by_steps)
        line(axes, number, xs, [sum(by_steps[x]) / len(by_steps[x]) for x in xs], family)
    for adamw, dashes in zip(ADAMW_STARTS, (":", "--"), strict=True):
        losses = [loss for r in arms.get(adamw, {}).values() if (loss := loss_of(r))]
        if losses:
            axes.axhline(statistics.fmean(losses), color="gray", ls=dashes, label=f"{adamw}, at its end")
    axes.legend(fontsize=FONT_SIZE)
    return figure


def deciles_figure(arms: Arms, title: str) -> Any:
    """Draw the mean difference to muon32 by decile of a token's frequency, with its 95% interval where there is one."""
    figure, (axes,) = new_axes(
        "decile of a token's frequency, 1 the most frequent", "difference of loss, nats per token", title
    )
    for i, arm in enumerate(arm for arm in PARITY if arm in arms):
        intervals = [interval_of(decile_differences(arms, arm, [decile])) for decile in range(NUM_DECILES)]
        points = [(d + 1 + 0.1 * i, f.mean, f.half_width or 0) for d, f in enumerate(intervals) if f is not None]
        xs, means, halves = ([point[k] for point in points] for k in range(3))
        line(axes, i, xs, means, arm)
        axes.errorbar(xs, means, halves, fmt="none", ecolor=color_of(i))
    axes.axhline(0, color="gray", ls=":")
    axes.legend(loc="upper left", fontsize=FONT_SIZE)
    return figure


def memory_figure(record: dict[str, Any]) -> Any:
    """Draw the gap between the best and the worst known fact over the loss, by kind of embedding."""
    title = "One step on a linear associative memory"
    figure, panels = new_axes("population loss, nats", "largest gap of probabilities", title, len(record["curves"]))
    for axes, (kind, curves) in zip(panels, record["curves"].items(), strict=True):
        for number, (rule, curve) in enumerate(curves.items()):
            line(axes, number, [loss for loss, _ in curve], [gap for _, gap in curve], rule)
        axes.set(xscale="log", title=f"{kind} embeddings", xlim=(8, 0.01))
    legend_beside(figure, panels[0])
    return figure
