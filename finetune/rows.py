"""Sources whose documents are rows: .jsonl, .parquet, and whatever `datasets` opens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.recipe import Recipe

PARQUET_ROWS = 256  # rows decoded at a time


def jsonl_rows(file: Path, column: str) -> Iterator[str]:
    """Texts of a .jsonl file, one line in memory at a time.

    Raises:
        InputError: a line that is no JSON object, or has no text in the column.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text(json.loads(line), column, f"line {number} of {file}")
    except (OSError, ValueError) as error:
        raise InputError("--dataset", f"cannot read {file} as JSON lines: {error}") from None


def parquet_rows(file: Path, column: str) -> Iterator[str]:
    """Texts of a .parquet file, `PARQUET_ROWS` rows in memory at a time.

    Raises:
        InputError: not a parquet file, or no such column of text.
    """
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if column not in names:
                raise InputError("--text-column", _no_column(column, str(file), names))
            for batch in opened.iter_batches(PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield _text({column: value}, column, str(file))
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InputError("--dataset", f"cannot read {file} as parquet: {str(error).splitlines()[0]}") from None


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def hub_rows(recipe: Recipe) -> tuple[str, Callable[[], Iterator[str]]]:
    """A dataset saved on disk, or a name for `datasets`: (identity, maker of an iterator over its texts).

    The identity is `datasets`' fingerprint, or for a stream the name, configuration and split.

    Raises:
        InputError: `datasets` cannot open it, or it has no such split or column.
    """
    import datasets

    try:
        if Path(recipe.dataset).is_dir():
            opened = datasets.load_from_disk(recipe.dataset)
            if isinstance(opened, datasets.DatasetDict):
                opened = opened[recipe.split]
        else:
            opened = datasets.load_dataset(
                recipe.dataset, recipe.dataset_config, split=recipe.split, streaming=recipe.streaming
            )
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            "--dataset", f"`datasets` cannot open {recipe.dataset!r}, split {recipe.split!r}: {reason}"
        ) from None
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
