"""Tables of first-token accuracy by how rare a class is, with intervals by bootstrap. Out of the records. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.evidence.arms import Arms, Record, markdown

NUM_QUESTIONS = 6
NUM_SHOWN = 5  # groups of a table, the rarest ones: all arms know the others
PASSED = 0.5
NUM_RESAMPLES = 2000
ADAMW, MUON32 = "adamw", "muon32"
# Pairs that are compared besides every arm with muon32: the paper's other step, and the wider start.
PAIRS = (("muon32_vo_ffn", ADAMW), ("muon32_qk", ADAMW), ("adamw_init", ADAMW), ("muon32_init", "adamw_init"))


def right_answers(record: Record, step: int | None, group: int) -> Any:
    """Return the share of right first tokens of each measured class of a group: fp64 [classes].

    Args:
        record: of a run on biographies.
        step: one that was validated; None: the last one.
        group: 0 for the most frequent class; -1 for the rarest ones.

    Raises:
        KeyError: the run was not validated at that step.
    """
    curve: Mapping[int, Sequence[str]] = dict(record["metrics"]["first_token_correct"])
    digits = curve[max(curve) if step is None else step][group]
    return np.array([int(digit) for digit in digits]) / NUM_QUESTIONS


def steps_of(arms: Arms) -> list[int]:
    """Return the steps that every run was validated at, ascending."""
    records = [record for runs in arms.values() for record in runs.values() if record["status"] == "finished"]
    curves = [{step for step, _ in record["metrics"]["first_token_correct"]} for record in records]
    return sorted(set.intersection(*curves)) if curves else []


def num_groups(arms: Arms) -> int:
    """Return the number of groups of classes."""
    return next(
        (len(r["metrics"]["first_token_correct"][0][1]) for runs in arms.values() for r in runs.values() if _has(r)), 0
    )


def _has(record: Record) -> bool:
    return bool(record["metrics"].get("first_token_correct"))


def middle_group(groups: int) -> int:
    """Return the group at whose half-way arms are compared: the middle one of the three that the paper reports.

    Those are the rarest, 15 of 0 to 15, and 13 and 11 before it.
    """
    return groups - 3


def accuracy(arms: Arms, arm: str, step: int | None, group: int) -> float | None:
    """Return the mean accuracy of an arm over classes and seeds; None without a finished run."""
    table = _by_seed(arms, arm, step, group)
    return None if table is None else float(table.mean())


def comparison_step(arms: Arms) -> int | None:
    """Return the first validated step at which AdamW's middle group passes one half; None where there is none."""
    group = middle_group(num_groups(arms))
    for step in steps_of(arms):
        found = accuracy(arms, ADAMW, step, group)
        if found is not None and found >= PASSED:
            return step
    return None


def _by_seed(arms: Arms, arm: str, step: int | None, group: int) -> Any:
    """Return accuracies [seeds, classes] of the finished runs of an arm; None where there are none."""
    finished = [record for record in arms.get(arm, {}).values() if _has(record) and record["status"] == "finished"]
    return np.stack([right_answers(record, step, group) for record in finished]) if finished else None


def bootstrap(values: Any, resamples: int = NUM_RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Return the 95% percentile interval of a mean over seeds and classes, both drawn again with replacement.

    Args:
        values: fp64 [seeds, classes], of accuracies or of their differences.
        resamples: how often both are drawn.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    seeds, classes = values.shape
    rows = rng.integers(seeds, size=(resamples, seeds))
    columns = rng.integers(classes, size=(resamples, classes))
    means = [values[np.ix_(row, column)].mean() for row, column in zip(rows, columns, strict=True)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def compare(arms: Arms, arm: str, reference: str, step: int | None, group: int) -> tuple[float, float, float] | None:
    """Return the difference of two arms in accuracy with its bootstrap interval, paired by seed and class.

    Returns:
        Mean, lower and upper end; None where they share no seed.
    """
    seeds = [seed for seed in arms.get(arm, {}) if seed in arms.get(reference, {})]
    both = {name: {seed: arms[name][seed] for seed in seeds} for name in (arm, reference) if seeds}
    pairs = [seed for seed in seeds if all(both[name][seed]["status"] == "finished" for name in both)]
    if not pairs:
        return None
    values = np.stack(
        [right_answers(arms[arm][s], step, group) - right_answers(arms[reference][s], step, group) for s in pairs]
    )
    return float(values.mean()), *bootstrap(values)


def accuracy_table(arms: Arms, step: int | None) -> str:
    """Return the accuracy of every arm by its rarer groups at a step (None: the last), the rarest with its interval."""
    groups = num_groups(arms)
    shown = range(max(0, groups - NUM_SHOWN), groups)
    rows = []
    for arm, runs in arms.items():
        cells = []
        for group in shown:
            values = _by_seed(arms, arm, step, group)
            text = "-" if values is None else f"{values.mean():.3f}"
            if values is not None and group == groups - 1:
                low, high = bootstrap(values)
                text += f" ({low:.3f} to {high:.3f})"
            cells.append(text)
        rates = {record["rate"] for record in runs.values()}
        rows.append([arm, f"{rates.pop():g}", str(len(runs)), *cells])
    return markdown(["arm", "lr", "seeds", *(f"g{group}" for group in shown)], rows)


def differences_table(arms: Arms, step: int | None) -> str:
    """Return differences in the accuracy on the rarest group, and whether they are told apart from 0.

    Those of every arm to muon32, and of `PAIRS`.
    """
    rows = []
    for arm, reference in (*((arm, MUON32) for arm in arms if arm != MUON32), *PAIRS):
        found = compare(arms, arm, reference, step, -1)
        if found is not None:
            mean, low, high = found
            differs = "yes" if low > 0 or high < 0 else "no"
            rows.append([f"{arm} minus {reference}", f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}", differs])
    return markdown(["accuracy on the rarest group", "mean", "95% interval", "differs from 0"], rows)


def chance_table(arms: Arms) -> str:
    """Return the accuracy of a guess by question."""
    found = (r["metrics"]["chance"] for runs in arms.values() for r in runs.values() if _has(r))
    chance: Mapping[str, Mapping[str, float]] = next(found, {})
    rows = [[name, f"{c['uniform']:.3f}", f"{c['most_frequent']:.3f}"] for name, c in chance.items()]
    return markdown(["question", "any of its answers", "the most frequent one, rarest group"], rows)


def rare_tables(arms: Arms) -> str:
    """Return the tables of a sweep of biographies: at the step of the comparison, at the end, and chance."""
    step, group = comparison_step(arms), middle_group(num_groups(arms))
    shown = {step: f"AdamW's group {group} passes {PASSED:g} at step {step}:"} if step else {}
    for last in steps_of(arms)[-1:]:
        shown.setdefault(last, f"At the last step, {last}:")
    parts = [] if step else ["AdamW does not pass one half."]
    for at, text in shown.items():
        parts += [text, accuracy_table(arms, at), differences_table(arms, at)]
    return "\n\n".join([*parts, "What a guess would get:", chance_table(arms)])
