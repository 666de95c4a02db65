"""Run a sweep: arms x learning rates x seeds of one recipe, two runs side by side, none of them twice.

python -m finetune.sweep my_sweep.toml --plan         # its runs, with core-hours measured and predicted
python -m finetune.sweep my_sweep.toml                # runs what is not done yet; give it again after a stop
python -m finetune.sweep my_sweep.toml --report       # tables of what is done

With --tune it tunes options on narrow models for a wide one, by grids that narrow as the model widens:

python -m finetune.sweep llama_4m --tune lr,weight_decay --widths 64,128,256 --to 512
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.command_line import run_script
from finetune.config.errors import InputError
from finetune.storage.run_dir import RUNS
from finetune.sweep.costs import finished_seconds, plan_table
from finetune.sweep.pictures import plot_series
from finetune.sweep.plan import list_runs
from finetune.sweep.reading import read_sweep
from finetune.sweep.report import report
from finetune.sweep.runner import SweepFolder, run_probes, run_sweep
from finetune.sweep.spec import Sweep
from finetune.sweep.telescope_command import add_options, check_not_given, listed, tune
from finetune.sweep.transfer import list_series, slopes_text
from finetune.sweep.workers import Places

EXIT_CODES = (
    "Exit codes: 0 all runs are done, also those that diverged; 1 some are not; 2 bad input; 124 --max-minutes have "
    "passed; 130 or 143 Ctrl-C or SIGTERM came: the runs saved. Each begins or goes on with the next call."
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        "sweep",
        usage="python -m finetune.sweep FILE.toml [OPTION ...]\n"
        "       python -m finetune.sweep RECIPE --tune lr[,OPTION ...] --widths N,N[,...] --to N [OPTION ...]",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE.toml", help="the sweep; with --tune a recipe: a name, or a YAML file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--plan",
        action="store_true",
        help="print the runs, done and open, with core-hours; of an arm without a finished run it times a few steps",
    )
    what.add_argument("--report", action="store_true", help="print tables of the results")
    what.add_argument(
        "--slopes",
        action="store_true",
        help="print the slope of the best rate over the width, of a full grid for arms that have `width`; draw it",
    )
    parser.add_argument("--processes", metavar="N", type=int, help="runs side by side (default: 2)")
    parser.add_argument(
        "--gpus",
        metavar="ID,ID",
        type=listed(str),
        default=(),
        help="one run on each of these GPUs, as CUDA_VISIBLE_DEVICES names them, in place of --processes (default: all "
        "runs see all GPUs)",
    )
    parser.add_argument(
        "--only", metavar="ARM", action="append", default=[], help="this arm alone; may be given again (default: all)"
    )
    parser.add_argument(
        "--output-dir",
        metavar="FOLDER",
        help="folder of the runs (default: runs/sweep-NAME, of NAME.toml, or runs/tune-RECIPE)",
    )
    parser.add_argument(
        "--max-minutes",
        metavar="X",
        type=float,
        default=0.0,
        help="after so many minutes runs save and stop, and no other begins (default: 0, no limit)",
    )
    add_options(parser.add_argument_group("tuning at small width"))
    return parser


def _work(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    if options.processes is not None and options.processes < 1:
        raise InputError("--processes", f"{options.processes} must be above 0")
    if options.processes is not None and options.gpus:
        raise InputError("--processes", "--gpus says how many runs there are side by side; leave one of them out")
    if options.max_minutes < 0:
        raise InputError("--max-minutes", f"{options.max_minutes:g} must not be negative")
    places = Places(len(options.gpus) or options.processes or 2, options.gpus)
    return _sweep(options, places) if options.tune is None else tune(options, places)


def _sweep(options: argparse.Namespace, places: Places) -> int:
    check_not_given(options)
    sweep = read_sweep(options.file)
    for name in options.only:
        if name not in sweep.arms:
            raise InputError("--only", f"there is no arm {name!r}; the arms are {', '.join(sweep.arms)}")
    path = Path(options.output_dir).expanduser() if options.output_dir else RUNS / f"sweep-{sweep.name}"
    path = path.resolve()
    folder = SweepFolder(path, (sweep.records or path / "records.jsonl").resolve())
    results = folder.results(sweep)
    if options.report:
        print(report(sweep, results))
        return 0
    folder.create()
    if options.slopes:
        series = list_series(sweep, results)
        print(slopes_text(series))
        plot_series(series, path / "slopes.png")
        print(f"picture: {path / 'slopes.png'}")
        return 0
    if options.plan:
        print(_plan(sweep, folder, options.only, places))
        return 0
    return run_sweep(sweep, folder, options.only, places, options.max_minutes)


def _plan(sweep: Sweep, folder: SweepFolder, only: list[str], places: Places) -> str:
    results = folder.results(sweep)
    runs = list_runs(sweep, results, only)
    names = dict.fromkeys(run.arm for run in runs if run not in results)
    unknown = [name for name in names if not finished_seconds(sweep.arms[name], results)]
    probes = run_probes(sweep, folder, unknown, places)
    return plan_table(sweep, results, probes, folder.taken(sweep, runs), only, places.limit)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep, or print its plan or its results. Returns the exit code, see EXIT_CODES."""
    return run_script(lambda: _work(sys.argv[1:] if argv is None else argv))
