"""Rows of .parquet files. No torch in here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune.config.errors import InputError
from finetune.data.report import DataReport, RowError

PARQUET_ROWS = 256  # rows decoded at a time


def parquet_objects(file: Path, columns: Collection[str], report: DataReport) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, {column: value}) of a .parquet file, `PARQUET_ROWS` rows in memory at a time.

    Args:
        file: what to read.
        columns: those wanted; the file may lack some. If it lacks all of them, every column is read.
        report: gets the columns that are not read, and the rows with a value that cannot be read.

    Raises:
        InputError: not a parquet file, damaged, or a value in it that cannot be read, such as a text that is not UTF-8,
            where the report says so.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            wanted = [name for name in names if name in columns]
            if wanted:
                report.unused.update({name: opened.metadata.num_rows for name in names if name not in columns})
            for batch in opened.iter_batches(PARQUET_ROWS, columns=wanted or None):
                for row in _python_rows(batch):
                    number += 1
                    if isinstance(row, ValueError | OverflowError):
                        report.add_bad_line(_bad_row(row, f"row {number} of {file}"))
                    else:
                        yield number, row
    except InputError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        after = f" after its row {number}" if number else ""
        raise InputError("--dataset", f"cannot read {file} as parquet{after}: {_reason(error)}") from None


def _python_rows(batch: Any) -> Iterable[Any]:
    """Return the rows of a record batch; a row that cannot be decoded is replaced by its error."""
    try:
        rows: list[Any] = batch.to_pylist()
    except (UnicodeDecodeError, OverflowError):
        return (_python_row(batch.slice(i, 1)) for i in range(batch.num_rows))
    return rows


def _python_row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except (UnicodeDecodeError, OverflowError) as error:
        return error


def _bad_row(error: ValueError | OverflowError, where: str) -> RowError:
    if isinstance(error, UnicodeDecodeError):
        return RowError("--dataset", f"{where} holds text that is not UTF-8; leave it out", "text that is not UTF-8")
    # A day that Python does not know.
    problem = f"{where} holds a value that cannot be read: {_reason(error)}; leave it out"
    return RowError("--dataset", problem, "a value that cannot be read")


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
