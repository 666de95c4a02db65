"""Pretrain a language model on text with 8-bit Muon.

    accelerate launch finetune/pretrain.py            # the default recipe, no download
    python -m finetune.pretrain --recipe llama_60m --dataset my_texts/ --max-steps 2000
    torchrun --nproc_per_node 2 finetune/pretrain.py
    python -m finetune.pretrain --resume latest

This file parses and checks the options, without torch; `finetune.training.trainer` does the work.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: absolute imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from finetune.command_line import Parser, absolute, check_resumable, run_script, say_on_main, told_when_stopped
from finetune.config.checks import check_model_folder, typed_names
from finetune.config.defaults import fit_schedule
from finetune.config.errors import InputError
from finetune.config.options import flag
from finetune.config.reading import RECIPES, read_values, saved_values
from finetune.config.recipe import DEFAULT_RECIPE, R, Recipe, read_model_config, read_recipe, recipe_from
from finetune.data.corpus import check_exists
from finetune.storage.run_dir import RunFolder, check_script, choose_folder, find_run

PATHS = ("dataset", "tokenizer", "init_from")


def build_parser(prog: str = "pretrain", text: str = __doc__ or "", kind: type[Recipe] = Recipe) -> Parser:
    """Return the parser of the script's options, or of another one that takes further ones.

    Args:
        prog: name of the script.
        text: its docstring, whose last paragraph is left out.
        kind: has its options.
    """
    more = {
        "--recipe": f"the options override it (default: {DEFAULT_RECIPE})",
        "--model-config": "a transformers config.json, or its folder (default: the recipe's model)",
    }
    recipes = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return Parser(prog, text.rpartition("\n\n")[0], kind, recipes, more)


def parse(argv: Sequence[str], tell: Callable[[list[str]], None] | None = None) -> tuple[Recipe, RunFolder]:
    """Read the options of this script, see `parse_as`."""
    return parse_as(build_parser(), Recipe, argv, tell)


def parse_as(
    parser: Parser, kind: type[R], argv: Sequence[str], tell: Callable[[list[str]], None] | None = None
) -> tuple[R, RunFolder]:
    """Read the options: return the recipe to run and the folder to run it in. Imports nothing heavy, writes nothing.

    A resumed run takes its recipe from its own folder; options may change only what keeps it the same run.

    Args:
        parser: of `build_parser`, for this kind.
        kind: of the recipe.
        argv: the command line.
        tell: takes lines that say what of the recipe was adapted to the options.

    Raises:
        InputError: any option that cannot be obeyed.
    """
    given = vars(parser.parse_args(argv))
    recipe_name, config = given.pop("recipe"), given.pop("model_config")
    output_dir, resume = given.pop("output_dir"), given.pop("resume")
    overrides: dict[str, Any] = {
        key: absolute(value, flag(key)) if key in PATHS else value for key, value in given.items()
    }
    if config is not None:
        if given.get("init_from"):
            raise InputError("--model-config", "--init-from brings its own model; leave one of them out")
        overrides["model"] = read_model_config(config)
    if resume is None:
        recipe = read_recipe(recipe_name or DEFAULT_RECIPE, kind)
        fitted, lines = fit_schedule(dataclasses.asdict(recipe), overrides)
        recipe = recipe_from({**dataclasses.asdict(recipe), **overrides, **fitted}, "the options", kind)
        if tell is not None:
            tell(lines)
        paths = {key: absolute(getattr(recipe, key), flag(key)) for key in PATHS}
        check_exists(paths["dataset"])
        if paths["init_from"]:
            check_model_folder(Path(paths["init_from"]).expanduser(), "--init-from")
        recipe = dataclasses.replace(recipe, **paths)
        return recipe, choose_folder(output_dir, recipe.name)
    if recipe_name or output_dir:
        option = "--recipe" if recipe_name else "--output-dir"
        raise InputError(option, "a resumed run keeps its own; leave it out, or start anew without --resume")
    folder = find_run(resume)
    values, origin = read_values(str(folder.recipe_file), RECIPES, kind)
    check_script(folder, values, "pretrain")
    saved = recipe_from(saved_values(values), origin, kind)
    if overrides.get("model", saved.model) != saved.model:
        raise InputError("--model-config", f"{folder.path} holds checkpoints of another model; leave it out")
    check_resumable(folder, saved, overrides)
    recipe = recipe_from({**dataclasses.asdict(saved), **overrides}, "the options", kind)
    return recipe, folder


def _work(argv: Sequence[str]) -> int:
    recipe, folder = parse(argv, say_on_main)
    with told_when_stopped(folder):
        from finetune.setup.prepare import set_up
        from finetune.storage.outputs import finish
        from finetune.training.trainer import run_job  # torch and transformers, after the options have passed

        run = set_up(recipe, folder)
    return run_job(run, finish, script=os.path.abspath(__file__))


def main(argv: Sequence[str] | None = None, only_check: bool = False) -> int:
    """Run the script, or with `only_check` parse and check its options. Returns the exit code, see EXIT_CODES."""
    words = sys.argv[1:] if argv is None else argv
    return run_script(lambda: 0 if only_check and parse(words) else _work(words), typed_names(words, Recipe))


if __name__ == "__main__":
    sys.exit(main())
