"""Defaults that adapt to the model and to the length of the run, each with a sentence for the log. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def fit_seq_len(asked: int | None, usual: int, longest: int | None) -> tuple[int, list[str]]:
    """Return the tokens of a sequence, and lines for the log where they were shortened to the model.

    Args:
        asked: `--seq-len`; None: not said.
        usual: what is taken of a model that takes as much.
        longest: tokens that the model takes at most; None: no limit.
    """
    if asked is not None or longest is None or longest >= usual:
        return usual if asked is None else asked, []
    return longest, [f"--seq-len {longest}, all that the model takes; the default would be {usual}"]


def fit_schedule(values: Mapping[str, Any], typed: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Return a recipe's warm-up and decay, shortened to fewer steps that were typed, and lines for the log.

    What was typed itself is left, and so is what fits.

    Args:
        values: of the recipe, unchecked.
        typed: options of the command line.
    """
    steps = typed.get("max_steps")
    phases = {key: typed.get(key, values.get(key)) for key in ("warmup_steps", "decay_steps")}
    lengths = {key: length for key, length in phases.items() if type(length) is int and length > 0}
    total = sum(lengths.values())
    if steps is None or steps < 1 or total <= steps:
        return {}, []
    whole = values.get("max_steps")
    whole = whole if type(whole) is int and whole > total else total
    least = {"warmup_steps": 0, "decay_steps": 1}  # warmup_stable_decay needs one
    fitted = {key: max(least[key], n * steps // whole) for key, n in lengths.items() if key not in typed}
    return fitted, [
        f"{key.replace('_', ' ')} {now}, of the recipe's {lengths[key]}: --max-steps {steps} leaves no more"
        for key, now in fitted.items()
    ]
