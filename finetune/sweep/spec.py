"""A sweep: its arms, rates and seeds, and the words that run one of them. No torch in here."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.options import Training, flag

# Key of a sweep file -> what it gives; a page of the docs is made from both tables.
KEYS = {
    "recipe": "the recipe of all runs: a name, or a YAML file beside the sweep's",
    "script": "`pretrain` (default) or `sft`; or a module that has their `parse`, `build_parser` and `main`",
    "common": "table of options that all runs have, as in a recipe; not `lr` and `seed`",
    "arms": "table of arms, in the order of the report: `[arms.NAME]` has an arm's own options, and the keys below",
    "rates": "learning rates of every arm, or a table of them by arm",
    "seeds": "seeds of every arm",
    "rates_on_seed": "two stages: all rates on this seed, then all seeds at each arm's best one (default: a full grid)",
    "extend_rates": "rates that may be added beyond an end of the grid while the best one is there (default: 0)",
    "paired": "report the differences to `reference`, seed by seed (default: false)",
    "reference": "with `paired`: the arm that others are compared with (default: the first)",
    "curve_every": "steps over which a point of the recorded training loss is averaged (default: 10)",
    "keep_models": "keep the models that runs leave (default: false)",
    "records": "file of the records, beside the sweep's (default: records.jsonl in the folder of the runs)",
}
ARM_KEYS = {
    "rates": "its learning rates; or the name of another arm, whose best rate it takes",
    "seeds": "its seeds",
    "reference": "with `paired`: the arm that it is compared with",
    "script": "its script",
    "recipe": "its recipe",
}
# Options that change nothing of what a run learns or records.
_IMMATERIAL = ("name", "lr", "seed", "save_every", "keep_checkpoints", "max_minutes", "step_timeout", "tracker")


def import_script(name: str) -> Any:
    """Return the module of a `script`."""
    return importlib.import_module(name if "." in name else f"finetune.{name}")


@dataclass(frozen=True, order=True)
class SweepRun:
    """One run of a sweep: name of its arm, peak learning rate (None while it is not chosen), and seed."""

    arm: str
    rate: float | None
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.arm}-lr{self.rate:.12g}-seed{self.seed}"


@dataclass(frozen=True)
class SweepArm:
    """One arm.

    Args:
        name: of the arm.
        script: name of the module that runs it.
        recipe_name: what is given as its `--recipe`.
        options: those of its runs but rate and seed, by their names with underscores.
        rates: ascending; of one that `follows` another arm, none.
        follows: the arm whose best rate it takes; None where it has its own.
        seeds: in the order in which they run.
        reference: the arm that it is compared with, seed by seed; None for none.
        recipe: its options with the recipe and the defaults, checked, at its first rate and seed.
    """

    name: str
    script: str
    recipe_name: str
    options: Mapping[str, Any]
    rates: tuple[float, ...]
    follows: str | None
    seeds: tuple[int, ...]
    reference: str | None
    recipe: Training

    @property
    def recipe_hash(self) -> str:
        """Hash of what an arm's runs have in common: options that are not at their default.

        So options that later versions add leave it as it is. Of paths only the last part counts.
        """
        values = {
            f.name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
            for f in dataclasses.fields(self.recipe)
            if f.name not in _IMMATERIAL and (value := getattr(self.recipe, f.name)) != f.default
        }
        return hashlib.sha256(json.dumps([self.script, values], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sweep:
    """A sweep; see `KEYS` for its fields. `records` is None for the default."""

    file: Path
    arms: Mapping[str, SweepArm]
    rates_on_seed: int | None
    extend_rates: int
    paired: bool
    curve_every: int
    keep_models: bool
    records: Path | None

    @property
    def name(self) -> str:
        """Name of the sweep, that of its file."""
        return self.file.stem

    def words(self, run: SweepRun) -> list[str]:
        """Return the command line of a run's script, without where it writes."""
        arm = self.arms[run.arm]
        return command_words(arm.recipe_name, arm.options, run.rate, run.seed)


def command_words(recipe: str, options: Mapping[str, Any], rate: float | None, seed: int) -> list[str]:
    """Return options as words of a script's command line."""
    words = ["--recipe", recipe]
    for key, value in {**options, "lr": rate, "seed": seed}.items():
        if isinstance(value, bool):
            words.append(flag(key) if value else flag(f"no_{key}"))
        else:
            words.append(f"{flag(key)}={value!r}" if isinstance(value, float) else f"{flag(key)}={value}")
    return words
