"""Sources of text for pretraining whose documents are rows, and whatever `datasets` opens."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from finetune.config.errors import InputError
from finetune.config.recipe import Recipe
from finetune.data.files import file_rows, row_kind
from finetune.data.report import DataReport
from finetune.data.texts import check_characters, kind_of


def text_rows(file: Path, column: str) -> Iterator[str]:
    """Yield the texts in one column of a file of rows.

    Raises:
        InputError: unreadable, or a row that has no text in the column.
    """
    word = "line" if row_kind(file) == ".jsonl" else "row"
    for number, value in file_rows(file, [column], DataReport()):
        yield _text(value, column, f"{word} {number} of {file}")


def is_saved_dataset(folder: Path) -> bool:
    """Check whether `datasets.save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def reach_hub(name: str, option: str, cached_file: str | None = None) -> None:
    """Take what a run has of the hub from the cache, where the hub does not answer at once.

    Its own client would try for half a minute, each time, and log every attempt.

    Args:
        name: a folder, which needs no hub, or a name of the hub.
        option: that gave it.
        cached_file: of a model's files the one that must be in the cache then; None for a dataset.

    Raises:
        InputError: neither does the hub answer nor is the file in the cache.
    """
    if Path(name).exists() or name.startswith((".", "/", "~")):
        return
    from huggingface_hub import constants, try_to_load_from_cache

    from muon8bit.estimate import is_hub_reachable  # with torch, which the options do not wait for

    if is_hub_reachable():
        return
    if cached_file and not isinstance(try_to_load_from_cache(name, cached_file), str):
        raise InputError(
            option, f"the hub cannot be reached, and {name}'s {cached_file} is not in the cache; give a local folder"
        )
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def open_hub(dataset: str, config: str | None, split: str, streaming: bool = False) -> Any:
    """Open a split of a dataset, saved on disk or known to `datasets` by its name.

    Raises:
        InputError: `datasets` cannot open it, or it has no such split.
    """
    import datasets

    reach_hub(dataset, "--dataset")
    try:
        if Path(dataset).is_dir():
            opened = datasets.load_from_disk(dataset)
            return opened[split] if isinstance(opened, datasets.DatasetDict) else opened
        return datasets.load_dataset(dataset, config, split=split, streaming=streaming)
    except Exception as error:
        what = f"{dataset!r}, split {split!r}"
        raise InputError("--dataset", f"`datasets` cannot open {what}: {_reason(error)}") from None


def opened_rows(opened: Any, dataset: str, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Yield (number, row) of a dataset from `open_hub`, or of a selection of its rows.

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
    """Open a saved dataset or a name for `datasets`: return its identity, and a maker of iterators over its texts.

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
        what = f"{kind_of(row)}, no object with columns"
        raise InputError("--dataset", f"{where} holds {what}; each row must be one like {{{column!r}: text}}")
    if column not in row:
        raise InputError("--text-column", _no_column(column, where, list(row)))
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise InputError("--text-column", f"{column!r} of {where} holds {kind_of(value)}, not text")
    check_characters(value or "", f"{column!r} of {where}")
    return value or ""


def _no_column(column: str, where: str, names: list[str]) -> str:
    return f"{where} has no column {column!r}; give one of {', '.join(map(repr, names)) or 'its columns'}"
