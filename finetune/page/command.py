"""Write a page of runs: one HTML file with tables and figures, which needs no network and no script.

    python -m finetune.page runs/first runs/second
    python -m finetune.page runs/                              # all runs in a folder
    python -m finetune.page runs/sweep-mine                    # a sweep: each arm at its best rate, seeds as bands
    python -m finetune.page benchmarks/results/mine.jsonl      # the same out of its records alone

Runs that differ in nothing but the seed are one line, with a band from the lowest to the highest value.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.command_line import run_script
from finetune.config.errors import InputError
from finetune.page.document import make_page
from finetune.page.figures import draw_figures
from finetune.page.runs import read_lines
from finetune.storage.plots import MOST_LINES
from finetune.storage.run_dir import write_beside


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        "page",
        usage="python -m finetune.page RUN [RUN ...] [OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="the folder of a run, of runs or of a sweep, or a sweep's records"
    )
    parser.add_argument("--output", metavar="FILE.html", default="page.html", help="the page (default: page.html)")
    parser.add_argument("--title", metavar="TEXT", help="heading of the page (default: names of what it shows)")
    return parser


def _work(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    lines = read_lines(options.runs)
    drawn = [line for line in lines if line.is_drawn]
    if len(drawn) > MOST_LINES:
        raise InputError("RUN", f"{len(drawn)} lines are more than the {MOST_LINES} that differ; give fewer runs")
    names = ", ".join(dict.fromkeys(line.arm for line in lines))
    title = options.title or (names if len(names) < 80 else f"{len(lines)} runs")
    output = Path(options.output).expanduser()
    page = make_page(title, lines, draw_figures(lines))
    try:
        write_beside(output, page)
    except OSError as error:
        raise InputError("--output", f"cannot write {output}: {error.strerror}") from None
    print(f"page: {output}", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Write a page of runs. Returns the exit code: 0, or 2 for bad input, told in one sentence."""
    return run_script(lambda: _work(sys.argv[1:] if argv is None else argv))
