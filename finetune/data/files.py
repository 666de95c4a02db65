"""Files of rows: which there are in a folder, and the rows of each. No torch in here."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from finetune.data.parquet_files import parquet_objects
from finetune.data.report import DataReport
from finetune.data.text_files import PACKINGS, csv_objects, json_objects, jsonl_objects

KINDS = (".jsonl", ".json", ".csv", ".parquet")
NAMES = f"{', '.join(KINDS)}; text also with {' or '.join(PACKINGS)} behind it"


def row_kind(path: Path) -> str | None:
    """Return which of `KINDS` the name of a file says, whether it is packed or not; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKINGS:
        del suffixes[-1]
        kind = suffixes[-1] if suffixes else ""
        return kind if kind in KINDS and kind != ".parquet" else None
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def find_row_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the files of rows in a folder, at any depth, in order, and the names of the other files.

    Hidden files and those of hidden folders, which editors and notebooks leave as copies, are others.
    """
    files, others = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir():
            if path.is_symlink():
                others.append(f"{name} (a link to a folder)")
            continue
        if any(part.startswith((".", "~")) for part in name.parts):
            others.append(f"{name} (hidden)")
        elif row_kind(path):
            files.append(path)
        else:
            others.append(str(name))
    return files, others


def file_rows(file: Path, columns: Collection[str], report: DataReport) -> Iterator[tuple[int, Any]]:
    """Return an iterator over (number from 1, value) of a file's rows; in .jsonl and .csv the number is the line's.

    Args:
        file: whose name has a `row_kind`.
        columns: those that are read of a .parquet file.
        report: gets the rows that cannot be read.

    Raises:
        InputError: unreadable from some place on, or a bad row where the report says so.
    """
    kind = row_kind(file)
    if kind == ".parquet":
        return parquet_objects(file, columns, report)
    return {".json": json_objects, ".csv": csv_objects}.get(str(kind), jsonl_objects)(file, report)
