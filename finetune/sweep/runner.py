"""Runs of a sweep side by side: which one is next, how it ended, and what is left. No torch in here."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config.errors import InputError
from finetune.storage.run_dir import RUNS
from finetune.sweep.costs import PROBE_STEPS, probe_options
from finetune.sweep.plan import Results, choose_rate, list_runs, results_of
from finetune.sweep.records import (
    append_record,
    holder,
    latest,
    make_record,
    measure,
    read_records,
    surroundings,
    take,
)
from finetune.sweep.spec import Sweep, SweepRun, command_words
from finetune.sweep.worker import SweepJob
from finetune.sweep.workers import Places, Workers

# Signals by which people and systems end a process that did nothing wrong.
_CUT_OFF = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TIME_IS_UP = 124
PROBES = "probes.jsonl"


@dataclass(frozen=True)
class SweepFolder:
    """The folder of a sweep's runs, and the files of its records and probes."""

    path: Path
    records: Path

    @property
    def probes(self) -> Path:
        """Path of the probes' records."""
        return self.path / PROBES

    @classmethod
    def of(cls, sweep: Sweep, given: str | None) -> SweepFolder:
        """Return the folder of a sweep's file: the one that was given, or its usual one."""
        path = (Path(given).expanduser() if given else RUNS / f"sweep-{sweep.name}").resolve()
        return cls(path, (sweep.records or path / "records.jsonl").resolve())

    def create(self) -> None:
        """Make the folder.

        Raises:
            InputError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError("--output-dir", f"cannot write to {self.path}: {error.strerror}") from None

    def results(self, sweep: Sweep) -> Results:
        """Read the last record of each run.

        Raises:
            InputError: of `read_records` and `results_of`.
        """
        return results_of(sweep, read_records(self.records), str(self.records))

    def taken(self, sweep: Sweep, runs: list[SweepRun]) -> dict[SweepRun, str]:
        """Return the runs that processes work on now, here or elsewhere."""
        locks = {run: self.job(sweep, run).file("lock") for run in runs if run.rate is not None}
        return {run: who for run, lock in locks.items() if (who := holder(lock)) is not None}

    def job(self, sweep: Sweep, run: SweepRun) -> SweepJob:
        """Return the job of one run."""
        arm = sweep.arms[run.arm]
        facts: dict[str, Any] = {"sweep": sweep.name, "arm": run.arm, "rate": run.rate, "seed": run.seed}
        facts |= {"script": arm.script, "recipe": arm.recipe.name, "options": dict(arm.options)}
        return SweepJob(
            facts={**facts, "recipe_hash": arm.recipe_hash},
            words=sweep.words(run),
            name=run.name,
            folder=str(self.path),
            records=str(self.records),
            curve_every=sweep.curve_every,
            keep_models=sweep.keep_models,
        )

    def probe(self, sweep: Sweep, name: str) -> SweepJob:
        """Return the job that times a few steps of an arm."""
        arm = sweep.arms[name]
        rate, seed = (*arm.rates, 1e-3)[0], arm.seeds[0]
        job, options = self.job(sweep, SweepRun(name, rate, seed)), probe_options(arm)
        return SweepJob(
            facts={**job.facts, "options": options},
            words=command_words(arm.recipe_name, options, rate, seed),
            name=f"probe-{name}",
            folder=str(self.path),
            records=str(self.probes),
            curve_every=1,
            keep_models=False,
        )


def run_probes(sweep: Sweep, folder: SweepFolder, names: list[str], places: Places) -> dict[str, Mapping[str, Any]]:
    """Measure a few steps of each of these arms, unless that was done; return arm -> the record of its probe."""

    def known() -> dict[str, Mapping[str, Any]]:
        return {
            record["arm"]: record
            for record in read_records(folder.probes)
            if record["status"] == "finished"
            and record["arm"] in sweep.arms
            and record["recipe_hash"] == sweep.arms[record["arm"]].recipe_hash
        }

    missing = [name for name in names if name not in known()]
    if missing:
        print(f"timing {PROBE_STEPS} steps of {', '.join(missing)}", file=sys.stderr, flush=True)
    jobs = [folder.probe(sweep, name) for name in missing]
    _run_all(lambda: jobs, lambda job: job.facts["arm"] not in known(), places, 0.0)
    for job in jobs:
        shutil.rmtree(job.run_folder, ignore_errors=True)
    last = {record["arm"]: record for record in read_records(folder.probes)}
    return known() | {name: last[name] for name in missing if name in last and name not in known()}


def run_sweep(sweep: Sweep, folder: SweepFolder, only: list[str], places: Places, minutes: float) -> int:
    """Run what is not done yet; return the exit code.

    Args:
        sweep: the sweep.
        folder: of its runs.
        only: of `list_runs`.
        places: for runs side by side.
        minutes: after which runs save and stop; 0 is no limit.

    Returns:
        0 all runs that can run are done, 1 some are not, 124 `minutes` have passed.
    """

    def open_jobs() -> list[SweepJob]:
        results = folder.results(sweep)
        runs = list_runs(sweep, results, only)
        return [folder.job(sweep, run) for run in runs if run.rate is not None and _is_open(results.get(run))]

    def still_open(job: SweepJob) -> bool:
        return _is_open(folder.results(sweep).get(_run_of(job)))

    is_late = _run_all(open_jobs, still_open, places, minutes)
    return _close(sweep, folder, only, is_late)


def _is_open(record: Mapping[str, Any] | None) -> bool:
    """Check whether a run is to run: one that failed is tried again by each call."""
    return record is None or record["status"] == "failed"


def _run_all(
    open_jobs: Callable[[], list[SweepJob]],
    still_open: Callable[[SweepJob], bool],
    places: Places,
    minutes: float,
) -> bool:
    """Run jobs side by side, each once, until there is none; return whether time was up before.

    Args:
        open_jobs: lists the jobs in their order, anew whenever one has ended.
        still_open: asked once a job is taken, since another sweep may have just done it.
        places: for jobs side by side.
        minutes: of `run_sweep`.
    """
    deadline = time.monotonic() + 60 * minutes
    workers, is_late = Workers(places), False
    started: set[str] = set()

    def start_one(left: float) -> bool:
        for job in open_jobs():
            lock = take(job.file("lock")) if job.name not in started else None
            if lock is not None and still_open(job):
                started.add(job.name)
                workers.start(replace(job, minutes=left), lock)
                return True
            if lock is not None:
                os.close(lock)
        return False

    with workers.ended_together():
        while True:
            while len(workers.running) < places.limit and not is_late:
                left = (deadline - time.monotonic()) / 60 if minutes else 0.0
                is_late = bool(minutes) and left <= 0
                if is_late or not start_one(left):
                    break
            if not workers.running:
                return is_late
            job, code = workers.next_end()
            is_late |= code == TIME_IS_UP
            _tell(job, code)


def _run_of(job: SweepJob) -> SweepRun:
    return SweepRun(job.facts["arm"], job.facts["rate"], job.facts["seed"])


def _tell(job: SweepJob, code: int) -> None:
    """Print how a run ended; of one that a fault of its own killed, write the record."""
    log = job.file("log")
    has_crashed = code < 0 and -code not in _CUT_OFF
    if has_crashed:
        error = f"ended by {signal.Signals(-code).name}; see {log.name}"
        known = {**job.facts, "status": "failed", "error": error, **surroundings()}
        metrics = {**measure(job.run_folder, job.curve_every), "core_seconds": 0.0}
        append_record(Path(job.records), make_record(known, metrics))
    record = latest(read_records(Path(job.records))).get(_run_of(job))
    if record is not None and (code in (0, 1, 2) or has_crashed):
        metrics = record["metrics"]
        loss = f"validation loss {metrics['val_loss']:.4f}" if record["status"] == "finished" else record["error"]
        text = f"{record['status']}, {loss} ({metrics['core_seconds']:.0f} CPU s)"
    elif code < 0:
        text = f"cut off by {signal.Signals(-code).name}; the next call goes on with it"
    else:
        text = f"stopped with exit code {code}; the next call goes on with it (log: {log})"
    is_probe = job.records.endswith(PROBES)
    print(f"{job.name}: {text}", file=sys.stderr if is_probe else sys.stdout, flush=True)


def _close(sweep: Sweep, folder: SweepFolder, only: list[str], is_late: bool) -> int:
    """Say what is left, and return the exit code."""
    results = folder.results(sweep)
    runs = list_runs(sweep, results, only)
    left = [run for run in runs if run.rate is None or _is_open(results.get(run))]
    if not left:
        print(f"all {len(runs)} runs are done: {folder.records}")
        return 0
    for name, arm in sweep.arms.items():
        if (not only or name in only) and (obstacle := choose_rate(sweep, arm, results).obstacle):
            print(f"{name}: {obstacle}")
    taken = folder.taken(sweep, left)
    for run, who in taken.items():
        print(f"{run.name}: taken by {who}")
    print(f"{len(runs) - len(left)} of {len(runs)} runs are done, {len(taken)} run elsewhere; --report tells more")
    return TIME_IS_UP if is_late else 1
