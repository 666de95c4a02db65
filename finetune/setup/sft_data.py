"""From a checked recipe to tokenized conversations; and looking at them without a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config.defaults import fit_seq_len
from finetune.config.errors import InputError
from finetune.config.reading import SFT_RECIPES
from finetune.config.sft_recipe import SEQ_LEN, SftRecipe
from finetune.data.chat import Parts, load_examples, load_parts
from finetune.data.messages import Example
from finetune.data.packing import Rows
from finetune.data.preview import show_example
from finetune.data.report import WAYS_OUT, DataReport, RowError
from finetune.data.templates import BUILT_IN
from finetune.data.texts import read_text
from finetune.data.tokenize_chat import ChatEncoding, EncodedExamples, encode_examples
from finetune.models.build import check_vocabulary
from finetune.models.pretrained import base_config, find_base
from finetune.models.tokens import load_tokenizer
from finetune.models.weights import longest_of


@dataclass(frozen=True)
class SftData:
    """Conversations of a run, tokenized; `notes` are lines for the log, `num_bad_rows` were left out."""

    parts: Parts
    encoding: ChatEncoding
    train: EncodedExamples
    validation: EncodedExamples
    notes: list[str]
    num_bad_rows: int


def fit_to_model(recipe: SftRecipe, config: Any) -> tuple[SftRecipe, list[str]]:
    """Choose or check the sequence length of a recipe by what the model takes; returns it and lines for the log.

    Raises:
        InputError: the model takes less than was asked for.
    """
    longest = longest_of(config)
    seq_len, notes = fit_seq_len(recipe.seq_len, SEQ_LEN, longest)
    if longest is not None and seq_len > longest:
        raise InputError(
            "--seq-len", f"{seq_len} exceeds the model's max_position_embeddings {longest}; give at most {longest}"
        )
    return replace(recipe, seq_len=seq_len), notes


def prepare_data(recipe: SftRecipe, tokenizer: Any) -> SftData:
    """Read, split and tokenize the conversations of a run.

    Args:
        recipe: of `fit_to_model`.
        tokenizer: gets the recipe's chat template.

    Raises:
        InputError: as `load_parts` and `encode_examples`, or a part that is left without a conversation.
    """
    encoding = _encoding(recipe, tokenizer)
    report = DataReport("skip" if recipe.skip_bad_rows else "stop")
    try:
        parts = _parts(recipe, report)
        train, validation = (_encoded(recipe, part, encoding, report) for part in (parts.train, parts.validation))
    except RowError as error:
        raise RowError(error.args[0], f"{error.args[1]}; {WAYS_OUT}", error.reason) from None
    for part, encoded in (("training", train), ("validation", validation)):
        if not encoded.rows and report.errors:
            first = f"the first of {len(report.errors):,}: {report.errors[0].args[1]}"
            raise InputError("--skip-bad-rows", f"without the bad rows no {part} example is left; {first}")
        if not encoded.rows:
            raise InputError("--seq-len", f"{recipe.seq_len} leaves no {part} example; give more")
    return SftData(parts, encoding, train, validation, report.notes(), len(report.errors))


def check_data(recipe: SftRecipe) -> tuple[list[str], int]:
    """Find every row that a run of this recipe could not use. Writes nothing.

    Returns:
        Lines to print, bad rows by reason, and the exit code: 0, or 2 where there are bad rows.

    Raises:
        InputError: what a run would refuse, but bad rows and unreadable files.
    """
    recipe, encoding = _ready(recipe)
    report = DataReport("list")
    examples = _examples(recipe, report)
    encoded = _encoded(recipe, examples, encoding, report)
    num_rows = report.num_rows or len(examples)  # those of the standard library are not read row by row
    head = f"{recipe.dataset}: {num_rows:,} rows, {len(report.errors):,} faults; usable: {encoded}"
    return [head, *report.notes(), *report.listing()], 2 if report.errors else 0


def preview(recipe: SftRecipe, num: int) -> list[str]:
    """Show the first good conversations as the model would read them, what is learned marked. Writes nothing.

    Bad rows are counted by reason, as far as they are read: after the last that is shown, the template's are not.

    Args:
        recipe: checked options.
        num: how many, above 0.

    Returns:
        Texts to print.

    Raises:
        InputError: as a run, but for bad rows; where all are bad, the first of them.
    """
    if num < 1:
        raise InputError("--preview", f"{num} must be above 0")
    recipe, encoding = _ready(recipe)
    report = DataReport("skip" if recipe.skip_bad_rows else "count")
    examples = _examples(recipe, report)
    shown: list[str] = []
    for example in examples:
        if len(shown) == num:
            break
        try:
            shown.append(show_example(example, encoding, recipe.seq_len))
        except RowError as error:
            report.add_bad_row(error)
    return [*shown, f"{len(shown):,} of {len(examples):,} conversations", *report.notes()]


def _ready(recipe: SftRecipe) -> tuple[SftRecipe, ChatEncoding]:
    """Return the recipe that fits its model, and the encoding; no weights are loaded."""
    base = find_base(recipe.model)
    config, tokenizer = base_config(base), load_tokenizer(base, "--model")
    if not recipe.resize_embeddings:
        check_vocabulary(config, tokenizer, "--model")
    recipe, _ = fit_to_model(recipe, config)
    return recipe, _encoding(recipe, tokenizer)


def _encoding(recipe: SftRecipe, tokenizer: Any) -> ChatEncoding:
    if recipe.chat_template:
        tokenizer.chat_template = read_template(recipe.chat_template, tokenizer.chat_template)
        _check_chatml(tokenizer)
    turns: Any = recipe.turns
    return ChatEncoding(tokenizer, date=recipe.date, turns=turns)


def _parts(recipe: SftRecipe, report: DataReport) -> Parts:
    return load_parts(recipe.dataset, validation_fraction=recipe.validation_fraction, **_source(recipe), report=report)


def _examples(recipe: SftRecipe, report: DataReport) -> Sequence[Example]:
    """Load all conversations in the order of the rows."""
    if recipe.dataset == "stdlib":
        parts = _parts(recipe, report)
        return [*parts.train, *parts.validation]
    return load_examples(recipe.dataset, **_source(recipe), report=report)


def _source(recipe: SftRecipe) -> dict[str, Any]:
    return {
        "config": recipe.dataset_config,
        "split": recipe.split,
        "limit": recipe.limit,
        "seed": recipe.seed,
        "columns": recipe.columns,
    }


def _encoded(
    recipe: SftRecipe, examples: Sequence[Example], encoding: ChatEncoding, report: DataReport
) -> EncodedExamples:
    return encode_examples(
        examples, encoding, max_length=recipe.seq_len, drop_truncated=recipe.drop_truncated, report=report
    )


def read_template(given: str, own: str | dict[str, str] | None) -> str:
    """Read a chat template: a file, or one with this name of the tokenizer, built in, or of a recipe.

    Args:
        given: path or name.
        own: the tokenizer's template, or several by their names.

    Raises:
        InputError: none of these, or a file that is not text.
    """
    of_recipes = {file.stem: file for file in SFT_RECIPES.glob("*.jinja")}
    if Path(given).is_file():
        return read_text(Path(given), "--chat-template")
    if isinstance(own, dict) and given in own:
        return own[given]
    if given in BUILT_IN:
        return BUILT_IN[given]
    if given in of_recipes:
        return read_text(of_recipes[given], "--chat-template")
    if isinstance(own, dict):
        names = f"the tokenizer's templates are {', '.join(sorted(own))}; give one of them, of"
    else:
        names = "the tokenizer has a single template or none, without a name; give one of"
    others = ", ".join(sorted({*BUILT_IN, *of_recipes}))
    raise InputError("--chat-template", f"there is no file {given}, and {names} {others}, or a file")


def _check_chatml(tokenizer: Any) -> None:
    """Check that a tokenizer with the built-in template has what that ends turns with."""
    if tokenizer.chat_template == BUILT_IN["chatml"] and "<|im_end|>" not in tokenizer.get_vocab():
        raise InputError(
            "--chat-template",
            "chatml ends turns with <|im_end|>, and the tokenizer has no such token; add it there, and give "
            "--resize-embeddings, or give --chat-template tulu, which ends them with the tokenizer's end of text",
        )


def rows_of(recipe: SftRecipe, encoded: EncodedExamples, tokenizer: Any) -> Rows:
    """Put encoded conversations into the rows of batches."""
    pad = tokenizer.pad_token_id
    return Rows(
        encoded.rows,
        max_length=recipe.seq_len,
        packing=recipe.packing,
        seed=recipe.seed,
        pad_id=0 if pad is None else pad,
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the hex SHA-256 of a tokenizer and its chat template."""
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()
