"""Fine-tune a pretrained language model on chat data with 8-bit Muon: all weights, LoRA or QLoRA.

    python -m finetune.sft --recipe smollm2_135m      # what `make finetune` runs, no hub needed
    accelerate launch finetune/sft.py --model my_llama/ --dataset chats.jsonl --mode qlora
    torchrun --nproc_per_node 2 finetune/sft.py --model my_llama/ --dataset chats.jsonl --mode full
    python -m finetune.sft --resume latest

This file parses and checks the options, without torch; `training.trainer` does the work, as in pretraining.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: absolute imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from finetune.command_line import Parser, absolute, check_resumable, run_script, say_on_main, told_when_stopped
from finetune.config.checks import check_model_folder, package_file, typed_names
from finetune.config.defaults import fit_schedule
from finetune.config.errors import InputError
from finetune.config.options import flag
from finetune.config.reading import SFT_RECIPES, saved_values
from finetune.config.sft_recipe import (
    ADAPTER_OPTIONS,
    ADAPTER_SHAPE,
    NO_ADAPTER,
    SftRecipe,
    read_sft_recipe,
    sft_recipe_from,
)
from finetune.data.files import row_kind
from finetune.storage.run_dir import RunFolder, check_script, choose_folder, find_run

PATHS = ("model", "adapter", "dataset", "chat_template")


def build_parser() -> Parser:
    """Return the parser of the script's options."""
    recipes = sorted(path.stem for path in SFT_RECIPES.glob("*.yaml"))
    more = {"--recipe": "the options override it (default: none)"}
    parser = Parser("sft", (__doc__ or "").rpartition("\n\n")[0], SftRecipe, recipes, more)
    look = parser.add_argument_group("look at the data", "Instead of a run; no weights are loaded, nothing is written.")
    look.add_argument(
        "--preview", metavar="N", type=int, help="print N conversations, what is learned of them marked (default: off)"
    )
    look.add_argument(
        "--check-data", action="store_true", help="list all bad rows by reason; exit code 2 if any (default: off)"
    )
    return parser


def parse(argv: Sequence[str], tell: Callable[[list[str]], None] | None = None) -> tuple[SftRecipe, RunFolder]:
    """Read the options: return the recipe to run and the folder to run it in. Imports nothing heavy, writes nothing.

    A resumed run takes its recipe from its own folder; options may change only what keeps it the same run.

    Args:
        argv: the command line.
        tell: takes lines that say what of the recipe was adapted to the options.

    Raises:
        InputError: any option that cannot be obeyed.
    """
    given = vars(build_parser().parse_args(argv))
    recipe_name, output_dir, resume = given.pop("recipe"), given.pop("output_dir"), given.pop("resume")
    if (given.pop("preview") is not None) & given.pop("check_data"):
        raise InputError("--preview", "--check-data does something else; leave one of them out")
    overrides: dict[str, Any] = {
        key: absolute(value, flag(key)) if key in PATHS else value for key, value in given.items()
    }
    if resume is None:
        values = read_sft_recipe(recipe_name) if recipe_name else {}
        fitted, lines = fit_schedule(values, overrides)
        recipe = sft_recipe_from({**values, **overrides, **fitted}, "the options")
        if tell is not None:
            tell(lines)
        _check_together(recipe, overrides)
        recipe = dataclasses.replace(recipe, **{key: absolute(getattr(recipe, key), flag(key)) for key in PATHS})
        _check_paths(recipe)
        return recipe, choose_folder(output_dir, recipe.name)
    if recipe_name or output_dir:
        option = "--recipe" if recipe_name else "--output-dir"
        raise InputError(option, "a resumed run keeps its own; leave it out, or start anew without --resume")
    folder = find_run(resume)
    values = saved_values(read_sft_recipe(str(folder.recipe_file)))
    check_script(folder, values, "sft")
    saved = sft_recipe_from(values, str(folder.recipe_file))
    check_resumable(folder, saved, overrides)
    recipe = sft_recipe_from({**values, **overrides}, "the options")
    return recipe, folder


def _check_together(recipe: SftRecipe, typed: Container[str]) -> None:
    """Check for options that were typed and would have no effect."""
    if recipe.mode == "full":
        for key in ADAPTER_OPTIONS:
            if key in typed:
                raise InputError(flag(key), NO_ADAPTER)
    if recipe.adapter:
        for key in ADAPTER_SHAPE:
            if key in typed:
                raise InputError(flag(key), "--adapter brings its own; leave it out")
    if "epochs" in typed and recipe.max_steps is not None:
        raise InputError("--epochs", f"--max-steps {recipe.max_steps} says how long; leave one of them out")


def _check_paths(recipe: SftRecipe) -> None:
    """Find out early that something which can only be a path is not there."""
    model, dataset = Path(recipe.model).expanduser(), Path(recipe.dataset).expanduser()
    if recipe.model.startswith("package:"):
        package_file(recipe.model)
    check_model_folder(model, "--model")
    if not model.exists() and (model.suffix == ".gguf" or recipe.model.startswith(".")):
        raise InputError("--model", f"there is no {recipe.model}; give a folder, a GGUF file or a hub name")
    if not dataset.exists() and (dataset.is_absolute() or row_kind(dataset)):
        raise InputError("--dataset", f"there is no {recipe.dataset}; give a file, a folder or a name for `datasets`")
    if recipe.adapter and not (Path(recipe.adapter) / "adapter_config.json").is_file():
        raise InputError("--adapter", f"{recipe.adapter} holds no adapter_config.json; give the folder of an adapter")
    template = Path(recipe.chat_template or ".")
    is_name = template.name == str(template) and not template.suffix  # of one of a tokenizer's templates
    if recipe.chat_template and not is_name and not template.is_file():
        raise InputError("--chat-template", f"there is no file {recipe.chat_template}")


def _merge(folder: RunFolder) -> int:
    """Merge the adapter of a complete run into its base; in a launch of several processes the main one does."""
    from finetune.models.merging import find_adapter, merge_adapter

    if os.environ.get("RANK", "0") == "0":
        merge_adapter(find_adapter(folder.path), folder.path / "model", None, print)
    return 0


def _work(argv: Sequence[str]) -> int:
    asked = build_parser().parse_args(argv)
    recipe, folder = parse(argv, say_on_main)
    if asked.check_data or asked.preview is not None:
        from finetune.setup.sft_data import check_data, preview

        lines, code = check_data(recipe) if asked.check_data else (preview(recipe, asked.preview), 0)
        say_on_main(lines)
        return code
    if recipe.merge and folder.awaits_merge(recipe.max_steps):
        return _merge(folder)
    with told_when_stopped(folder):
        from finetune.setup.sft_prepare import set_up
        from finetune.storage.sft_outputs import finish
        from finetune.training.trainer import run_job  # torch and transformers, after the options have passed

        run = set_up(recipe, folder)
    return run_job(run, finish, script=os.path.abspath(__file__))


def main(argv: Sequence[str] | None = None, only_check: bool = False) -> int:
    """Run the script, or with `only_check` parse and check its options. Returns the exit code, see EXIT_CODES."""
    words = sys.argv[1:] if argv is None else argv
    return run_script(lambda: 0 if only_check and parse(words) else _work(words), typed_names(words, SftRecipe))


if __name__ == "__main__":
    sys.exit(main())
