"""Chat data for fine-tuning: where it comes from, and which conversations are held out.

    parts = load_parts("data.jsonl", validation_fraction=0.05)      # or "stdlib", a .parquet, a `datasets` name
    encoding = ChatEncoding(tokenizer, date="2024-07-26")           # .tokenize_chat; checks the chat template
    train = encode_examples(parts.train, encoding, max_length=2048) # .readers; one line by `str`
    rows = Rows(train.rows, max_length=2048, packing=True, seed=0)  # .packing; as `train_step.Blocks`:
    batch = rows.batch([rows.shuffled(0)], device)                  # input_ids, targets[, position_ids]
    check_isolation(model, num_rows=batch_size)                     # before the first packed step

Option names that the errors of these modules use: --dataset, --split, --validation-fraction, --seq-len,
--drop-truncated, --chat-template, --date, --model, --packing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.config.errors import InputError
from finetune.data.columns import Columns, check_seen, column_names, parse_columns
from finetune.data.files import NAMES, file_rows, find_row_files, row_kind
from finetune.data.messages import Example
from finetune.data.readers import is_saved_dataset, open_hub, opened_rows
from finetune.data.report import DataReport, RowError
from finetune.data.row_formats import FORMS, ReadRow, fits_a_format, read_row
from finetune.data.stdlib_pairs import standard_library
from finetune.data.text_files import lone_object


@dataclass(frozen=True)
class Parts:
    """Examples to train on and held out, no prompt on both sides.

    Args:
        train: at least one example.
        validation: at least one, unless the fraction was 0.
        label: what was asked for, for the log.
        hash: hex SHA-256 of all examples and their split.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    label: str
    hash: str


def load_parts(
    dataset: str,
    *,
    validation_fraction: float,
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    columns: str | None = None,
    report: DataReport | None = None,
) -> Parts:
    """Load the conversations of a dataset in two parts, training and held out.

    Held out is a share of the different prompts (the text before the first answer), in the order of their hashes. For
    `stdlib` it is a share of the modules.

    Args:
        dataset: as for `load_examples`, or `stdlib`: `finetune.data.stdlib_pairs`.
        validation_fraction: share to hold out, 0 <= fraction < 1; rounded up.
        config: as for `load_examples`; so are the others, which `stdlib` ignores.

    Raises:
        InputError: as `load_examples`, or fewer than two different prompts where one is to be held out.
    """
    if dataset == "stdlib":
        train, validation, label = standard_library(validation_fraction)
    else:
        examples = load_examples(
            dataset, config=config, split=split, limit=limit, seed=seed, columns=columns, report=report
        )
        held_out = _held_out({_prompt_hash(example) for example in examples}, validation_fraction, dataset)
        train = [example for example in examples if _prompt_hash(example) not in held_out]
        validation = [example for example in examples if _prompt_hash(example) in held_out]
        label = dataset
    digest = hashlib.sha256()
    for example in (*train, None, *validation):
        digest.update(json.dumps(example and example.content, default=str).encode())
    return Parts(train, validation, label, digest.hexdigest())


def load_examples(
    dataset: str,
    *,
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    columns: str | None = None,
    report: DataReport | None = None,
) -> list[Example]:
    """Read conversations; `finetune.data.row_formats.FORMATS` tells the columns.

    Args:
        dataset: a file of rows (`finetune.data.files`), a folder of them, a dataset saved on disk, or a name for
            `datasets`.
        config: configuration of a `datasets` name.
        split: split of a `datasets` name or of a saved dataset.
        limit: take so many rows, drawn without replacement; None takes all.
        seed: of that draw.
        columns: other names of columns, as of `--columns`.
        report: what is found is written there, and bad rows are treated as it says; by default the first one raises.

    Returns:
        Examples in the order of the rows.

    Raises:
        InputError: nothing there, unreadable, empty, or a bad row; the sentence names file and row, counted from 1 (in
            .jsonl and .csv, lines).
    """
    report = DataReport() if report is None else report
    named = parse_columns(columns)
    path = Path(dataset)
    if path.is_file() or (path.is_dir() and not is_saved_dataset(path)):
        drawn = _local_rows(path, named, report)
        if limit is not None:
            rows = list(drawn)
            drawn = iter([rows[i] for i in _drawn(len(rows), limit, seed)])
    else:
        drawn = _opened_rows(dataset, config, split, limit, seed, named, report)
    examples = []
    for row, where in drawn:
        report.num_rows += 1
        try:
            found = read_row(row, where, named)
        except RowError as error:
            report.add_bad_row(error)
            continue
        _note(found, report, bool(named))
        examples.append(found.example)
    if not report.num_rows and not report.errors:
        raise InputError("--dataset", f"{dataset} is empty; give a file with rows in it")
    if examples:
        check_seen(named, report.seen, dataset)
    elif report.on_bad_row in ("skip", "count"):
        option = "--skip-bad-rows" if report.on_bad_row == "skip" else "--dataset"
        first = f"every row of {dataset} is bad; the first: {report.errors[0].args[1]}"
        raise InputError(option, f"{first}; --check-data lists them all")
    return examples


def _note(found: ReadRow, report: DataReport, has_columns: bool) -> None:
    """Write down what is to be said of a row."""
    report.unused.update(found.unused)
    if has_columns:
        report.seen |= found.names
    roles = [m["role"] for m in found.example.messages if m["role"] not in ("system", "developer")]
    report.num_assistant_first += roles[0] == "assistant"
    report.num_unanswered += roles[-1] != "assistant"


def _opened_rows(
    dataset: str, config: str | None, split: str, limit: int | None, seed: int, columns: Columns, report: DataReport
) -> Iterator[tuple[Any, str]]:
    """Yield (row, origin) of a dataset that `datasets` opens."""
    path = Path(dataset)
    if not path.exists() and (path.is_absolute() or row_kind(path)):
        raise InputError("--dataset", f"there is no {dataset}; give a file, a folder or a name for `datasets`")
    opened = open_hub(dataset, config, split)
    if len(opened) == 0:
        raise InputError("--dataset", f"{dataset}, split {split!r}, is empty; give one with rows in it")
    wanted = column_names(columns)
    kept = [name for name in opened.column_names if name in wanted]
    if not kept:
        names = ", ".join(f"`{name}`" for name in opened.column_names)
        raise InputError("--dataset", f"{dataset} has {names}; it needs {FORMS}")
    drawn = _drawn(len(opened), limit, seed)
    report.unused.update({name: len(drawn) for name in opened.column_names if name not in wanted})
    chosen = opened.select_columns(kept).select(drawn)
    for number, row in opened_rows(chosen, dataset, (i + 1 for i in drawn)):
        yield row, f"row {number} of {dataset}"


def _local_rows(path: Path, columns: Columns, report: DataReport) -> Iterator[tuple[Any, str]]:
    """Yield (row, origin) of a file, or of all files of rows in a folder."""
    files, others = find_row_files(path) if path.is_dir() else ([path], [])
    if path.is_dir():
        described = [file for file in files if _describes_rows(file, columns)]
        files = [file for file in files if file not in described]
        others += [f"{file.relative_to(path)} (one object, no row)" for file in described]
    if not files or row_kind(files[0]) is None:
        raise InputError("--dataset", f"{path} is no file of rows ({NAMES}), and no folder with one; give such a file")
    report.unread += others
    wanted = column_names(columns)
    for file in files:
        has_rows = False
        try:
            for number, row in file_rows(file, wanted, report):
                has_rows = True
                yield row, f"row {number} of {file}"
        except InputError as error:
            report.add_bad_file(error)
            continue
        if path.is_dir() and not has_rows:
            report.unread.append(f"{file.relative_to(path)} (empty)")


def _describes_rows(file: Path, columns: Columns) -> bool:
    """Check for a lone JSON object without the columns of a row, such as a description of a dataset."""
    value = lone_object(file) if row_kind(file) == ".json" else None
    return value is not None and not fits_a_format(value, columns)


def _drawn(num_rows: int, limit: int | None, seed: int) -> list[int]:
    """Return the indices of the rows to take, ascending."""
    if limit is None or limit >= num_rows:
        return list(range(num_rows))
    return sorted(np.random.default_rng(seed).permutation(num_rows)[:limit].tolist())


def _prompt_hash(example: Example) -> bytes:
    before = example.messages[: example.answers[0]]
    return hashlib.sha256(json.dumps(before).encode()).digest()


def _held_out(prompts: set[bytes], fraction: float, dataset: str) -> set[bytes]:
    if fraction and len(prompts) < 2:
        raise InputError(
            "--validation-fraction", f"{dataset} has a single prompt, none to hold out; give more rows, or 0"
        )
    return set(sorted(prompts)[: min(math.ceil(fraction * len(prompts)), len(prompts) - 1)])
