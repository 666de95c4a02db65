"""Sources whose documents are rows: .jsonl, .parquet, and whatever `datasets` opens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.recipe import Recipe

PARQUET_ROWS = 256  # rows decoded at a time


def jsonl_objects(file: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line of a .jsonl file that is not blank, one in memory at a time.

    Raises:
        InputError: unreadable, or a line that is no JSON.
    """
    number = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError("--dataset", f"line {number} of {file} is no JSON: {error}") from None
    except (OSError, ValueError) as error:
        raise InputError("--dataset", f"cannot read {file} as JSON lines: {error}") from None


def jsonl_rows(file: Path, column: str) -> Iterator[str]:
    """Texts of a .jsonl file, one line in memory at a time.

    Raises:
        InputError: a line that is no JSON object, or has no text in the column.
    """
    for number, value in jsonl_objects(file):
        yield _text(value, column, f"line {number} of {file}")


def parquet_objects(file: Path, columns: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, {column: value}) of a .parquet file, `PARQUET_ROWS` rows in memory at a time.

    Args:
        file: what to read.
        columns: those wanted; the file may lack some. If it lacks all of them, every column is read.

    Raises:
        InputError: not a parquet file.
    """
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            wanted = [name for name in opened.schema_arrow.names if name in columns]
            number = 0
            for batch in opened.iter_batches(PARQUET_ROWS, columns=wanted or None):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InputError("--dataset", f"cannot read {file} as parquet: {str(error).splitlines()[0]}") from None


def parquet_rows(file: Path, column: str) -> Iterator[str]:
    """Texts of a .parquet file, `PARQUET_ROWS` rows in memory at a time.

    Raises:
        InputError: not a parquet file, or no such column of text.
    """
    for number, row in parquet_objects(file, [column]):
        yield _text(row, column, f"row {number} of {file}")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def open_hub(dataset: str, config: str | None, split: str, streaming: bool = False) -> Any:
    """A split of a dataset saved on disk, or of a name for `datasets`.

    Raises:
        InputError: `datasets` cannot open it, or it has no such split.
    """
    import datasets

    try:
        if Path(dataset).is_dir():
            opened = datasets.load_from_disk(dataset)
            return opened[split] if isinstance(opened, datasets.DatasetDict) else opened
        return datasets.load_dataset(dataset, config, split=split, streaming=streaming)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError("--dataset", f"`datasets` cannot open {dataset!r}, split {split!r}: {reason}") from None


def hub_rows(recipe: Recipe) -> tuple[str, Callable[[], Iterator[str]]]:
    """A dataset saved on disk, or a name for `datasets`: (identity, maker of an iterator over its texts).

    The identity is `datasets`' fingerprint, or for a stream the name, configuration and split.

    Raises:
        InputError: `datasets` cannot open it, or it has no such split or column.
    """
    opened = open_hub(recipe.dataset, recipe.dataset_config, recipe.split, recipe.streaming)
    names = opened.column_names
    if names and recipe.text_column not in names:
        raise InputError("--text-column", _no_column(recipe.text_column, recipe.dataset, names))
    where = f"{recipe.dataset}\0{recipe.dataset_config}\0{recipe.split}"
    fingerprint = where if recipe.streaming else str(opened._fingerprint)

    def rows() -> Iterator[str]:
        for row in opened:
            yield _text(row, recipe.text_column, recipe.dataset)

    identity = hashlib.sha256(f"{fingerprint}\0{recipe.text_column}".encode()).hexdigest()
    return identity, rows


def _text(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict) or column not in row:
        names = list(row) if isinstance(row, dict) else []
        raise InputError("--text-column", _no_column(column, where, names))
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise InputError("--text-column", f"{column!r} of {where} holds {type(value).__name__}, not text")
    return value or ""


def _no_column(column: str, where: str, names: list[str]) -> str:
    return f"{where} has no column {column!r}; give one of {', '.join(map(repr, names)) or 'its columns'}"
