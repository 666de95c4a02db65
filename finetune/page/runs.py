"""Runs as a page has them: their curves, results, options and versions, out of folders or of a sweep's records."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.compare import find_runs, folder_names, read_run
from finetune.config.errors import InputError
from finetune.storage.plots import smooth, spectra_values
from finetune.sweep.records import latest, read_records

RECORDS = "records.jsonl"
# Options in which runs of one line may differ: they change nothing of what is compared, or are the seed.
OF_A_RUN = ("name", "seed", "save_every", "keep_checkpoints", "max_minutes", "step_timeout", "tracker")
_VERSIONS = ("muon8bit", "torch", "transformers", "accelerate", "python")
_FACTS = ("script", "device", "mixed_precision", "world_size", "parallelism", "trained_parameters")
# Measures of --health-every, a number for each watched matrix: the worst of them is drawn.
_WORST: Mapping[str, Callable[[list[float]], float]] = {
    "descent": min,
    "update_cosine": min,
    "momentum_error": max,
    "sign_flips": max,
    "zero_codes": max,
    "extreme_codes": max,
}
_SWEEP_NAME = re.compile(r"(?P<arm>.+)-lr(?P<rate>[0-9.e+-]+)-seed(?P<seed>\d+)")

Curve = tuple[list[int], list[float]]  # steps and values


@dataclass(frozen=True)
class PageRun:
    """One run.

    Args:
        arm: its name, but for learning rate and seed where it is one of a sweep.
        rate: peak learning rate; None where it is not known.
        seed: None where it is not known.
        values: as in the table of `finetune.compare`; None for what the run does not tell.
        curves: name of a value in metrics.jsonl -> its curve; losses and norms of gradients are smoothed.
        step_ms: times of steps in ms, without the first one; of a record means over a few steps.
        options: name -> value.
        versions: of the software, the device, and the data.
        status: "finished", "diverged", "failed" or "not complete".
    """

    arm: str
    rate: float | None
    seed: int | None
    values: Mapping[str, Any]
    curves: Mapping[str, Curve]
    step_ms: Sequence[float]
    options: Mapping[str, Any]
    versions: Mapping[str, Any]
    status: str


@dataclass(frozen=True)
class Line:
    """Runs that differ in nothing but the seed, drawn as one line.

    Args:
        name: of the line.
        arm: name of the lines that differ from this one in nothing but the learning rate.
        runs: at least one, by seed.
        is_drawn: whether it has curves; of a sweep's arm its best rate alone has them.
    """

    name: str
    arm: str
    runs: Sequence[PageRun]
    is_drawn: bool = True


def read_lines(given: Sequence[str]) -> list[Line]:
    """Read runs, sweeps and records.

    Args:
        given: folders of runs, folders of such folders, folders of sweeps, or files of a sweep's records.

    Raises:
        InputError: one of them is nothing of that kind, or a file of it cannot be read.
    """
    lines: list[Line] = []
    folders: list[str] = []
    for name in given:
        path = Path(name).expanduser()
        if path.is_file():
            lines += _sweep_lines(_from_records(path))
        elif not (path / "metrics.jsonl").is_file() and any(path.glob("runs/*/metrics.jsonl")):
            lines += _sweep_lines(_from_sweep(path / "runs"))
        elif (path / RECORDS).is_file():
            lines += _sweep_lines(_from_records(path / RECORDS))
        else:
            folders.append(name)
    paths = find_runs(folders) if folders else []
    runs = [_from_folder(path, name) for path, name in zip(paths, folder_names(paths), strict=True)]
    return lines + _by_options(runs)


def _from_folder(path: Path, name: str) -> PageRun:
    summary = read_run(path, name)
    options, facts, metrics = summary.options, summary.facts, summary.curve.metrics
    curves = {key: _curve(metrics, key) for key in dict.fromkeys(itertools.chain(["grad_norm"], *metrics))}
    curves |= {f"health/{key}": _worst(metrics, key) for key in _WORST}
    curves |= _spectra([(m["step"], m["spectra"]) for m in metrics if m.get("spectra")])
    for key in ("loss", "grad_norm"):
        curves[key] = curves[key][0], smooth(curves[key][1])
    for key in ("aux_loss", "z_loss"):  # older runs have 0 where it was not asked for
        if not options.get(f"router_{key}", True):
            curves.pop(key, None)
    curves["val_loss"] = summary.curve.validation
    pairs = itertools.pairwise((m["step"], m["seconds"]) for m in metrics)
    is_complete = (path / "result.json").is_file()
    versions = {key: facts[key] for key in (*_VERSIONS, *_FACTS) if key in facts}
    return PageRun(
        arm=name,
        rate=options.get("lr"),
        seed=options.get("seed"),
        values=summary.values,
        curves={key: curve for key, curve in curves.items() if curve[0]},
        step_ms=_step_ms(list(pairs)),
        options=_flat(options),
        versions=versions | ({"data": summary.corpus[:12]} if summary.corpus else {}),
        status="diverged" if (path / "diverged.json").is_file() else "finished" if is_complete else "not complete",
    )


def _curve(metrics: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """Return what is a number, or can be counted, under a key of metrics.jsonl."""
    steps, values = [], []
    for record in metrics:
        value = record.get(key)
        if isinstance(value, Mapping):  # layer -> its experts
            value = sum(len(entry) for entry in value.values() if isinstance(entry, list))
        if isinstance(value, int | float) and key not in ("step", "tokens", "seconds", "health", "spectra"):
            steps.append(record["step"])
            values.append(float(value))
    return steps, values


def _worst(metrics: Sequence[Mapping[str, Any]], measure: str) -> Curve:
    """Return the worst value of a measure over the watched matrices, at the steps that were measured."""
    steps, values = [], []
    for record in metrics:
        health = record.get("health")
        found = [of[measure] for of in health.values() if measure in of] if isinstance(health, Mapping) else []
        if found:
            steps.append(record["step"])
            values.append(_WORST[measure](found))
    return steps, values


def _spectra(measured: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, Curve]:
    """Return the curves of `spectra_values`, of pairs of step and spectra."""
    curves: dict[str, Curve] = {}
    for step, spectra in measured:
        for key, value in spectra_values(spectra).items():
            steps, values = curves.setdefault(key, ([], []))
            steps.append(step)
            values.append(float(value))
    return curves


def _step_ms(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[float]:
    """Return ms a step, of pairs of (step, seconds so far)."""
    return [1000 * (after[1] - before[1]) / (after[0] - before[0]) for before, after in pairs if after[0] > before[0]]


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _from_sweep(folder: Path) -> list[PageRun]:
    """Read the complete runs in the folder of a sweep's runs; others are left out, which is noted on stderr."""
    paths = find_runs([os.fspath(folder)])
    runs = [_from_folder(path, path.name) for path in paths]
    open_runs = [run.arm for run in runs if run.status == "not complete"]
    if open_runs:
        print(f"note: left out, not complete: {', '.join(open_runs)}", file=sys.stderr)
    runs = [run for run in runs if run.status != "not complete"]
    if not runs:
        raise InputError("RUN", f"no run in {folder} is complete yet; give other runs")
    return [replace(run, arm=found["arm"]) if (found := _SWEEP_NAME.fullmatch(run.arm)) else run for run in runs]


def _from_records(file: Path) -> list[PageRun]:
    try:
        runs = [_from_record(record) for record in latest(read_records(file)).values()]
    except InputError as error:
        raise InputError("RUN", str(error)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("RUN", f"{file} holds no records of a sweep: {error!r}; give other runs") from None
    if not runs:
        raise InputError("RUN", f"{file} has no record yet; give other runs")
    return runs


def _from_record(record: Mapping[str, Any]) -> PageRun:
    metrics = record["metrics"]
    curves = {
        name: ([step for step, _ in pairs], [float("nan") if value is None else float(value) for _, value in pairs])
        for name, pairs in (("loss", metrics["training_curve"]), ("val_loss", metrics["validation_curve"]))
    }
    training = curves["loss"][1]
    curves |= _spectra(metrics.get("spectra") or ())
    values = {
        "optimizer": record["options"].get("optimizer"),
        "step": metrics["steps"],
        "loss": training[-1] if training else None,
        "tokens_per_second": metrics["tokens"] / metrics["seconds"] if metrics["seconds"] else None,
        **{key: metrics.get(key) for key in ("val_loss", "state_bytes", "peak_bytes")},
    }
    versions = {key: value for key, value in record["versions"].items() if value}
    facts = {"script": record["script"], "commit": record["commit"], "threads": record["threads"]}
    return PageRun(
        arm=record["arm"],
        rate=record["rate"],
        seed=record["seed"],
        values=values,
        curves={key: curve for key, curve in curves.items() if curve[0]},
        step_ms=_step_ms(list(itertools.pairwise(metrics["step_seconds"]))),
        options={"recipe": record["recipe"], **record["options"], "lr": record["rate"], "seed": record["seed"]},
        versions=versions | facts | {"data": (record["data_hash"] or "")[:12]},
        status=record["status"],
    )


def _sweep_lines(runs: Sequence[PageRun]) -> list[Line]:
    """Return a line for each arm and rate; of an arm that one is drawn that has most seeds, then the lowest loss."""
    groups: dict[tuple[str, float | None], list[PageRun]] = {}
    for run in runs:
        groups.setdefault((run.arm, run.rate), []).append(run)
    best: dict[str, tuple[tuple[int, float], float | None]] = {}
    for (arm, rate), found in groups.items():
        losses = [run.values["val_loss"] for run in found if run.status == "finished"]
        if losses and (mark := (-len(losses), sum(losses) / len(losses))) <= best.get(arm, (mark, rate))[0]:
            best[arm] = mark, rate
    return [
        Line(f"{arm}, lr {rate:g}", arm, _by_seed(found), arm in best and rate == best[arm][1])
        for (arm, rate), found in groups.items()
    ]


def _by_options(runs: Sequence[PageRun]) -> list[Line]:
    """Return lines of the runs of folders; those that differ in nothing but the seed are one."""
    groups: dict[str, list[PageRun]] = {}
    for number, run in enumerate(runs):
        options = {key: value for key, value in run.options.items() if key not in OF_A_RUN}
        key = json.dumps([options, run.versions.get("data")], default=str) if run.options else str(number)
        if any(other.seed == run.seed for other in groups.get(key, ())):
            key = f"{key} {number}"
        groups.setdefault(key, []).append(run)
    lines = []
    for found in groups.values():
        stems = {re.sub(rf"[-_. ]*(seed)?[-_=]?{run.seed}$", "", run.arm) for run in found}
        name = stems.pop() if len(found) > 1 and len(stems) == 1 and "" not in stems else found[0].arm
        lines.append(Line(name, _without_rate(found[0], name), _by_seed(found)))
    return lines


def _without_rate(run: PageRun, name: str) -> str:
    """Return a name that is the same for runs that differ in learning rate alone."""
    return name if run.rate is None else re.sub(r"[-_. ]?lr[-_=]?[0-9][0-9.e+-]*(?<![-.])", "", name) or name


def _by_seed(runs: Sequence[PageRun]) -> list[PageRun]:
    return sorted(runs, key=lambda run: (run.seed is None, run.seed))
