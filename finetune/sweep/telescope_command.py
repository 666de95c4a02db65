"""`python -m finetune.sweep RECIPE --tune ...`: its folder, and the grids one after another."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.config.errors import InputError
from finetune.config.options import SCALINGS, flag
from finetune.storage.run_dir import RUNS, write_beside
from finetune.sweep.records import read_json, read_records
from finetune.sweep.runner import TIME_IS_UP, SweepFolder, run_probes, run_sweep
from finetune.sweep.stages import Stage, list_stages
from finetune.sweep.telescope import Telescope
from finetune.sweep.telescope_report import costs_text, optima_text, plot_rates, write_recipe
from finetune.sweep.workers import Places

# Fields of a Telescope by which a folder is another sweep's; the others change nothing of what is done.
_FIXED = ("tuned", "widths", "scaling", "rates", "points", "seeds")


def tune(options: argparse.Namespace, places: Places) -> int:
    """Plan, report or run a telescoping sweep; return the exit code."""
    for name in ("only", "slopes"):
        if getattr(options, name):
            raise InputError(flag(name), "is of the arms of a sweep's file; leave it out with --tune")
    telescope = _telescope(options)
    name = Path(telescope.recipe).stem
    path = (Path(options.output_dir).expanduser() if options.output_dir else RUNS / f"tune-{name}").resolve()
    folder = SweepFolder(path, path / "records.jsonl")
    check_folder(telescope, folder)
    if options.report:
        print(_told(telescope, folder, places, is_timed=False))
        return 0
    folder.create()
    write_beside(path / "telescope.json", json.dumps(_facts(telescope)))
    if options.plan:
        print(_told(telescope, folder, places, is_timed=True))
        return 0
    return _run(telescope, folder, places, options.max_minutes)


def _telescope(options: argparse.Namespace) -> Telescope:
    for name in ("widths", "to"):
        if getattr(options, name) is None:
            raise InputError(flag(name), "is needed with --tune; give it")
    for name in ("widths", "rates", "seeds"):
        values: tuple[Any, ...] = getattr(options, name) or ()
        least = 0 if name == "seeds" else 1e-300
        if len(set(values)) < len(values) or not all(least <= value < math.inf for value in values):
            raise InputError(flag(name), f"{','.join(map(str, values))}: give each value once, and none below 0")
    if options.scaling not in (None, *SCALINGS):
        raise InputError("--scaling", f"{options.scaling!r} is not one of {', '.join(SCALINGS)}")
    telescope = Telescope(
        recipe=options.file,
        tuned=tuple(sorted(options.tune, key=lambda name: name != "lr")),
        widths=options.widths,
        to=options.to,
        scaling=options.scaling or "none",
        rates=tuple(sorted(options.rates or ())),
        points=5 if options.points is None else options.points,
        seeds=options.seeds or (0,),
        extend=2 if options.extend_rates is None else options.extend_rates,
    )
    telescope.check()
    return telescope


def _facts(telescope: Telescope) -> dict[str, Any]:
    facts = {"recipe": telescope.recipe, "recipe_hash": telescope.recipe_hash, **asdict(telescope)}
    return dict(json.loads(json.dumps(facts)))


def check_folder(telescope: Telescope, folder: SweepFolder) -> None:
    """Check that a folder is new, or of this sweep.

    Raises:
        InputError: names the option in which they differ.
    """
    file = folder.path / "telescope.json"
    before, now = read_json(file), _facts(telescope)
    if not before and (folder.records.exists() or folder.probes.exists()):
        raise InputError("--output-dir", f"{folder.path} has the runs of another sweep; give another folder")
    if before and before["recipe_hash"] != now["recipe_hash"]:
        raise InputError(
            "--recipe", f"{folder.path} is of the recipe {before['recipe']} as it was; give another --output-dir"
        )
    for name in _FIXED if before else ():
        if before[name] != now[name]:
            option = "--tune" if name == "tuned" else flag(name)
            shown = [",".join(map(str, v)) if isinstance(v, list) else str(v) for v in (before[name], now[name])]
            raise InputError(
                option,
                f"{folder.path} is of a sweep with {shown[0] or 'none'}, not {shown[1] or 'none'}; give that, or "
                "another --output-dir",
            )


def _told(telescope: Telescope, folder: SweepFolder, places: Places, *, is_timed: bool) -> str:
    """Return the tables; `is_timed` first times a few steps of the widths of which none were."""
    costs = telescope.costs()
    probes = run_probes(costs, folder, list(costs.arms) if is_timed else [], places)
    records = read_records(folder.records)
    stages = list_stages(telescope, records, str(folder.records))
    parts = [costs_text(telescope, stages, records, probes)]
    return "\n\n".join(parts if is_timed else [optima_text(telescope, stages), *parts])


def _run(telescope: Telescope, folder: SweepFolder, places: Places, minutes: float) -> int:
    """Run grid after grid; return the exit code."""
    deadline = time.monotonic() + 60 * minutes
    while True:
        stages = list_stages(telescope, read_records(folder.records), str(folder.records))
        stage = stages[-1]
        if stage.best is not None:
            _finish(telescope, folder, stages, stage.best)
            print(_told(telescope, folder, places, is_timed=False))
            return 0
        if stage.obstacle:
            print(f"{stage.obstacle}; --report tells more")
            return 1
        left = (deadline - time.monotonic()) / 60 if minutes else 0.0
        if minutes and left <= 0:
            return TIME_IS_UP
        print(f"width {stage.width}: a grid of {' x '.join(str(len(axis)) for axis in stage.axes)}", flush=True)
        code = run_sweep(stage.sweep, folder, [], places, left)
        if code:
            return code


def _finish(telescope: Telescope, folder: SweepFolder, stages: list[Stage], best: tuple[float, ...]) -> None:
    """Write the recipe and the picture."""
    recipe = folder.path / f"{Path(telescope.recipe).stem}_w{telescope.to}.yaml"
    write_recipe(telescope, best, recipe)
    picture = folder.path / "rates.png"
    plot_rates(telescope, stages, read_records(folder.records), picture)
    print(f"recipe: {recipe}\npicture: {picture}")
