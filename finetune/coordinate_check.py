"""Check whether a model scales with its width: how much its activations change in a few steps, by width.

    python -m finetune.coordinate_check llama_4m --widths 64,128,256,512 --scaling spectral
    python -m finetune.coordinate_check llama_4m --widths 64,128,256 --scaling none --init spectral -- --lr 2e-3

Every width starts by the same rule, sees the same tokens, and is trained at a constant rate for a few steps, on the CPU
in one thread. Options of the pretraining script come after --; their lr is that of the width as the recipe is written.
A model scales if the changes do not depend on the width. What was measured is in record.json of the output folder, one
entry for each width and seed; a second call with the same options goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.command_line import run_script
from finetune.config.errors import InputError, named_here
from finetune.config.options import SCALINGS, flag
from finetune.config.recipe import Recipe, read_recipe, recipe_from
from finetune.coordinates.verdict import judge, plot_changes, table
from finetune.pretrain import build_parser as script_parser
from finetune.storage.run_dir import write_beside
from muon8bit import cli

_OWN = ("width", "seed", "scaling", "max_steps", "init_from")


def build_parser() -> cli.CommandParser:
    """Return the parser of the command, without what comes after --."""
    parser = cli.CommandParser(
        prog="coordinate_check",
        usage="coordinate_check RECIPE --widths N,N [--OPTION VALUE ...] [-- --OPTION VALUE ...]",
        description=__doc__,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="of the pretraining script, or a YAML file")
    parser.add_argument(
        "--widths", metavar="N,N", required=True, help="at least two, which the recipe's model can have"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of weights and order of data")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="optimizer steps before it is looked again")
    rule = "rule by which rates follow the width"
    parser.add_argument("--scaling", choices=SCALINGS, default="spectral", help=rule)
    start = "rule by which the model starts (default: that of --scaling)"
    parser.add_argument("--init", choices=SCALINGS, help=start)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(default: runs/coordinates-RECIPE-SCALING)")
    return parser


def parse(argv: Sequence[str]) -> tuple[list[Recipe], str, Path]:
    """Return the recipe of each width and seed, the rule of initialization, and the folder to write.

    Raises:
        InputError: an option that cannot be obeyed.
    """
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    args = build_parser().parse_args(words[:cut])
    given = vars(script_parser().parse_args(words[cut + 1 :]))
    asked = {key: value for key, value in given.items() if value is not None}
    for key in (*_OWN, "recipe", "model_config", "output_dir", "resume"):
        if key in asked:
            raise InputError(flag(key), "the coordinate check has its own way of it; leave it out after --")
    try:
        widths = sorted({int(word) for word in args.widths.split(",")})
    except ValueError:
        raise InputError("--widths", f"{args.widths!r} is no list of whole numbers, such as 64,128,256") from None
    for name, least in (("seeds", 1), ("steps", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name}", f"{getattr(args, name)} must be at least {least}")
    if len(widths) < 2:
        raise InputError("--widths", f"{args.widths} is one width; give at least two, whose changes are compared")
    fixed = {"scaling": args.scaling, "max_steps": args.steps, "warmup_steps": 0, "decay_steps": 0}
    fixed["schedule"] = "constant_with_warmup"
    values = {**dataclasses.asdict(read_recipe(args.recipe)), **asked, **fixed}
    with named_here("--width", "--widths"):
        recipes: list[Recipe] = [
            recipe_from({**values, "width": width, "seed": seed}, "the options")
            for width, seed in itertools.product(widths, range(args.seeds))
        ]
    folder = args.output or Path("runs") / f"coordinates-{recipes[0].name}-{args.scaling}"
    return recipes, args.init or args.scaling, folder


def _read(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a folder has measured with these settings.

    Raises:
        InputError: its record is of other settings, or unreadable.
    """
    file = folder / "record.json"
    if not file.exists():
        return []
    try:
        record = json.loads(file.read_text())
        saved, measured = record["settings"], record["measured"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("--output", f"cannot read {file}: {error}; give another folder") from None
    for key, value in settings.items():
        if saved.get(key) != value:
            raise InputError("--output", f"{file} is of {key} {saved.get(key)!r}, not {value!r}; give another folder")
    return list(measured)


def _settings(recipe: Recipe, initialization: str) -> dict[str, Any]:
    """Return what all measurements of a record have in common."""
    kept = ("model", "scaling", "optimizer", "preset", "lr", "adamw_lr", "weight_decay", "clip", "bits", "batch_size")
    values = {key: getattr(recipe, key) for key in (*kept, "seq_len", "dataset", "max_steps", "dtype", "routing")}
    return {"recipe": recipe.name, "initialization": initialization, **values}


def _work(argv: Sequence[str]) -> int:
    recipes, initialization, folder = parse(argv)
    settings = _settings(recipes[0], initialization)
    measured = _read(folder, settings)
    import torch

    from finetune.coordinates.measure import check_rules, measure_changes, prepare_tokens

    torch.set_num_threads(1)
    for recipe in {recipe.width: recipe for recipe in recipes}.values():
        check_rules(recipe, initialization)
    tokenizer, cache = prepare_tokens(recipes[0])
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {(recipe.width, recipe.seed) for recipe in recipes}
    done = {(one["width"], one["seed"]) for one in measured}
    for recipe in [recipe for recipe in recipes if (recipe.width, recipe.seed) not in done]:
        measured.append(measure_changes(recipe, initialization, tokenizer, cache))
        _write(folder / "record.json", {"settings": settings, "torch": torch.__version__, "measured": measured})
        print(f"width {recipe.width}, seed {recipe.seed}: losses {measured[-1]['losses']}", flush=True)
    chosen = [one for one in measured if (one["width"], one["seed"]) in wanted]
    verdict = judge(chosen)
    result = {**dataclasses.asdict(verdict), "widths": sorted({one["width"] for one in chosen})}
    record = {"settings": settings, "torch": torch.__version__, "verdict": result, "measured": measured}
    _write(folder / "record.json", record)
    plot_changes(chosen, folder / "changes.png", f"{settings['recipe']}, {settings['scaling']}")
    print(f"{table(chosen, verdict)}\nwritten to {folder}")
    return 0


def _write(file: Path, record: dict[str, Any]) -> None:
    write_beside(file, json.dumps(record, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 measured, whatever the verdict; 2 bad input."""
    return run_script(lambda: _work(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
