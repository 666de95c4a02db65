"""Compare runs: one table, and one picture of their losses.

    python -m finetune.compare runs/first runs/second
    python -m finetune.compare runs/            # all runs in a folder

Reads what the runs left, also those that are not complete and those of release 0.1. It needs no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: absolute imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from finetune.command_line import run_script
from finetune.config.errors import InputError
from finetune.config.options import Training
from finetune.config.reading import read_values
from finetune.storage.plots import LossCurve, plot_losses, smooth
from finetune.storage.run_dir import RunFolder

# Column -> how its value is written; "-" where a run does not tell it.
COLUMNS: dict[str, Callable[[Any], str]] = {
    "run": str,
    "optimizer": str,
    "step": "{:,}".format,
    "loss": "{:.4f}".format,
    "val_loss": "{:.4f}".format,
    "tokens_per_second": "{:,.0f}".format,
    "state_bytes": lambda size: f"{size / 2**20:,.1f} MiB",
    "peak_bytes": lambda size: f"{size / 2**20:,.1f} MiB",
}
HEADINGS = ("run", "optimizer", "step", "loss", "validation", "tokens/s", "state", "peak")


@dataclass(frozen=True)
class RunSummary:
    """One run, read from its folder.

    Args:
        path: its folder.
        curve: its losses.
        values: column -> value; None where the run does not tell it.
        corpus: hash of its data; None where it does not tell.
        options: of its recipe; {} where it has left none.
        facts: of run.json; {} where it has left none.
    """

    path: Path
    curve: LossCurve
    values: dict[str, Any]
    corpus: str | None
    options: dict[str, Any]
    facts: dict[str, Any]


def find_runs(given: Sequence[str]) -> list[Path]:
    """Return the folders of the runs that were named, each once: runs, or folders of runs.

    Of a folder of runs those without a step are left out, which is noted on stderr.

    Raises:
        InputError: one is neither, or no run in it has a step.
    """
    found: list[Path] = []
    for name in given:
        path = Path(name).expanduser()
        inside = sorted(file.parent for file in path.glob("*/metrics.jsonl") if not file.parent.is_symlink())
        runs = [path] if (path / "metrics.jsonl").is_file() else inside
        if not runs:
            raise InputError("RUN", f"{path} holds no metrics.jsonl, nor does a folder in it; give the folder of a run")
        if runs == inside:
            runs = [run for run in inside if _steps(run)]
            empty = [str(run.resolve()) for run in inside if run not in runs]
            if not runs:
                raise InputError("RUN", f"no run in {path} has a step yet; give other runs")
            if empty:
                print(f"note: left out, without a step: {', '.join(empty)}", file=sys.stderr)
        found += [run.resolve() for run in runs]
    return list(dict.fromkeys(found))


def read_run(path: Path, name: str) -> RunSummary:
    """Read one run.

    Args:
        path: its folder.
        name: for the table and the picture.

    Raises:
        InputError: it has no step yet.
    """
    metrics = _steps(path)
    if not metrics:
        raise InputError("RUN", f"{path} has no step in its metrics.jsonl yet; leave it out")
    result, report = _record(path / "result.json"), _record(path / "state_report.json")
    options, record = _recipe(path), _record(path / "run.json")
    facts = {**metrics[-1], "optimizer": options.get("optimizer"), **result, **record}
    losses = [(m["step"], m["val_loss"]) for m in metrics if m.get("val_loss") is not None]
    curve = LossCurve(name, metrics, facts.get("val_loss_before"))
    values = {
        "run": name,
        "optimizer": facts.get("optimizer"),
        "step": metrics[-1]["step"],
        "loss": smooth([m["loss"] for m in metrics])[-1],
        "val_loss": losses[-1][1] if losses else None,
        "tokens_per_second": _speed(metrics),
        "state_bytes": report.get("total_bytes"),
        "peak_bytes": result.get("peak_bytes"),
        **({"expert_load_cv": smooth(load)[-1]} if (load := curve.expert_load[1]) else {}),
    }
    return RunSummary(path, curve, values, facts.get("corpus"), options, record)


def _steps(path: Path) -> list[dict[str, Any]]:
    """Read the records of a run that have a loss.

    Raises:
        InputError: the file cannot be read, or a line is not the record of a step.
    """
    folder = RunFolder(path)
    try:
        records = [record for record in folder.metrics() if record.get("loss") is not None]
        for record in records:
            _ = [float(record[key]) for key in ("step", "loss", "tokens", "seconds")]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = str(error) if isinstance(error, OSError) else "a line is not the record of a step"
        raise InputError("RUN", f"cannot read {folder.metrics_file}: {reason}; leave that run out") from None
    return records


def _record(file: Path) -> dict[str, Any]:
    """Return a JSON file of a run; {} where it has not been written."""
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError("RUN", f"cannot read {file}: {error}; leave that run out") from None
    return record


def _recipe(path: Path) -> dict[str, Any]:
    """Return the options of a run; {} where it has left no recipe.

    Raises:
        InputError: the recipe cannot be read.
    """
    file = RunFolder(path).recipe_file
    return read_values(str(file), path, Training)[0] if file.is_file() else {}


def _speed(metrics: Sequence[dict[str, Any]]) -> float | None:
    """Return tokens per second of all steps after the first, which compiles and warms up; None for a single one."""
    tokens, seconds = (metrics[-1][key] - metrics[0][key] for key in ("tokens", "seconds"))
    return tokens / seconds if seconds > 0 else None


def table(runs: Sequence[RunSummary]) -> str:
    """Return the runs as lines of text, a run a line, in columns."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for run in runs:
        values = ((run.values[key], show) for key, show in COLUMNS.items())
        rows.append(tuple("-" if value is None else show(value) for value, show in values))
    return align(rows, left=2)


def align(rows: Sequence[Sequence[str]], left: int) -> str:
    """Return rows of cells as lines in columns, the first `left` of them flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append(
            "  ".join(text.ljust(width) if i < left else text.rjust(width) for i, (text, width) in cells).rstrip()
        )
    return "\n".join(lines)


def folder_names(paths: Sequence[Path]) -> list[str]:
    """Return the names of folders, with that of the folder above where two are equal."""
    names = [path.name for path in paths]
    both = zip(paths, names, strict=True)
    return [name if names.count(name) == 1 else f"{path.parent.name}/{name}" for path, name in both]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the folder of a run, or a folder of runs")
    parser.add_argument("--output", metavar="FILE.png", default="compare.png", help="picture; default: compare.png")
    parser.add_argument("--no-plot", action="store_true", help="only the table")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table; sizes in bytes")
    return parser


def _work(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    paths = find_runs(options.runs)
    runs = [read_run(path, name) for path, name in zip(paths, folder_names(paths), strict=True)]
    print(json.dumps([run.values for run in runs], indent=1) if options.json else table(runs))
    if len({run.corpus for run in runs}) > 1:
        print("note: these runs are not all on the same data: their losses do not compare", file=sys.stderr)
    if not options.no_plot:
        output = Path(options.output).expanduser()
        try:
            plot_losses([run.curve for run in runs], output, ", ".join(folder_names([run.path for run in runs]))[:80])
        except (OSError, ValueError) as error:
            raise InputError("--output", f"cannot write {output}: {error}") from None
        print(f"picture: {output}", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Compare runs. Returns the exit code: 0, or 2 for bad input, told in one sentence."""
    return run_script(lambda: _work(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
