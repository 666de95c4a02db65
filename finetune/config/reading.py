"""The way from YAML and the command line to a checked record. No torch in here."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finetune.config.errors import InputError
from finetune.config.options import Training, flag, option_fields, option_type
from finetune.data.texts import read_text
from muon8bit import cli

R = TypeVar("R", bound=Training)
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SFT_RECIPES = RECIPES / "sft"


def read_values(name_or_path: str, folder: Path, kind: type[Training]) -> tuple[dict[str, Any], str]:
    """Read the values of a recipe of this kind, and say where they are from.

    The recipe is a name in `folder`, or the path of a YAML file.

    Keys that were renamed are given by their names of now.

    Raises:
        InputError: no such recipe, not a YAML mapping, or a key under two names.
    """
    path = folder / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise no_recipe(name_or_path, folder)
    try:
        values = yaml.safe_load(read_text(path, "--recipe"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a day like 2024-13-45
        raise InputError("--recipe", f"cannot read {path}: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(values, dict):
        raise InputError("--recipe", f"{path} holds no mapping of options")
    values = _renamed({str(key): value for key, value in values.items()}, kind, str(path))
    values.setdefault("name", path.stem)
    return values, str(path)


def no_recipe(name: str, folder: Path | None) -> InputError:
    """Return the error of a name that is no recipe's, with the nearest of all recipes of both scripts.

    Args:
        name: that was given.
        folder: whose recipes could have been given; None for those of both scripts.
    """
    scripts = {path.stem: "pretrain" for path in sorted(RECIPES.glob("*.yaml"))}
    scripts |= {path.stem: "sft" for path in sorted(SFT_RECIPES.glob("*.yaml"))}
    known = [stem for stem in scripts if folder is None or (folder / f"{stem}.yaml").is_file()]
    close = cli.nearest(name, scripts)
    what = f"there is no file {name}" if Path(name).suffix in (".yaml", ".yml") else f"no recipe {name!r}"
    whose = "" if close is None or close in known else f", a recipe of {scripts[close]}"
    meant = f"did you mean {close}{whose}? It must be" if close else "give"
    return InputError("--recipe", f"{what}; {meant} one of {', '.join(known)}, or a YAML file")


def _renamed(values: Mapping[str, Any], kind: type[Training], origin: str) -> dict[str, Any]:
    former = {alias: f.name for f in option_fields(kind) for alias in f.metadata["aliases"]}
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        name = former.get(key, key)
        if name in renamed:
            raise InputError("--recipe", f"{origin} has {name!r} under two names, one of them {key!r}; leave one out")
        renamed[name] = value
    return renamed


def saved_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what the recipe of a run's folder lacks: runs of release 0.1 recorded no routing."""
    return {"routing": "0.1", **values}


def build(kind: type[R], values: Mapping[str, Any], origin: str) -> R:
    """Build a recipe from a mapping; a number such as `1e-3`, which YAML reads as text, is converted.

    Raises:
        InputError: an unknown key, or a value of the wrong type, not among its choices or not finite.
    """
    options = {f.name: f for f in option_fields(kind)}
    known = [f.name for f in dataclasses.fields(kind)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        close = cli.nearest(unknown[0], known)
        meant = f"did you mean {close!r}?" if close else "see --help for the keys"
        raise InputError("--recipe", f"{origin} has the unknown key {unknown[0]!r}; {meant}")
    clean = dict(values)
    for key, value in values.items():
        if key in options and not (value is None and options[key].default is None):
            clean[key] = _typed(key, value, option_type(options[key]), origin)
    recipe = kind(**clean)
    for key, f in options.items():
        choices, value = f.metadata["choices"], getattr(recipe, key)
        if choices and value is not None and value not in choices:
            raise InputError(flag(key), f"{value!r} is not one of {', '.join(map(str, choices))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(flag(key), f"{value} is not a finite number")
    return recipe


def _typed(key: str, value: Any, kind: type, origin: str) -> Any:
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and type(value) is datetime.date:  # YAML's reading of an unquoted 2024-07-26
        return value.isoformat()
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(flag(key), f"{value!r} in {origin} is not of type {kind.__name__}")
    return value
