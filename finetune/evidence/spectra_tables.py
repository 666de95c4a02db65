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
    "top_energy": "share of the 10 largest in the squared singular values",
    "quartile_ratio": "ratio of the quartiles of squared singular values",
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
    """Return a table for each measure, of weights and updates at the last step; "" where nothing was measured."""
    steps = measured_steps(arms)
    parts = [
        f"{called[0].upper()}{called[1:]} of {kind} at step {steps[-1]}:\n\n{text}"
        for measure, called in MEASURES.items()
        for kind in KINDS
        if steps and (text := _table(arms, steps[-1], kind, measure))
    ]
    return "\n\n".join(parts)


def _table(arms: Arms, step: int, kind: str, measure: str) -> str:
    """Return the means over seeds, with their standard deviation, of every arm by group of layers."""
    kinds = [spectra_by_step(r).get(step, {}).get(kind, {}) for runs in arms.values() for r in runs.values()]
    groups = list(dict.fromkeys(group for found in kinds for group in found))
    rows = []
    for arm, runs in arms.items():
        columns = [values_of(runs, step, kind, group, measure) for group in groups]
        if any(columns):
            rows.append([arm, str(max(map(len, columns))), *map(_shown, columns)])
    return markdown(["arm", "seeds", *groups], rows)


def _shown(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{deviation}"
