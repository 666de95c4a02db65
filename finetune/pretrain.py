"""Pretrain a language model on text with 8-bit Muon.

    accelerate launch finetune/pretrain.py            # the default recipe, no download
    python -m finetune.pretrain --recipe llama_60m --dataset my_texts/ --max-steps 2000
    torchrun --nproc_per_node 2 finetune/pretrain.py
    python -m finetune.pretrain --resume latest

This file parses and checks the options, without torch; `finetune.job` does the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

if not __package__:  # run as a script: absolute imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from finetune.corpus import check_exists
from finetune.errors import InputError
from finetune.recipe import (
    DEFAULT_RECIPE,
    RECIPES,
    RESUME_MAY_CHANGE,
    Recipe,
    flag,
    option_fields,
    option_type,
    read_model_config,
    read_recipe,
    recipe_from,
)
from finetune.run_folder import RunFolder, choose_folder, find_run

PATHS = ("dataset", "tokenizer", "init_from")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError("pretrain", f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pretrain", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("--recipe", help=f"one of {recipes}, or a YAML file; default: {DEFAULT_RECIPE}")
    parser.add_argument("--model-config", help="a transformers config.json that replaces the recipe's model")
    parser.add_argument("--output-dir", help="a new or empty folder; default: runs/<recipe>-<time>/")
    parser.add_argument("--resume", metavar="FOLDER", help="a run's folder to continue, or 'latest'")
    for f in option_fields():
        kind: dict[str, Any] = {"type": option_type(f), "choices": f.metadata["choices"]}
        if option_type(f) is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag(f.name), help=f.metadata["help"], default=argparse.SUPPRESS, **kind)
    return parser


def parse(argv: Sequence[str]) -> tuple[Recipe, RunFolder]:
    """Options -> the recipe to run and the folder to run it in. Imports nothing heavy, writes nothing.

    A resumed run takes its recipe from its own folder; options may change only what keeps it the same run.

    Raises:
        InputError: any option that cannot be obeyed.
    """
    given = vars(_parser().parse_args(argv))
    recipe_name, config = given.pop("recipe"), given.pop("model_config")
    output_dir, resume = given.pop("output_dir"), given.pop("resume")
    overrides: dict[str, Any] = {key: _absolute(key, value) for key, value in given.items()}
    if config is not None:
        if given.get("init_from"):
            raise InputError("--model-config", "--init-from brings its own model; leave one of them out")
        overrides["model"] = read_model_config(config)
    if resume is None:
        recipe = read_recipe(recipe_name or DEFAULT_RECIPE)
        recipe = recipe_from({**dataclasses.asdict(recipe), **overrides}, "the options")
        paths = {key: _absolute(key, getattr(recipe, key)) for key in PATHS}
        check_exists(paths["dataset"])
        recipe = dataclasses.replace(recipe, **paths)
        return recipe, choose_folder(output_dir, recipe.name)
    if recipe_name or output_dir:
        option = "--recipe" if recipe_name else "--output-dir"
        raise InputError(option, "a resumed run keeps its own; leave it out, or start anew without --resume")
    folder = find_run(resume)
    saved = dataclasses.asdict(read_recipe(str(folder.recipe_file)))
    for key, value in overrides.items():
        if key == "model" and value != saved["model"]:
            raise InputError("--model-config", f"{folder.path} holds checkpoints of another model; leave it out")
        if key not in RESUME_MAY_CHANGE and value != saved[key]:
            raise InputError(flag(key), f"{folder.path} was run with {saved[key]!r}; leave it out, or start anew")
    recipe = recipe_from({**saved, **overrides}, "the options")
    if folder.step >= recipe.max_steps and (folder.path / "model").is_dir():
        raise InputError("--resume", f"{folder.path} is already at step {folder.step}; raise --max-steps")
    return recipe, folder


def _absolute(key: str, value: Any) -> Any:
    """Local paths are recorded absolute, so that a run can be resumed from any working directory."""
    if key in PATHS and isinstance(value, str):
        path = Path(value).expanduser()
        return str(path.resolve()) if path.exists() and value != "stdlib" else value
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script. Returns the exit code: 0, 1 (training failed), 2 (bad input), 128 + signal (stopped)."""
    try:
        recipe, folder = parse(sys.argv[1:] if argv is None else argv)
        # Accelerate imports bitsandbytes, which warns on some CPUs that a 4-bit product (unused here) will be slow, and
        # warns at every checkpoint that a tied weight is saved once (loading ties it again; resuming is bitwise).
        for name in ("bitsandbytes.backends.cpu.ops", "accelerate.utils.other"):
            logging.getLogger(name).setLevel(logging.ERROR)
        from finetune.job import pretrain  # torch and transformers, after the options have passed

        return pretrain(recipe, folder, script=os.path.abspath(__file__))
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before or after the training loop, which saves and says how to resume
        return 130


if __name__ == "__main__":
    sys.exit(main())
