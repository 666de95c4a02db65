"""Make tables and figures of the evidence out of the committed records, and put them into the page of the docs.

    python -m finetune.evidence                                            # every table that has records
    python -m finetune.evidence benchmarks/results/rare.jsonl              # those of one file
    python -m finetune.evidence --page docs/results/evidence.md            # rewrite the page's tables
    python -m finetune.evidence --figures docs/results/figures             # a picture of each

What has no record yet is said to be not measured, with the command that measures it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.command_line import run_script
from finetune.config.errors import InputError
from finetune.data.texts import read_text
from finetune.evidence import figures
from finetune.evidence.arms import fill_marks, read_arms
from finetune.evidence.direction_tables import direction_tables, long_rows_table, read_matrices
from finetune.evidence.rare_tables import rare_tables
from finetune.evidence.spectra_tables import spectra_tables
from finetune.evidence.tables import (
    ablations_table,
    ahead_table,
    controls_tables,
    deciles_table,
    family_table,
    health_table,
    horizons_table,
    memory_table,
    parity_tables,
    slopes_tables,
)
from finetune.storage.plots import save_figure
from finetune.storage.run_dir import write_beside
from finetune.sweep.plan import results_of
from finetune.sweep.reading import read_sweep
from finetune.sweep.records import read_records
from finetune.sweep.transfer import WidthSeries, list_series, of_done_seeds, slopes_figure

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "Not measured yet"
SWEEP = "python -m finetune.sweep benchmarks/sweeps/{}.toml"


@dataclass(frozen=True)
class EvidenceTable:
    """One table of the page.

    Args:
        file: name of its records.
        command: measures them.
        make: returns the table of what `read` returns.
        draw: returns its figure; None for none.
        read: reads the file.
    """

    file: str
    command: str
    make: Callable[[Any], str]
    draw: Callable[[Any], Any] | None = None
    read: Callable[[Path], Any] = read_arms


def _of_sweep(
    name: str, records: str, make: Callable[[Any], str], draw: Callable[[Any], Any] | None = None
) -> EvidenceTable:
    return EvidenceTable(f"{records}.jsonl", SWEEP.format(name), make, draw)


def _parity(name: str, title: str) -> EvidenceTable:
    return _of_sweep(name, name, parity_tables, lambda arms: figures.parity_figure(arms, title))


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def _read_transfer(file: Path) -> list[WidthSeries]:
    sweep = read_sweep(str(ROOT / "benchmarks" / "sweeps" / "transfer.toml"))
    results = results_of(sweep, read_records(file), str(file))
    done = of_done_seeds(sweep, results)
    return [] if done is None else list_series(done, results)


DIRECTIONS_COMMAND = "python -m benchmarks.robustness.sign_flips"
LONG_COMMAND = DIRECTIONS_COMMAND + " --model rows8192 --model rows4096 --record benchmarks/results/long_rows.jsonl"
MEMORY_COMMAND = "python -m finetune.evidence.associative_memory --record benchmarks/results/associative_memory.json"
# Name on the page, and of the figure -> the table.
TABLES = {
    "parity_2m": _parity("parity_2m", "2M parameters"),
    "parity_8m": _parity("parity_8m", "8M parameters"),
    "parity_8m_half": _parity("parity_8m_half", "8M parameters, half the best rate"),
    "deciles": _of_sweep(
        "parity_2m", "parity_2m", deciles_table, lambda arms: figures.deciles_figure(arms, "2M parameters")
    ),
    "directions": EvidenceTable("sign_flips.jsonl", DIRECTIONS_COMMAND, direction_tables, read=read_matrices),
    "long_rows": EvidenceTable("long_rows.jsonl", LONG_COMMAND, long_rows_table, read=read_matrices),
    "health": _of_sweep("health", "health", health_table),
    "family": _of_sweep("family", "family", family_table),
    "family_ahead": _of_sweep("family", "family", ahead_table),
    "horizons": _of_sweep("horizons", "evidence_4m", horizons_table, figures.horizons_figure),
    "ablations": _of_sweep("horizons", "evidence_4m", ablations_table),
    "controls": _of_sweep("controls", "evidence_4m", controls_tables),
    "rare": _of_sweep("rare", "rare", rare_tables, figures.rare_figure),
    "rare_spectra": _of_sweep("rare", "rare", spectra_tables, figures.spectra_figure),
    "spectra": _of_sweep("parity_2m", "parity_2m", spectra_tables, figures.spectra_figure),
    "transfer": EvidenceTable(
        "transfer.jsonl", SWEEP.format("transfer"), slopes_tables, slopes_figure, read=_read_transfer
    ),
    "associative_memory": EvidenceTable(
        "associative_memory.json", MEMORY_COMMAND, memory_table, figures.memory_figure, _read_json
    ),
}


def table_text(name: str, folder: Path = RESULTS) -> str:
    """Return a table in Markdown, or that it is not measured yet and by which command it is.

    Raises:
        InputError: a line of the records is none.
    """
    table = TABLES[name]
    file = folder / table.file
    text = table.make(table.read(file)) if file.exists() else ""
    return text or f"{NOT_MEASURED}: `{table.command}`."


def filled(page: str, folder: Path = RESULTS) -> str:
    """Return a page with each table, and a link to its records, between its marks; see `fill_marks`.

    Raises:
        InputError: marks of a table that there is not.
    """

    def block(name: str) -> str:
        text, file = table_text(name, folder), TABLES[name].file
        if text.startswith(NOT_MEASURED):
            return text
        return f"{text}\n\n[Records](../records/{file}), made by `{TABLES[name].command}`."

    return fill_marks(page, TABLES, block)


def _work(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", metavar="FILE", nargs="*", type=Path, help="records (default: all committed ones)")
    parser.add_argument("--page", metavar="FILE", type=Path, help="rewrite the tables of this page")
    parser.add_argument("--figures", metavar="FOLDER", type=Path, help="write a .png of each table that has a figure")
    options = parser.parse_args(argv)
    files = {file.name: file for file in options.files or [RESULTS / table.file for table in TABLES.values()]}
    for name, file in files.items():
        if options.files and not file.is_file():
            raise InputError("FILE", f"there is no file {file}")
        if name not in {table.file for table in TABLES.values()}:
            known = ", ".join(dict.fromkeys(table.file for table in TABLES.values()))
            raise InputError("FILE", f"no table is made of {name}; those that have tables are {known}")
    if options.page is not None:
        write_beside(options.page, filled(read_text(options.page, "--page")))
    for name, table in TABLES.items():
        if table.file not in files or not files[table.file].exists():
            continue
        is_measured = not table_text(name, files[table.file].parent).startswith(NOT_MEASURED)
        if options.figures is not None and table.draw is not None and is_measured:
            options.figures.mkdir(parents=True, exist_ok=True)
            picture = options.figures / f"{name}.png"
            save_figure(table.draw(table.read(files[table.file])), picture, {"Software": None})
        if options.page is None:
            print(f"{name}\n\n{table_text(name, files[table.file].parent)}\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 2 bad input."""
    return run_script(lambda: _work(sys.argv[1:] if argv is None else argv))
