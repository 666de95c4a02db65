"""Rows of text files: .jsonl, .json and .csv, packed by gzip or zstd or not. No torch in here."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from finetune.config.errors import InputError
from finetune.data.report import DataReport, RowError
from finetune.data.texts import ENCODING, SAVE, holds_nul, kind_of, not_utf8, other_kind

PACKINGS = {".gz": "gzip", ".zst": "zstd"}
csv.field_size_limit(2**31 - 1)  # characters; Python's own limit of 131,072 is below long texts


def jsonl_objects(file: Path, report: DataReport) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of every line of a .jsonl file that is not blank, one in memory at a time.

    Raises:
        InputError: unreadable, or a line that is no JSON, or not UTF-8, where the report says so.
    """
    with _reading(file, "JSON lines"), _opened(file) as lines:
        yield from _line_values(file, lines, report)


def json_objects(file: Path, report: DataReport) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, value) of every row of a .json file: an array, one object, or an object a line.

    Raises:
        InputError: unreadable, no JSON, or not UTF-8.
    """
    with _reading(file, "JSON"), _opened(file) as opened:
        text = opened.read()
        try:
            value = _whole(file, text)
        except InputError:
            if not text.lstrip().startswith("{"):
                raise
            yield from _line_values(file, io.StringIO(text), report)
            return
        yield from enumerate(value if isinstance(value, list) else [value], 1)


def lone_object(file: Path) -> dict[str, Any] | None:
    """Return the object that is all of a .json file; None if it is an array, or cannot be read."""
    try:
        with _reading(file, "JSON"), _opened(file) as opened:
            value = _whole(file, opened.read())
    except InputError:  # told when its rows are read
        return None
    return value if isinstance(value, dict) else None


def csv_objects(file: Path, report: DataReport) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number from 1, {column: text}) of every row of a .csv file, whose first row has the names.

    The number is that of the line at which the row begins.

    Raises:
        InputError: unreadable, not UTF-8, without names of columns, or with quotes that do not end.
    """
    with _reading(file, "CSV"), _opened(file, newline="") as opened:
        rows = csv.reader(opened, strict=True)
        names = next(rows, [])
        _check_names(names, file)
        before = rows.line_num
        for cells in rows:
            number, before = before + 1, rows.line_num
            try:
                _check_cells(cells, names, f"row {number} of {file}")
            except RowError as error:
                report.add_bad_line(error)
                continue
            if cells:
                yield number, dict(zip(names, cells, strict=True))


def _line_values(file: Path, lines: TextIO, report: DataReport) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        text = line.removeprefix("\ufeff")  # inside the file, where files with a mark were joined
        try:
            if not text.isascii():
                text.encode()
            if text.strip():
                value = json.loads(text)
            else:
                continue
        except (ValueError, RecursionError) as error:
            report.add_bad_line(_bad_line(file, number, text, error))
            continue
        yield number, value


def _bad_line(file: Path, number: int, text: str, error: Exception) -> RowError:
    """Return the error of a line that cannot be read.

    Raises:
        InputError: the whole file is of another kind.
    """
    where = f"line {number} of {file}"
    if isinstance(error, UnicodeEncodeError):
        problem = f"{where} {not_utf8(file)}" if not _packing(file) else f"{where} is not UTF-8 text; {SAVE}"
        if not _packing(file) and other_kind(file):
            raise InputError("--dataset", problem)
        return RowError("--dataset", problem, "a line that is not UTF-8")
    if isinstance(error, json.JSONDecodeError):
        if number == 1 and text.strip() in ("[", "{", "[{"):
            problem = f"{file} is no JSON lines, but one value over several; call it .json, or write a value a line"
            raise InputError("--dataset", problem)
        way_out = "each line must hold one whole value; correct it, or leave it out"
        reason = holds_nul(text) or f"{error.msg}, character {error.pos + 1}; {way_out}"
        return RowError("--dataset", f"{where} is no JSON: {reason}", "a line that is no JSON")
    # A number of thousands of digits; lists a thousand deep.
    return RowError("--dataset", f"{where} cannot be read as JSON: {error}", "a line that is no JSON")


def _whole(file: Path, text: str) -> Any:
    """Return the value of a whole JSON file.

    Raises:
        InputError: it has none, or is neither an array nor an object.
    """
    _check_utf8(file, text)
    try:
        value = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, character {error.colno}"
        reason = holds_nul(text) or f"{error.msg}, {place}; give an array of rows, or one row a line"
        raise InputError("--dataset", f"{file} is no JSON: {reason}") from None
    except (ValueError, RecursionError) as error:
        raise InputError("--dataset", f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(value, (list, dict)):
        raise InputError("--dataset", f"{file} holds {kind_of(value)}; give an array of rows")
    return value


def _check_utf8(file: Path, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        number = text.count("\n", 0, error.start) + 1
        what = f"is not UTF-8 text; {SAVE}" if _packing(file) else not_utf8(file)
        raise InputError("--dataset", f"line {number} of {file} {what}") from None


def _check_names(names: list[str], file: Path) -> None:
    _check_utf8(file, "\n".join(names))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError("--dataset", f"{file} has the column {twice[0]!r} twice; rename one of them")
    if len(names) == 1 and any(mark in names[0] for mark in ";\t"):
        raise InputError("--dataset", f"{file} has one column, {names[0]!r}; save it with commas between the columns")


def _check_cells(cells: list[str], names: list[str], where: str) -> None:
    if cells and len(cells) != len(names):
        problem = f"{where} has {len(cells)} cells for {len(names)} columns; a cell with commas needs quotes"
        raise RowError("--dataset", problem, "more or fewer cells than columns")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise RowError("--dataset", f"{where} is not UTF-8 text; {SAVE}", "a line that is not UTF-8") from None


def _packing(file: Path) -> str:
    return PACKINGS.get(file.suffix.lower(), "")


def _open_zstd(file: Path) -> Any:
    import pyarrow as pa

    return pa.input_stream(str(file), compression="zstd")


OPENERS: dict[str, Callable[[Path], Any]] = {
    "": partial(open, mode="rb"),
    "gzip": gzip.open,
    "zstd": _open_zstd,
}


@contextmanager
def _opened(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file, unpacked. Bytes that are no UTF-8 become lone surrogates, so that their line can be named."""
    binary = OPENERS[_packing(file)](file)
    with io.TextIOWrapper(binary, encoding=ENCODING, errors="surrogateescape", newline=newline) as text:
        yield text


@contextmanager
def _reading(file: Path, kind: str) -> Iterator[None]:
    """Name the file in the errors of reading it."""
    what = " ".join(part for part in (_packing(file), kind) if part)
    try:
        yield
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise InputError("--dataset", f"cannot read {file} as {what}: {reason}") from None
