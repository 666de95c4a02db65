"""The way from a TOML file to a checked sweep. No torch in here."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from finetune.config.errors import InputError
from finetune.data.texts import read_text
from finetune.sweep.spec import ARM_KEYS, KEYS, Sweep, SweepArm, command_words, import_script
from muon8bit import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Options that a sweep gives itself, with the way out.
_TAKEN = {
    "lr": "give `rates`",
    "seed": "give `seeds`",
    "max_minutes": "give --max-minutes to the sweep",
    **dict.fromkeys(("recipe", "output_dir", "resume", "help", "preview", "check_data"), "leave it out"),
}


def read_sweep(path: str) -> Sweep:
    """Read a sweep file and check every value, those of the runs' options as their script would.

    Raises:
        InputError: names the file and the key.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise InputError("FILE.toml", f"there is no file {path}; give a sweep's TOML file, or a recipe with --tune")
    try:
        values = tomllib.loads(read_text(file, "FILE.toml"))
    except tomllib.TOMLDecodeError as error:
        way = "; a recipe takes --tune" if file.suffix in (".yaml", ".yml") else ""
        raise InputError(str(file), f"is not TOML: {error}{way}") from None
    return sweep_of(values, file)


def sweep_of(values: Mapping[str, Any], file: Path) -> Sweep:
    """Return the sweep of a file's values, checked.

    Args:
        values: content of a sweep file.
        file: its path, by which errors and the sweep are named; recipes and records are beside it.

    Raises:
        InputError: names the file and the key.
    """
    _check_keys(str(file), values, KEYS)
    tables = _value(values, "arms", dict, {}, str(file))
    if not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise InputError(str(file), "needs at least one table [arms.NAME]")
    records = _value(values, "records", str, None, str(file))
    sweep = Sweep(
        file=file,
        arms={name: _read_arm(file, values, name) for name in tables},
        rates_on_seed=_whole(values, "rates_on_seed", None, 0, str(file)),
        extend_rates=_whole(values, "extend_rates", 0, 0, str(file)) or 0,
        paired=_value(values, "paired", bool, False, str(file)),
        curve_every=_whole(values, "curve_every", 10, 1, str(file)) or 10,
        keep_models=_value(values, "keep_models", bool, False, str(file)),
        records=None if records is None else file.parent / records,
    )
    _check_together(sweep, values)
    return _with_references(sweep, values) if sweep.paired else sweep


def _check_keys(where: str, values: Mapping[str, Any], known: Collection[str]) -> None:
    for key in values:
        if key not in known:
            close = cli.nearest(key, known)
            listed = ", ".join(known) if len(known) < 20 else "its own and the options of its script, see --help there"
            meant = f"did you mean {close!r}?" if close else f"the keys are {listed}"
            raise InputError(where, f"has the unknown key {key!r}; {meant}")


def _value(values: Mapping[str, Any], key: str, kind: type, default: Any, where: str) -> Any:
    """Return a value of this type, or the default where there is none."""
    value = values.get(key, default)
    if key in values and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise InputError(where, f"`{key}` is {value!r}, not of type {kind.__name__}")
    return value


def _whole(values: Mapping[str, Any], key: str, default: int | None, least: int, where: str) -> int | None:
    number: int | None = _value(values, key, int, default, where)
    if number is not None and number < least:
        raise InputError(where, f"`{key}` is {number}; give {least} or more")
    return number


def _read_arm(file: Path, values: Mapping[str, Any], name: str) -> SweepArm:
    where, table = f"{file}: [arms.{name}]", values["arms"][name]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise InputError(where, "the name of an arm may have letters, digits and . _ + - behind the first")
    common = _value(values, "common", dict, {}, str(file))
    script_name = _value(table, "script", str, _value(values, "script", str, "pretrain", str(file)), where)
    script = _script(script_name, where)
    recipe = _value(table, "recipe", str, _value(values, "recipe", str, None, str(file)), where)
    if recipe is None:
        raise InputError(str(file), "needs `recipe`, the name of a recipe or a YAML file")
    recipe = str(file.parent / recipe) if (file.parent / recipe).is_file() else recipe
    known = {action.dest for action in script.build_parser()._actions} - set(_TAKEN)
    own = {key: value for key, value in table.items() if key not in ARM_KEYS}
    for origin, options in ((f"{file}: [common]", common), (where, own)):
        for key in options:
            if key in _TAKEN and not (options is own and key in ARM_KEYS):
                raise InputError(origin, f"`{key}` is not an option of a sweep's runs; {_TAKEN[key]}")
        _check_keys(origin, options, [*known, *(ARM_KEYS if options is own else ())])
    rates, follows = _rates(file, values, name)
    seeds = _seeds(table if "seeds" in table else values, where)
    options = {**common, **own}
    nowhere = file.parent / f".{file.name}.run"
    try:
        parsed, _ = script.parse(
            [*command_words(recipe, options, (*rates, 1e-3)[0], seeds[0]), f"--output-dir={nowhere}"]
        )
    except InputError as error:
        raise InputError(where, str(error)) from None
    reference = _value(table, "reference", str, None, where)
    return SweepArm(name, script_name, recipe, options, rates, follows, seeds, reference, parsed)


def _script(name: str, where: str) -> Any:
    try:
        return import_script(name)
    except ModuleNotFoundError as error:
        raise InputError(where, f"`script` {name!r} cannot be imported: {error}; give pretrain or sft") from None


def _rates(file: Path, values: Mapping[str, Any], name: str) -> tuple[tuple[float, ...], str | None]:
    """Return an arm's rates, ascending, and the arm whose best rate it takes instead."""
    where, table = f"{file}: [arms.{name}]", values["arms"][name]
    shared = values.get("rates")
    if isinstance(shared, dict):
        _check_keys(f"{file}: [rates]", shared, values["arms"])
        if name in shared and "rates" in table:
            raise InputError(where, "`rates` stands here and in [rates]; leave one of them out")
        shared = shared.get(name)
    rates = table.get("rates", shared)
    if isinstance(rates, str):
        if rates == name or rates not in values["arms"]:
            raise InputError(where, f"`rates` {rates!r} is not the name of another arm")
        return (), rates
    are_numbers = isinstance(rates, list) and all(type(rate) in (int, float) for rate in rates)
    if not are_numbers or not rates or not all(0 < rate < math.inf for rate in rates):
        raise InputError(where, f"`rates` is {rates!r}; give a list of learning rates above 0")
    if len(set(rates)) < len(rates):
        raise InputError(where, f"`rates` {rates} has a rate twice; leave one of them out")
    return tuple(sorted(float(rate) for rate in rates)), None


def _seeds(values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    seeds = values.get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise InputError(where, f"`seeds` is {seeds!r}; give a list of whole numbers")
    if len(set(seeds)) < len(seeds):
        raise InputError(where, f"`seeds` {seeds} has a seed twice; leave one of them out")
    return tuple(seeds)


def _check_together(sweep: Sweep, values: Mapping[str, Any]) -> None:
    """Check the keys that belong together."""
    where = str(sweep.file)
    if sweep.extend_rates and sweep.rates_on_seed is None:
        raise InputError(where, "`extend_rates` needs `rates_on_seed`, on which the rates are chosen; give both")
    has_reference = "reference" in values or any(arm.reference for arm in sweep.arms.values())
    if has_reference and not sweep.paired:
        raise InputError(where, "`reference` has no effect without `paired = true`; give both, or neither")
    if sweep.paired and len(sweep.arms) == 1:
        raise InputError(where, "`paired` needs a second arm; add one, or leave it out")
    for name, arm in sweep.arms.items():
        in_arm = f"{where}: [arms.{name}]"
        if arm.follows and (sweep.rates_on_seed is None or sweep.arms[arm.follows].follows):
            raise InputError(
                in_arm, f"`rates` {arm.follows!r}: only with `rates_on_seed`, and of an arm with rates of its own"
            )
        if len(arm.rates) == 2 and sweep.rates_on_seed is not None and not sweep.extend_rates:
            raise InputError(
                in_arm, "the best of two `rates` is never between others; give one, three and more, or `extend_rates`"
            )


def _with_references(sweep: Sweep, values: Mapping[str, Any]) -> Sweep:
    """Give each arm but the default reference one, where pairs are reported.

    Raises:
        InputError: a reference is not another arm.
    """
    default = _value(values, "reference", str, next(iter(sweep.arms)), str(sweep.file))
    arms = {}
    for name, arm in sweep.arms.items():
        reference = arm.reference or (default if name != default else None)
        if reference is not None and (reference == name or reference not in sweep.arms):
            where = f"{sweep.file}: [arms.{name}]" if arm.reference else str(sweep.file)
            raise InputError(where, f"`reference` {reference!r} is not the name of another arm")
        arms[name] = dataclasses.replace(arm, reference=reference)
    return dataclasses.replace(sweep, arms=arms)
