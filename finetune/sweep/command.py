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
from collections.abc import Callable, Sequence
from typing import TypeVar

from finetune.command_line import run_script
from finetune.config.errors import InputError
from finetune.config.options import flag
from finetune.storage.plots import save_figure
from finetune.sweep.costs import finished_seconds, plan_table
from finetune.sweep.plan import list_runs
from finetune.sweep.reading import read_sweep
from finetune.sweep.report import report
from finetune.sweep.runner import SweepFolder, run_probes, run_sweep
from finetune.sweep.spec import Sweep
from finetune.sweep.workers import Places

T = TypeVar("T")
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
        type=_listed(str),
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
    _add_options(parser.add_argument_group("tuning at small width"))
    return parser


def _listed(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Return the type of an option that takes values with commas between them."""

    def read(text: str) -> tuple[T, ...]:
        return tuple(kind(part.strip()) for part in text.split(","))

    read.__name__ = f"list of {kind.__name__} values"
    return read


def _add_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that go with --tune; where one is not given its value is None."""
    add, names, numbers = group.add_argument, _listed(str), _listed(int)
    add("--tune", metavar="NAME,NAME", type=names, help="what is tuned: lr, and further options that are numbers")
    add("--widths", metavar="N,N", type=numbers, help="widths of the grids, ascending; the first has the full grid")
    add("--to", metavar="N", type=int, help="width that the values are for; nothing runs at it")
    add(
        "--scaling",
        metavar="RULE",
        help="the rule by which all widths are trained, as the script has it (default: none)",
    )
    add(
        "--rates",
        metavar="X,X",
        type=_listed(float),
        help="learning rates of the first grid (default: around the recipe's)",
    )
    add(
        "--points",
        metavar="N",
        type=int,
        help="values of each option in the first grid, a factor of 2 apart around the recipe's; not of lr with --rates "
        "(default: 5)",
    )
    add("--seeds", metavar="N,N", type=numbers, help="seeds of every point of the grids (default: 0)")
    add(
        "--extend-rates",
        metavar="N",
        type=int,
        help="values that may be added to each axis of a grid, beyond an end at which the best one is (default: 2)",
    )


def _check_not_given(options: argparse.Namespace) -> None:
    """Check that a sweep of a file has none of the options that go with --tune.

    Raises:
        InputError: names the option.
    """
    for name in ("widths", "to", "scaling", "rates", "points", "seeds", "extend_rates"):
        if getattr(options, name) is not None:
            raise InputError(flag(name), "goes with --tune and a recipe; a sweep's file says it itself")


def _work(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    if options.processes is not None and options.processes < 1:
        raise InputError("--processes", f"{options.processes} must be above 0")
    if options.processes is not None and options.gpus:
        raise InputError("--processes", "--gpus says how many runs there are side by side; leave one of them out")
    if options.max_minutes < 0:
        raise InputError("--max-minutes", f"{options.max_minutes:g} must not be negative")
    places = Places(len(options.gpus) or options.processes or 2, options.gpus)
    if options.tune is None:
        return _sweep(options, places)
    from finetune.sweep.telescope_command import tune  # numpy, after the options have passed

    return tune(options, places)


def _sweep(options: argparse.Namespace, places: Places) -> int:
    _check_not_given(options)
    sweep = read_sweep(options.file)
    for name in options.only:
        if name not in sweep.arms:
            raise InputError("--only", f"there is no arm {name!r}; the arms are {', '.join(sweep.arms)}")
    folder = SweepFolder.of(sweep, options.output_dir)
    results = folder.results(sweep)
    if options.report:
        print(report(sweep, results))
        return 0
    folder.create()
    if options.slopes:
        from finetune.sweep.transfer import list_series, slopes_figure, slopes_text  # numpy

        series = list_series(sweep, results)
        print(slopes_text(series))
        picture = folder.path / "slopes.png"
        save_figure(slopes_figure(series), picture)
        print(f"picture: {picture}")
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
