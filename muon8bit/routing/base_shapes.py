"""Shapes of a base model, of which another one is a wider or narrower copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from .._text import unwrapper
from .._values import shown
from .rules import Route

Shape: TypeAlias = tuple[int, ...]


def shapes_of_base(base: Any, model: nn.Module) -> dict[str, Shape]:
    """Return the shapes of all parameters of a base by their names in the model, tied ones under all of their names.

    Args:
        base: a mapping of names to shapes; a model, on any device; or a configuration of transformers, with which the
            model's own class is built on the meta device.
        model: of another width.

    Raises:
        TypeError: the base is none of these.
        ValueError: a shape is no sequence of positive ints; no module of the model has a configuration of this class.
    """
    if isinstance(base, Mapping):
        for name, shape in base.items():
            if not isinstance(shape, Sequence) or not all(type(size) is int and size > 0 for size in shape):
                raise ValueError(f"base: {name!r} must have a shape, a tuple of positive ints, not {shown(shape)}")
        return {str(name): tuple(shape) for name, shape in base.items()}
    if isinstance(base, nn.Module):
        return _shapes(base, "")
    if not (hasattr(base, "model_type") and hasattr(base, "to_dict")):
        raise TypeError(
            "base must be a configuration of transformers, a model, or a mapping of parameter names to shapes, not "
            f"{shown(base)}"
        )
    for path, module in model.named_modules():
        if type(getattr(module, "config", None)) is type(base):
            with torch.device("meta"):
                built = type(module)(copy.deepcopy(base))
            return _shapes(built, unwrapper(name for name, _ in model.named_modules())(path))
    raise ValueError(
        f"base: no module of the {type(model).__name__} has a {type(base).__name__}: give the configuration of the "
        "same model at another width, or a mapping of its parameters' shapes"
    )


def _shapes(model: nn.Module, path: str) -> dict[str, Shape]:
    named = list(model.named_parameters(path, remove_duplicate=False))
    unwrapped = unwrapper(name for name, _ in named)
    return {unwrapped(name): tuple(param.shape) for name, param in named}


def check_same_model(routes: Sequence[Route], shapes: Mapping[str, Shape]) -> None:
    """Check that the base has the model's parameters and no others, with as many dimensions.

    Raises:
        ValueError: names the first parameter that differs, and the way out.
    """
    way_out = "only the width may differ: give the same model, with as many layers and experts, as base"
    names = {name for route in routes for name in (route.name, *route.aliases)}
    for route in routes:
        if route.name not in shapes and not any(alias in shapes for alias in route.aliases):
            raise ValueError(f"base: it has no parameter {route.name}; {way_out}")
        shape = base_shape(route, shapes)
        if len(shape) != len(route.shape):
            raise ValueError(f"base: {route.name} has the shape {shape} there and {route.shape} here; {way_out}")
    for name in shapes:
        if name not in names:
            raise ValueError(f"base: it has the parameter {name}, which the model has not; {way_out}")


def base_shape(route: Route, shapes: Mapping[str, Shape]) -> Shape:
    """Return the shape that a parameter has in the base, there perhaps under another of its names."""
    return next(shapes[name] for name in (route.name, *route.aliases) if name in shapes)
