"""Which runs a sweep has, in which order, and which rate is an arm's best; out of the records. No torch in here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.config.errors import InputError
from finetune.sweep.records import latest, loss_of
from finetune.sweep.spec import Sweep, SweepArm, SweepRun

Results = Mapping[SweepRun, Mapping[str, Any]]


@dataclass(frozen=True)
class RateChoice:
    """The search for an arm's rate, as far as it has come.

    Args:
        losses: rate -> validation loss on the seeds of the search, their mean; infinite where one diverged, None while
            one is open or has failed. Ascending, with the rates that were added.
        best: rate of the lowest loss, or the only rate; None while one of several is open or has failed, and where all
            diverged.
        is_interior: whether rates on both sides of the best were tried; None where there is one rate only, or none yet.
        obstacle: why an arm's other seeds cannot run at the best rate, with the way out; "" where they can, or will.
        follows: the arm whose search it is; None for its own.
    """

    losses: Mapping[float, float | None]
    best: float | None
    is_interior: bool | None
    obstacle: str = ""
    follows: str | None = None


def search_seeds(sweep: Sweep, arm: SweepArm) -> tuple[int, ...]:
    """Return the seeds on which an arm's rates are compared."""
    return arm.seeds if sweep.rates_on_seed is None else (sweep.rates_on_seed,)


def choose_rate(sweep: Sweep, arm: SweepArm, results: Results) -> RateChoice:
    """Look for an arm's best rate; of equal losses the lower rate is taken."""
    if arm.follows is not None:
        other = choose_rate(sweep, sweep.arms[arm.follows], results)
        obstacle = f"it takes the rate of {arm.follows}, which has none" if other.obstacle else ""
        return replace(other, obstacle=obstacle, follows=arm.follows)
    if len(arm.rates) == 1:
        (rate,) = arm.rates
        return RateChoice({rate: _mean_loss(sweep, arm, rate, results)}, rate, None)
    rates = list(arm.rates)
    for is_last in [False] * sweep.extend_rates + [True]:
        losses = {rate: _mean_loss(sweep, arm, rate, results) for rate in rates}
        best = _lowest(losses)
        if is_last or best is None or best not in (rates[0], rates[-1]):
            break
        if best == rates[-1]:
            rates.append(_rounded(rates[-1] ** 2 / rates[-2]))
        else:
            rates.insert(0, _rounded(rates[0] ** 2 / rates[1]))
    is_interior = None if best is None else best not in (rates[0], rates[-1])
    return RateChoice(losses, best, is_interior, _obstacle(sweep, arm, losses, best, is_interior, results))


def _mean_loss(sweep: Sweep, arm: SweepArm, rate: float, results: Results) -> float | None:
    losses = [loss_of(results.get(SweepRun(arm.name, rate, seed))) for seed in search_seeds(sweep, arm)]
    known = [loss for loss in losses if loss is not None]
    return statistics.fmean(known) if len(known) == len(losses) else None


def _lowest(losses: Mapping[float, float | None]) -> float | None:
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    best = min(known, key=lambda rate: (known[rate], rate)) if known else None
    return best if best is not None and len(known) == len(losses) and known[best] < math.inf else None


def _rounded(rate: float) -> float:
    """Return a rate of a geometric grid without the noise of the division."""
    return float(f"{rate:.6g}")


def _obstacle(
    sweep: Sweep,
    arm: SweepArm,
    losses: Mapping[float, float | None],
    best: float | None,
    is_interior: bool | None,
    results: Results,
) -> str:
    if all(loss == math.inf for loss in losses.values()):
        return "every rate diverged; give lower `rates`"
    for rate in losses:
        for seed in search_seeds(sweep, arm):
            record = results.get(SweepRun(arm.name, rate, seed))
            if record is not None and record["status"] == "failed":
                return f"its run at rate {rate:g}, seed {seed} failed: {record['error']}"
    if is_interior is False:
        at_top = best == max(losses)
        end, more = ("highest", "higher") if at_top else ("lowest", "lower")
        return f"its best rate {best:g} is the {end} of its grid; add a {more} one to `rates`, or raise `extend_rates`"
    return ""


def list_runs(sweep: Sweep, results: Results, only: Sequence[str] = ()) -> list[SweepRun]:
    """Return the runs of a sweep in the order in which they run; those whose rate is not chosen yet have none.

    First the rates, arm after arm at each, then the seeds, arm after arm on each: what is compared runs side by side.

    Args:
        sweep: the sweep.
        results: of `results_of`.
        only: names of arms; none: all. An arm that they follow is searched with them.
    """
    names = {name for name in sweep.arms if not only or name in only}
    searched = names | {follows for name in names if (follows := sweep.arms[name].follows)}
    runs: dict[SweepRun, tuple[int, ...]] = {}
    for number, arm in enumerate(sweep.arms.values()):
        choice = choose_rate(sweep, arm, results)
        if arm.name in searched and arm.follows is None:
            for i, rate in enumerate(sorted(choice.losses)):
                for j, seed in enumerate(search_seeds(sweep, arm)):
                    runs[SweepRun(arm.name, rate, seed)] = (0, j, i, number)
        if arm.name in names and sweep.rates_on_seed is not None:
            settled = choice.is_interior is not False and not choice.obstacle
            best = choice.best if settled else None
            for j, seed in enumerate(arm.seeds):
                if best is None and seed == sweep.rates_on_seed and arm.follows is None:
                    continue  # one of the search's runs
                runs.setdefault(SweepRun(arm.name, best, seed), (1, j, 0, number))
    return sorted(runs, key=runs.__getitem__)


def results_of(sweep: Sweep, records: Sequence[Mapping[str, Any]], where: str) -> Results:
    """Return the last record of each run; one that failed with other options than now is left out.

    Args:
        sweep: the sweep.
        records: oldest first.
        where: their file.

    Raises:
        InputError: a run of an arm that had other options has not failed.
    """
    results = {}
    for run, record in latest(records).items():
        arm = sweep.arms.get(run.arm)
        if arm is not None and record["recipe_hash"] != arm.recipe_hash:
            if record["status"] == "failed":
                continue
            raise InputError(
                where,
                f"has a run of the arm {run.arm!r} with other options, rate {run.rate:g} and seed {run.seed}; give the "
                "arm another name, or the sweep another --output-dir or `records`",
            )
        results[run] = record
    return results
