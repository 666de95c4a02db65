"""The user's patterns: which parameters they mean, and what they make of the routes of the rules."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, TypeAlias

from .._text import template
from .._values import FINITE, is_choice, is_rate, shown
from ..config import ALGORITHMS, BITS, BLOCK_SIZES, CODEBOOKS, Algorithm
from .rules import FUSED_FLAG, Route, split_in_words

Target: TypeAlias = Algorithm | Mapping[str, Any]

_MATRIX_KEYS = ("split_sizes", "split_dim", "flatten")
_OPTIONS = {"lr": "", "bits": "muon", "codebook": "muon", "block_size": "muon", "adamw_bits": "adamw"}
_ALGORITHM_OF = {**dict.fromkeys(_MATRIX_KEYS, "muon"), **{key: of for key, of in _OPTIONS.items() if of}}
_KEYS = ("algorithm", *_MATRIX_KEYS, *_OPTIONS)


def read_patterns(
    patterns: Sequence[tuple[str, Target]], no_decay: Sequence[str], names: Sequence[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Return each pattern with the group keys that it asks for.

    Args:
        names: of the model's parameters, of which each pattern must match one.

    Raises:
        ValueError: an unknown algorithm, key or value; keys that exclude each other; a pattern that matches no name.
    """
    if isinstance(no_decay, str):
        raise ValueError(f"no_decay must be a list of patterns, as [{no_decay!r}], not a string")
    if not all(isinstance(p, tuple | list) and len(p) == 2 and isinstance(p[0], str) for p in patterns):
        hint = ": give list(patterns.items())" if isinstance(patterns, Mapping) else ""
        raise ValueError(
            f"patterns must be a list of (pattern, 'muon' | 'adamw' | dict of keys) pairs, not {patterns!r}{hint}"
        )
    read = []
    for pattern, target in patterns:
        keys = dict(target) if isinstance(target, Mapping) else {"algorithm": target}
        _check_keys(f"pattern {pattern!r}", keys)
        read.append((pattern, keys))
    for pattern in (*(pattern for pattern, _ in read), *no_decay):
        if not any(fnmatchcase(name, pattern) for name in names):
            layers = {template(name): name for name in reversed(names)}
            near = difflib.get_close_matches(template(pattern), layers, n=3, cutoff=0.0)
            raise ValueError(
                f"pattern {pattern!r} matches no parameter (fnmatch over the whole name, case-sensitive); "
                f"near names: {', '.join(layers[name] for name in near)}"
            )
    return read


def warn_of_shadowed(patterns: Iterable[str], used: Collection[str]) -> None:
    """Warn of each pattern that no parameter takes, since one before it takes all that it matches."""
    for pattern in patterns:
        if pattern not in used:
            warnings.warn(
                f"pattern {pattern!r} changes nothing: the first pattern that matches counts, and those before it take "
                "all that it matches; put it first",
                stacklevel=4,
            )


def _check_keys(where: str, keys: Mapping[str, Any]) -> None:
    """Raise ValueError for a key, a value or a combination that no parameter could take."""

    def require(key: str, valid: bool, allowed: str) -> None:
        if key in keys and not valid:
            raise ValueError(f"{where}: {key} must be {allowed}, not {shown(keys[key])}")

    for key in keys:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_KEYS)}"
            raise ValueError(f"{where}: unknown key {key!r}, {hint}")
    if not keys:
        raise ValueError(f"{where}: its dict is empty: give one of {', '.join(_KEYS)}")
    algorithm, sizes = keys.get("algorithm"), keys.get("split_sizes")
    if "algorithm" in keys and not is_choice(algorithm, ALGORITHMS):
        raise ValueError(
            f"{where} asks for {shown(algorithm)}; it must be one of {ALGORITHMS}, or a dict of group keys"
        )
    require("lr", is_rate(keys.get("lr")), f">= 0 and {FINITE}")
    for key, allowed in (("bits", BITS), ("codebook", CODEBOOKS), ("block_size", BLOCK_SIZES), ("adamw_bits", BITS)):
        require(key, is_choice(keys.get(key), allowed), f"one of {allowed}")
    is_sizes = isinstance(sizes, tuple | list) and len(sizes) > 0 and all(type(n) is int and n > 0 for n in sizes)
    require("split_sizes", sizes is None or is_sizes, "None or positive ints")
    require("split_dim", is_choice(keys.get("split_dim"), (-2, -1)), "one of (-2, -1), a dimension of the matrix")
    require("flatten", isinstance(keys.get("flatten"), bool), "True or False")
    if "split_dim" in keys and not sizes:
        raise ValueError(f"{where}: split_dim says nothing without split_sizes: give both")
    require("split_dim", not (keys.get("flatten") and keys["split_dim"] == -1), "-2 beside flatten=True")
    foreign = [key for key in keys if algorithm is not None and _ALGORITHM_OF.get(key, algorithm) != algorithm]
    if foreign:
        raise ValueError(f"{where}: {', '.join(foreign)} has no meaning with algorithm={algorithm!r}: leave it out")


def overridden(route: Route, pattern: str, keys: Mapping[str, Any]) -> Route:
    """Return `route` as the user's pattern wants it; its decay stays, its flags only where they still hold.

    Raises:
        ValueError: names the parameter that cannot be taken so, and the pattern.
    """
    algorithm = keys.get("algorithm", route.algorithm)
    if algorithm == "muon" and len(route.shape) < 2:
        raise ValueError(
            f"pattern {pattern!r} sends {route.name} of shape {route.shape} to Muon, which takes "
            "matrices: narrow the pattern, or put a pattern before it that sends this parameter to 'adamw'"
        )
    foreign = [key for key in keys if _ALGORITHM_OF.get(key, algorithm) != algorithm]
    if foreign:
        raise ValueError(
            f"pattern {pattern!r} gives {', '.join(foreign)} to {route.name}, which goes to {algorithm!r}, where that "
            f"has no meaning: narrow the pattern, or add 'algorithm': {_ALGORITHM_OF[foreign[0]]!r} to its keys"
        )
    route = replace(route, flatten=keys.get("flatten", route.flatten))
    flag = route.flag if route.algorithm == algorithm and ("algorithm" not in keys or algorithm == "muon") else ""
    if "split_sizes" in keys:
        sizes, dim = keys["split_sizes"], keys.get("split_dim", -2)
        route = replace(route, split=None if sizes is None else (tuple(sizes), dim))
        flag = "; ".join(part for part in flag.split("; ") if part != FUSED_FLAG)
    if algorithm == "muon" and keys.keys() & {"split_sizes", "flatten"}:
        _check_split(route, pattern)
    options = tuple((key, keys[key]) for key in _OPTIONS if key in keys)
    before = "" if "algorithm" in keys else f"{route.reason.partition(', split ')[0]}, "
    reason = f"{before}pattern {pattern!r}" + (split_in_words(route.split) if len(keys) > 1 or before else "")
    reason += "".join(f", {key}={value!r}" for key, value in options if key != "lr")  # which has its column
    return replace(route, algorithm=algorithm, reason=reason, flag=flag, options=options)


def _check_split(route: Route, pattern: str) -> None:
    """Raise ValueError if the pieces do not fill the dimension of each matrix that they split."""
    shape = route.shape
    if route.flatten and route.split is not None and route.split[1] == -1:
        raise ValueError(
            f"pattern {pattern!r}: {route.name} is flattened, and its pieces are cut from the rows: give split_sizes "
            "with split_dim=-2, or add 'flatten': False"
        )
    matrix = (shape[0], prod(shape[1:])) if route.flatten else shape[-2:]
    if route.split is not None and sum(route.split[0]) != matrix[route.split[1]]:
        sizes, dim = route.split
        raise ValueError(
            f"pattern {pattern!r}: split_sizes {sizes} sum to {sum(sizes)}, but dimension {dim} of {route.name}, of "
            f"shape {shape}, has {matrix[dim]} elements: give the sizes of its own pieces, split_dim={-3 - dim}, or "
            "narrow the pattern"
        )
