"""Width transfer: rates, decay and initialization of a model from those that were tuned at another width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch
from torch import nn

from .._text import unwrapper
from .._values import is_choice, shown
from ..choices import SCALING_ROLES, SCALING_RULES, ScalingRole, ScalingRule
from ..config import DEFAULT_ROUTING
from .base_shapes import Shape, base_shape, check_same_model, shapes_of_base
from .roles import ADAPTER, FINAL_NORM, TIED, find_final_norm, is_transposed
from .routes import route_all
from .rules import Route
from .width_rules import Matrix, ScaleFactors, scale_factors

# Optimizers that groups can be scaled for: their directions are orthogonal, or those of single elements.
_ORTHOGONAL, _ELEMENTWISE = ("muon8bit", "normuon8bit"), ("adamuon8bit", "adamw")
# Roles whose outputs, or table entries, are no width.
_OF_VOCABULARY = ("embedding", "head", TIED)


class Scaling:
    """A rule that carries learning rate, weight decay and initialization from a base width to that of a model.

    For `param_groups(model, lr=..., scaling=scaling)`, whose arguments are then those of the base, and for
    `scaling.initialize(model)`. Every factor is relative to the base: at the base's width nothing changes. The model
    keeps no multiplier, and is saved and loaded as ever. Only the width may differ: heads and intermediate sizes with
    it, but not the size of a head, depth, vocabulary or data.

    Roles: hidden matrices (experts, convolutions), the embedding (and tables of positions), the output head, MoE
    routers, vectors (norms, biases). Where embedding and head are one tensor it has the embedding's factors, and the
    norm before the head is divided by the ratio of widths, with its rate.

    Args:
        rule: `"spectral"`: Muon's raw O has an lr of sqrt(outputs / inputs), AdamW and AdaMuon 1 / inputs, and lr times
            weight decay goes as 1 / width. `"essential"`: hidden matrices have lr / inputs on a Muon whose update has
            the RMS of AdamW's, and weights decay by their rate. Tables of both: `muon8bit/routing/width_rules.py`.
        base: at the width at which lr and weight decay were tuned: a transformers configuration, a model on any device
            (meta too), or a mapping of parameter names to shapes. It has the model's parameters, by their names.
        roles: `(pattern, role)`, fnmatch over the whole qualified name; the first match wins. A role is "hidden",
            "embedding", "head", "router" or "vector".
        optimizer: that the groups are for: `"muon8bit"`, `"normuon8bit"`, `"adamuon8bit"`, or `"adamw"` for all
            parameters, matrices too. Another optimizer of this package refuses them. Groups with `decay_lr_power=2`
            decay otherwise than the rule has it.

    Raises:
        TypeError: base is none of these.
        ValueError: an unknown rule, role, optimizer or shape.

    Source: "spectral": arXiv 2512.05620, table 1; "essential": arXiv 2505.02222, figure 5.
    """

    def __init__(
        self,
        rule: ScalingRule = "spectral",
        *,
        base: Any,
        roles: Sequence[tuple[str, ScalingRole]] = (),
        optimizer: str = "muon8bit",
    ) -> None:
        if not is_choice(rule, SCALING_RULES):
            raise ValueError(f"rule must be one of {SCALING_RULES}, not {shown(rule)}")
        if not is_choice(optimizer, (*_ORTHOGONAL, *_ELEMENTWISE)):
            raise ValueError(f"optimizer must be one of {(*_ORTHOGONAL, *_ELEMENTWISE)}, not {shown(optimizer)}")
        for pair in roles:
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and is_choice(pair[1], SCALING_ROLES)):
                raise ValueError(
                    f"roles must be (pattern, role) pairs with a role of {SCALING_ROLES}, not {shown(pair)}"
                )
        if not isinstance(base, Mapping | nn.Module) and not (hasattr(base, "model_type") and hasattr(base, "to_dict")):
            raise TypeError(
                "base must be a transformers configuration, a model, or a mapping of parameter names to shapes, not "
                f"{shown(base)}"
            )
        self.rule, self.base, self.roles, self.optimizer = rule, base, tuple(roles), optimizer

    def initialize(self, model: nn.Module) -> None:
        """Multiply the parameters of a model that was just initialized, in place, so that it starts by the rule.

        Weights must have been drawn with a standard deviation that does not depend on the width, as transformers does
        by `initializer_range`, or by torch's default for nn.Linear, which is recognized. Calling it twice scales twice.

        Args:
            model: floating parameters, not on the meta device.

        Raises:
            ValueError: a parameter on the meta device; else as `param_groups` with this scaling.
        """
        routes, params = route_all(model, (), (), DEFAULT_ROUTING, None, "adamw")
        for name, param in model.named_parameters():
            if param.is_meta:
                raise ValueError(f"initialize: {name} is on the meta device, without values to scale: load it first")
        scaled = self.scaled(model, routes, None)
        with torch.no_grad():
            for route, param in zip(scaled, params, strict=True):
                assert route.scale is not None
                init = route.scale.init
                if route.scale.fan_in != 1 and _is_by_inputs(param, _matrix(route, route.shape)[1]):
                    init *= route.scale.fan_in**0.5
                if init != 1:
                    param.mul_(init)

    def scaled(self, model: nn.Module, routes: Sequence[Route], adjust_lr_fn: str | None) -> list[Route]:
        """Return the routes with their factors, `scale`.

        Args:
            model: whose they are.
            routes: of all its parameters.
            adjust_lr_fn: of the Muon groups.

        Raises:
            ValueError: as `param_groups` with this scaling.
        """
        named = [*model.named_parameters(remove_duplicate=False), *model.named_modules(remove_duplicate=False)]
        unwrapped = unwrapper(name for name, _ in model.named_parameters(remove_duplicate=False))
        modules = {unwrapped(path): module for path, module in named if isinstance(module, nn.Module)}
        found, routes = routes, self._with_roles(routes)
        shapes = shapes_of_base(self.base, model)
        check_same_model(routes, shapes)
        for route, by_rules in zip(routes, found, strict=True):
            if route.role in _OF_VOCABULARY and route.role == by_rules.role:
                _check_rows(route, base_shape(route, shapes), is_transposed(route, modules))
        for tied in [route for route in routes if route.role == TIED]:
            norm = find_final_norm(routes, tied, modules)
            routes = [replace(route, role=FINAL_NORM) if route.name in norm else route for route in routes]
        return [
            replace(route, scale=self._factors(route, base_shape(route, shapes), modules, adjust_lr_fn))
            for route in routes
        ]

    def _with_roles(self, routes: Sequence[Route]) -> list[Route]:
        """Return routes with the roles that the user gave; check that all have one that the rules know."""
        given, used = [], set()
        for route in routes:
            names = (route.name, *route.aliases)
            match = next((p for p in self.roles if any(fnmatchcase(name, p[0]) for name in names)), None)
            if match:
                used.add(match[0])
                route = replace(route, role=match[1])
            if route.role == ADAPTER:
                raise ValueError(
                    f"scaling: {route.name} is part of an adapter, for which there is no rule of width: train the "
                    "whole model, or leave scaling out"
                )
            if not route.role:
                raise ValueError(
                    f"scaling: the rule knows no role for {route.name} of shape {route.shape} ({route.reason}): give "
                    f"it one by roles=[({route.name!r}, role)], one of {', '.join(SCALING_ROLES)}"
                )
            if route.algorithm == "muon" and route.role in ("embedding", "vector", TIED):
                raise ValueError(
                    f"scaling: {route.name} goes to Muon, and the rule has no rate for its role, {route.role}, there: "
                    "leave it with AdamW"
                )
            if len(route.shape) < 2 and route.role in ("hidden", "head", "router"):
                raise ValueError(f"scaling: {route.name} of shape {route.shape} is no matrix, as {route.role} must be")
            given.append(route)
        for pattern, _ in self.roles:
            if pattern not in used:
                raise ValueError(f"roles: the pattern {pattern!r} matches no parameter, or only such as others match")
        return given

    def _factors(
        self, route: Route, base: Shape, modules: Mapping[str, nn.Module], adjust_lr_fn: str | None
    ) -> ScaleFactors:
        """Return the factors of one parameter whose shape in the base is `base`."""
        transposed = is_transposed(route, modules)
        (rows, cols), (base_rows, base_cols) = _matrix(route, route.shape), _matrix(route, base)
        outputs, inputs = rows / base_rows, cols / base_cols
        if transposed:
            outputs, inputs = inputs, outputs
        if route.role in _OF_VOCABULARY and inputs != 1:
            outputs = 1.0  # of a role that the user gave: another vocabulary is no other width
        is_orthogonal = route.algorithm == "muon" and self.optimizer in _ORTHOGONAL
        try:
            return scale_factors(
                self.rule,
                "embedding" if route.role == TIED else route.role,
                outputs=outputs,
                inputs=inputs,
                pieces=_pieces(route, base) if is_orthogonal else (),
                is_transposed=transposed,
                adjust_lr_fn=adjust_lr_fn,
            )
        except ValueError as error:
            raise ValueError(f"scaling: {route.name} of shape {route.shape}, {base} in the base: {error}") from None


def _check_rows(route: Route, base: Shape, is_transposed: bool) -> None:
    """Check that an embedding or head has as many entries as in the base: they are no width, and no rule is for them.

    Raises:
        ValueError: it has others there.
    """
    dim = -1 if is_transposed else 0
    if route.shape[dim] != base[dim]:
        what = "columns" if is_transposed else "rows"
        raise ValueError(
            f"base: {route.name} has {base[dim]} {what} there and {route.shape[dim]} here, which are no width: give "
            "the base the model's own vocabulary, positions and classes"
        )


def _matrix(route: Route, shape: Shape) -> Matrix:
    """Return rows and columns of a parameter's matrix, of a stack those of one; of a vector its size twice."""
    if len(shape) < 2:
        return (prod(shape),) * 2
    if len(shape) > 2 and (route.flatten or route.role != "hidden"):
        return shape[0], prod(shape[1:])
    return shape[-2], shape[-1]


def _pieces(route: Route, base: Shape) -> list[tuple[Matrix, Matrix]]:
    """Return the matrices that Muon takes a parameter for, each with the base's: a head's rows, or in proportion."""
    whole, of_base = _matrix(route, route.shape), _matrix(route, base)
    if route.split is None:
        return [(whole, of_base)]
    sizes, dim = route.split
    ratio = 1.0 if route.is_by_head else whole[dim] / of_base[dim]
    pieces = []
    for size in sorted(set(sizes)):
        pair = [(size, whole[1]), (size / ratio, of_base[1])]
        pieces.append((pair[0], pair[1]) if dim == -2 else ((whole[0], size), (of_base[0], size / ratio)))
    return pieces


def _is_by_inputs(weight: torch.Tensor, inputs: float) -> bool:
    """Check whether a matrix was drawn as torch's nn.Linear draws it, uniformly within 1 / sqrt(inputs)."""
    if weight.ndim < 2:
        return False
    sizes = weight.detach().float()
    rms, largest = sizes.square().mean().sqrt().item(), sizes.abs().amax().item()
    return largest <= float(1.005 * inputs**-0.5) and abs(rms * (3 * inputs) ** 0.5 - 1) < 0.1
