"""Train a small model to answer questions about people, of whom a few are asked for often and most rarely.

    python -m finetune.evidence.rare --recipe benchmarks/sweeps/rare.yaml --optimizer adamw --lr 3e-3
    python -m finetune.sweep benchmarks/sweeps/rare.toml

Each validation counts, class by class, the answers whose first token is the likeliest one.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from finetune import pretrain
from finetune.command_line import Parser, run_script, say_on_main, told_when_stopped
from finetune.config.checks import typed_names
from finetune.config.errors import InputError
from finetune.config.options import flag
from finetune.config.recipe import Recipe
from finetune.evidence.options import RareRecipe, check_options
from finetune.storage.run_dir import RunFolder


def build_parser() -> Parser:
    """Return the parser of the script's options."""
    return pretrain.build_parser("evidence.rare", __doc__ or "", RareRecipe)


def parse(argv: Sequence[str], tell: Callable[[list[str]], None] | None = None) -> tuple[RareRecipe, RunFolder]:
    """Read the options as `finetune.pretrain.parse_as` does.

    Raises:
        InputError: any option that cannot be obeyed.
    """
    recipe, folder = pretrain.parse_as(build_parser(), RareRecipe, argv, tell)
    check_no_text(recipe)
    return recipe, folder


def check_no_text(recipe: RareRecipe) -> None:
    """Check that nothing is asked of a text, which a run on biographies has not.

    Raises:
        InputError: names the option.
    """
    check_options(recipe)
    for f in dataclasses.fields(Recipe):
        is_of_text = f.metadata.get("section") == "data" or f.name in ("init_from", "tokenizer", "seq_len")
        value: Any = getattr(recipe, f.name)
        if is_of_text and value != f.default:
            raise InputError(flag(f.name), "the biographies are made by the script; leave it out")
    for name, least, most in (("groups", 2, 15), ("measured_classes", 1, 2**15)):
        if not least <= getattr(recipe, name) <= most:
            raise InputError(flag(name), f"{getattr(recipe, name)} is not from {least} to {most}")


def _work(argv: Sequence[str]) -> int:
    recipe, folder = parse(argv, say_on_main)
    with told_when_stopped(folder):
        from finetune.evidence.rare_run import finish, set_up
        from finetune.training.trainer import run_job  # torch and transformers, after the options have passed

        run = set_up(recipe, folder)
    return run_job(run, finish, script=os.path.abspath(__file__))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script. Returns the exit code, see EXIT_CODES."""
    words = sys.argv[1:] if argv is None else argv
    return run_script(lambda: _work(words), typed_names(words, RareRecipe))


if __name__ == "__main__":
    sys.exit(main())
