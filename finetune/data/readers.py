"""Sources whose documents are rows: .jsonl, .parquet, and whatever `datasets` opens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from finetune.config.errors import InputError
from finetune.config.recipe import Recipe
from finetune.data.report import DataReport
from finetune.data.texts import ENCODING, check_characters, holds_nul, not_utf8

PARQUET_ROWS = 256  # rows decoded at a time


def jsonl_objects(file: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line of a .jsonl file that is not blank, one in memory at a time.

    Raises:
        InputError: unreadable, or a line that is no JSON, or not UTF-8.
    """
    number = 0
    try:
        # Bytes that are no UTF-8 become lone surrogates, so that their line can be named.
        with file.open(encoding=ENCODING, errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                text = line.removeprefix("\ufeff")  # inside the file, where files with a mark were joined
                if not text.isascii():
                    text.encode()
                if text.strip():
                    yield number, json.loads(text)
    except json.JSONDecodeError as error:
        way_out = "each line must hold one whole value; correct it, or leave it out"
        reason = holds_nul(text) or f"{error.msg}, character {error.pos + 1}; {way_out}"
        raise InputError("--dataset", f"line {number} of {file} is no JSON: {reason}") from None
    except UnicodeEncodeError:
        raise InputError("--dataset", f"line {number} of {file} {not_utf8(file)}") from None
    except OSError as error:
        raise InputError("--dataset", f"cannot read {file} as JSON lines: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists a thousand deep
        raise InputError("--dataset", f"line {number} of {file} cannot be read as JSON: {error}") from None


def jsonl_rows(file: Path, column: str) -> Iterator[str]:
    """Texts of a .jsonl file, one line in memory at a time.

    Raises:
        InputError: a line that is no JSON object, or has no text in the column.
    """
    for number, value in jsonl_objects(file):
        yield _text(value, column, f"line {number} of {file}")


def parquet_objects(
    file: Path, columns: Collection[str], report: DataReport | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, {column: value}) of a .parquet file, `PARQUET_ROWS` rows in memory at a time.

    Args:
        file: what to read.
        columns: those wanted; the file may lack some. If it lacks all of them, every column is read.
        report: the columns that are not read are written there.

    Raises:
        InputError: not a parquet file, damaged, or a value in it that cannot be read, such as a text that is not UTF-8.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as opened:
            wanted = [name for name in opened.schema_arrow.names if name in columns]
            if report is not None and wanted:
                others = set(opened.schema_arrow.names) - set(wanted)
                report.unused.update(dict.fromkeys(others, opened.metadata.num_rows))
            for batch in opened.iter_batches(PARQUET_ROWS, columns=wanted or None):
                for row in _python_rows(batch):
                    number += 1
                    yield number, row
    except UnicodeDecodeError:
        raise InputError(
            "--dataset", f"row {number + 1} of {file} holds text that is not UTF-8; leave it out"
        ) from None
    except OverflowError as error:  # a day that Python does not know
        what = f"row {number + 1} of {file} holds a value that cannot be read: {_reason(error)}"
        raise InputError("--dataset", f"{what}; leave it out") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        after = f" after its row {number}" if number else ""
        raise InputError("--dataset", f"cannot read {file} as parquet{after}: {_reason(error)}") from None


def _python_rows(batch: Any) -> Iterable[dict[str, Any]]:
    """Rows of a record batch; if one cannot be decoded, those before it come first, so that it can be named."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (UnicodeDecodeError, OverflowError):
        return (batch.slice(i, 1).to_pylist()[0] for i in range(batch.num_rows))
    return rows


def parquet_rows(file: Path, column: str) -> Iterator[str]:
    """Texts of a .parquet file, `PARQUET_ROWS` rows in memory at a time.

    Raises:
        InputError: as `parquet_objects`, or no such column of text.
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
        what = f"{dataset!r}, split {split!r}"
        raise InputError("--dataset", f"`datasets` cannot open {what}: {_reason(error)}") from None


def opened_rows(opened: Any, dataset: str, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """(number, row) of what `open_hub` gave, or of a selection from it.

    Args:
        opened: what to iterate over.
        dataset: its name, to be shown to people.
        numbers: of the rows, from 1; at least as many as there are rows.

    Raises:
        InputError: `datasets` cannot read a row.
    """
    rows = iter(opened)
    for number in numbers:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            what = f"row {number} of {dataset}"
            raise InputError("--dataset", f"`datasets` cannot read {what}: {_reason(error)}") from None
        yield number, row


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
        for number, row in opened_rows(opened, recipe.dataset, count(1)):
            yield _text(row, recipe.text_column, f"row {number} of {recipe.dataset}")

    identity = hashlib.sha256(f"{fingerprint}\0{recipe.text_column}".encode()).hexdigest()
    return identity, rows


def _text(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        what = f"{type(row).__name__}, no object with columns"
        raise InputError("--dataset", f"{where} holds {what}; each row must be one like {{{column!r}: text}}")
    if column not in row:
        raise InputError("--text-column", _no_column(column, where, list(row)))
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise InputError("--text-column", f"{column!r} of {where} holds {type(value).__name__}, not text")
    check_characters(value or "", f"{column!r} of {where}")
    return value or ""


def _no_column(column: str, where: str, names: list[str]) -> str:
    return f"{where} has no column {column!r}; give one of {', '.join(map(repr, names)) or 'its columns'}"
