"""Tables of how even singular values are, by group of layers, out of the records. No torch in here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from finetune.evidence.arms import Arms, Record, markdown

KINDS = ("weights", "updates")
# Measure in the records -> what it is called.
MEASURES = {
    "entropy": "normalized SVD entropy",
    "effective_rank": "effective rank",
    "top_energy": "energy of the 10 largest",
    "quartile_ratio": "ratio of quartiles",
}

Spectra = Mapping[str, Mapping[str, Mapping[str, float]]]  # kind -> group -> measure -> value


def spectra_by_step(record: Record) -> dict[int, Spectra]:
    """Return step -> what `--spectra-every` measured there; {} of a run that did not finish."""
    return dict(record["metrics"].get("spectra") or ()) if record["status"] == "finished" else {}


def measured_steps(arms: Arms) -> list[int]:
    """Return the steps that all finished runs with spectra were measured at, ascending."""
    steps = [set(found) for runs in arms.values() for r in runs.values() if (found := spectra_by_step(r))]
    return sorted(set.intersection(*steps)) if steps else []


def values_of(runs: Mapping[int, Record], step: int, kind: str, group: str, measure: str) -> list[float]:
    """Return a measure of each run of an arm that has it, by seed."""
    found = (spectra_by_step(record).get(step, {}).get(kind, {}).get(group) for record in runs.values())
    return [of[measure] for of in found if of is not None]


def spectra_tables(arms: Arms) -> str:
    """Return a table of weights and one of updates at the last step: every measure by group of layers and arm.

    Values are means over seeds with their standard deviation; "" where nothing was measured.
    """
    steps = measured_steps(arms)
    return "\n\n".join(_table(arms, steps[-1], kind) for kind in KINDS if steps)


def _table(arms: Arms, step: int, kind: str) -> str:
    def found_in(arm: str) -> list[str]:
        return [group for r in arms[arm].values() for group in spectra_by_step(r).get(step, {}).get(kind, ())]

    shown = [arm for arm in arms if found_in(arm)]
    groups = dict.fromkeys(group for arm in shown for group in found_in(arm))
    rows = [
        [called, group, *(_shown(values_of(arms[arm], step, kind, group, measure)) for arm in shown)]
        for measure, called in MEASURES.items()
        for group in groups
    ]
    return markdown([f"{kind} at step {step}", "group", *shown], rows)


def _shown(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{deviation}"
