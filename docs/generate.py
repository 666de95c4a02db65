"""Write the pages that are made from the code: options, recipes, commands, sweeps. `python docs/generate.py`.

A test says that they are current: run this after an option, a default or a recipe changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from finetune.config.options import SECTIONS, Training, flag, option_fields, option_type, shown_default  # noqa: E402
from finetune.config.reading import RECIPES, SFT_RECIPES  # noqa: E402
from finetune.config.recipe import DEFAULT_RECIPE, Recipe  # noqa: E402
from finetune.config.sft_recipe import ADAMW_LR, MUON_LR, NEWCOMER_RECIPE, SftRecipe  # noqa: E402
from finetune.sweep.command import EXIT_CODES as SWEEP_CODES, build_parser as sweep_parser  # noqa: E402
from finetune.sweep.records import FIELDS, METRICS  # noqa: E402
from finetune.sweep.spec import ARM_KEYS, KEYS  # noqa: E402
from muon8bit.cli import build_parser  # noqa: E402
from muon8bit.family import ADAMUON_PRESETS, NORMUON_PRESETS  # noqa: E402

MADE = "<!-- Made by docs/generate.py from the code: change it there. -->"


def _cell(text: str) -> str:
    """Escape what ends a cell of a table or begins a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _option_row(f: dataclasses.Field[Any]) -> str:
    kind = option_type(f)
    names = f"`{flag(f.name)}`" + (f", `{flag('no_' + f.name)}`" if kind is bool else "")
    choices = f.metadata["choices"]
    values = (
        ", ".join(f"`{choice}`" for choice in choices) if choices else {str: "text", bool: ""}.get(kind, kind.__name__)
    )
    former = "".join(f"; also `{flag(name)}`" for name in f.metadata["aliases"])
    default = shown_default(f) if f.default is None else f"`{shown_default(f)}`"
    return f"| {names} | {values} | {_cell(default)} | {_cell(f.metadata['help'])}{former} |"


def _option_table(fields: list[dataclasses.Field[Any]]) -> list[str]:
    """Return a table for each section, in the order of --help."""
    lines = []
    for section in SECTIONS:
        rows = [_option_row(f) for f in fields if f.metadata["section"] == section]
        head = [f"{section[0].upper()}{section[1:]}:", "", "| option | value | default | meaning |"]
        lines += [*head, "| --- | --- | --- | --- |", *rows, ""] if rows else []
    return lines


def options_page() -> str:
    """Return Markdown: every option of both scripts, out of the fields that the command line is made of."""
    pretrain = {f.name: f for f in option_fields(Recipe)}
    sft = {f.name: f for f in option_fields(SftRecipe)}
    shared = [f for f in option_fields(Training) if sft[f.name].default == f.default == pretrain[f.name].default]
    shared = [f for f in shared if sft[f.name].metadata == f.metadata]
    names = {f.name for f in shared}
    return "\n".join(
        [
            "# Options of the scripts",
            "",
            MADE,
            "",
            "Each option is a key of a recipe (`--batch-size` is `batch_size`) and a command-line option, which "
            "overrides the recipe. A recipe's own values come "
            f"before these defaults: without `--recipe`, `finetune/pretrain.py` takes `{DEFAULT_RECIPE}` "
            "([recipes](recipes.md)).",
            "",
            "Beside them each script takes:",
            "",
            "| option | meaning |",
            "| --- | --- |",
            "| `--recipe` | the name of a [recipe](recipes.md), or a YAML file |",
            "| `--output-dir` | a new or empty folder; default: `runs/RECIPE-TIME/` |",
            "| `--resume` | the folder of a run to continue, or `latest` |",
            "| `--model-config` | pretraining only: a transformers `config.json` that replaces the recipe's model |",
            "| `--preview` | fine-tuning only: print so many conversations, what is learned of them marked, and exit |",
            "| `--check-data` | fine-tuning only: list all bad rows by reason, and exit, with code 2 if any |",
            "",
            "## Both scripts",
            "",
            *_option_table(shared),
            "## `finetune/pretrain.py` alone",
            "",
            *_option_table([f for f in pretrain.values() if f.name not in names]),
            "## `finetune/sft.py` alone",
            "",
            *_option_table([f for f in sft.values() if f.name not in names]),
            "## Learning rates that `finetune/sft.py` chooses",
            "",
            "Taken where neither the recipe nor the command line gives `--lr`; the log says why.",
            "",
            "| mode | Muon8bit, Muon | AdamW, 8-bit AdamW |",
            "| --- | --- | --- |",
            *(f"| `{mode}` | `{MUON_LR[mode]:g}` | `{ADAMW_LR[mode]:g}` |" for mode in MUON_LR),
            "",
        ]
    )


def _remarks(path: Path) -> str:
    """Return the comment at the head of a recipe as one paragraph, its commands as code."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#")
        lines.append(f"`{text.strip()}`" if text.startswith("   ") else text.strip())
    return " ".join(lines)


def _recipe(path: Path, kind: type[Training]) -> list[str]:
    values = yaml.safe_load(path.read_text())
    known = {f.name for f in option_fields(kind)}
    options = {key: value for key, value in values.items() if key in known and key != "model"}
    lines = [f"### `{path.stem}`", "", _remarks(path), ""]
    if isinstance(values["model"], dict):
        model = ", ".join(f"{key} {value}" for key, value in values["model"].items() if not isinstance(value, dict))
        lines += [f"Model: {model}.", ""]
    else:
        lines += [f"Model: `{values['model']}`.", ""]
    shown = " ".join(f"{key}={value}" for key, value in options.items())
    return [*lines, "```text", *textwrap.wrap(shown, 100), "```", ""]


def recipes_page() -> str:
    """Return Markdown: every recipe with its remarks and values."""
    pretrain = sorted(RECIPES.glob("*.yaml"))
    sft = sorted(SFT_RECIPES.glob("*.yaml"))
    return "\n".join(
        [
            "# Recipes",
            "",
            MADE,
            "",
            "A recipe is a YAML file of [options](options.md). Give its name, or the path of your own: "
            "`python -m finetune.sft --recipe llama_3b_lora`. Command-line options override it. A recipe that is "
            'called "not run yet" here, or "not measured", was validated without its weights and on tiny models.',
            "",
            f"## Pretraining: `finetune/recipes`, default `{DEFAULT_RECIPE}`",
            "",
            "`llama_*` are plain Llamas: a first run (`4m`), and the sizes that GPUs are for. The others "
            "compare architectures: those of one size have equal active parameters (embeddings included, "
            "within 2%), depth, width, data and training, so that what differs is the architecture. `gqa_*`, "
            "the control, shares keys and values among query heads. `mla_*` keeps a latent of half their size"
            " instead: take it where the KV cache limits the text or the number of users. `qwen3_moe_*` and "
            "`mixtral_4m` have experts, of which a token takes a few: more weights to learn with at the "
            "arithmetic of the dense model, for who has the memory for all of them and for their state. "
            "`mla_moe_*` has both, as DeepSeek-V3. Experts are balanced by `router_aux_loss`, and `mla_moe_*`"
            " also by `router_bias_rate`. What each costs: [architectures](../results/architectures.md).",
            "",
            *(line for path in pretrain for line in _recipe(path, Recipe)),
            f"## Fine-tuning: `finetune/recipes/sft`, `make finetune` runs `{NEWCOMER_RECIPE}`",
            "",
            *(line for path in sft for line in _recipe(path, SftRecipe)),
        ]
    )


def _command(name: str, parser: argparse.ArgumentParser, summary: str) -> list[str]:
    head = _cell(parser.description or f"{summary[0].upper()}{summary[1:]}.")
    return [f"## `muon8bit {name}`", "", head, "", *_arguments(parser)]


def _arguments(parser: argparse.ArgumentParser) -> list[str]:
    """Return the table of a parser's arguments."""
    lines = ["| argument | value | meaning |", "| --- | --- | --- |"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
        values = ", ".join(f"`{choice}`" for choice in action.choices or ())
        if not values and action.option_strings and action.nargs != 0:
            values = action.metavar or getattr(action.type, "__name__", "text")
        lines.append(f"| {names} | {values} | {_cell((action.help or '') % vars(action))} |")
    return [*lines, ""]


def commands_page() -> str:
    """Return Markdown: the arguments of every subcommand of `muon8bit`, out of its parser."""
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    return "\n".join(
        [
            "# Commands",
            "",
            MADE,
            "",
            "Bad input is told in one sentence on standard error, with exit code 2.",
            "",
            *(line for name, parser in commands.choices.items() for line in _command(name, parser, summaries[name])),
        ]
    )


def _named_table(head: str, rows: dict[str, str]) -> list[str]:
    return [f"| {head} | meaning |", "| --- | --- |", *(f"| `{k}` | {_cell(text)} |" for k, text in rows.items()), ""]


def sweep_page() -> str:
    """Return Markdown: the keys of a sweep file, the arguments of the command, and the fields of a record."""
    return "\n".join(
        [
            "# Keys, command and records of sweeps",
            "",
            MADE,
            "",
            "[How to run a sweep](sweep.md).",
            "",
            "## Keys of a sweep file",
            "",
            *_named_table("key", KEYS),
            "In `[arms.NAME]`, beside [options](options.md):",
            "",
            *_named_table("key", ARM_KEYS),
            "## `python -m finetune.sweep`",
            "",
            *_arguments(sweep_parser()),
            SWEEP_CODES,
            "",
            "## A record",
            "",
            "One JSON object a line:",
            "",
            *_named_table("field", FIELDS),
            "In `metrics`, beside what else the run's `result.json` has:",
            "",
            *_named_table("field", METRICS),
        ]
    )


def presets_page() -> str:
    """Return Markdown: the group keys of every preset, a column each."""
    kinds = {"NorMuon8bit": NORMUON_PRESETS, "AdaMuon8bit": ADAMUON_PRESETS}
    columns = {f"{kind} `{name}`": keys for kind, presets in kinds.items() for name, keys in presets.items()}
    names = dict.fromkeys(key for keys in columns.values() for key in keys)
    return "\n".join(
        [
            "# Presets of NorMuon8bit and AdaMuon8bit",
            "",
            MADE,
            "",
            "Group keys that `preset` sets; all others are the caller's. `muon8bit.family.NORMUON_PRESETS` and "
            "`ADAMUON_PRESETS` have them. [Which to take](../guide/family.md).",
            "",
            f"| key | {' | '.join(columns)} |",
            f"| --- |{' --- |' * len(columns)}",
            *(
                f"| `{key}` | {' | '.join(f'`{keys[key]!r}`' if key in keys else '' for keys in columns.values())} |"
                for key in names
            ),
            "",
        ]
    )


PAGES = {
    "reference/presets.md": presets_page,
    "training/sweep-reference.md": sweep_page,
    "training/options.md": options_page,
    "training/recipes.md": recipes_page,
    "reference/commands.md": commands_page,
}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page())


if __name__ == "__main__":
    main()
