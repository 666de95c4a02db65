"""From a model to one route for each parameter: the rules, then what the user asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .._text import unwrapper
from ..config import Routers, Routing, SplitHeads
from ..step.dense import is_fake
from .ends import find_ends
from .heads_and_routers import by_head, to_muon
from .outputs import add_outputs
from .patterns import Target, overridden, read_patterns, warn_of_shadowed
from .roles import role_of
from .rules import Route, check_whole, default_route


def route_all(
    model: nn.Module,
    patterns: Sequence[tuple[str, Target]],
    no_decay: Sequence[str],
    routing: Routing,
    split_heads: SplitHeads | None,
    routers: Routers,
) -> tuple[list[Route], list[nn.Parameter]]:
    """Return one route per distinct parameter with the patterns applied, and the parameters in the same order."""
    named = list(model.named_parameters(remove_duplicate=False))
    unwrapped = unwrapper(name for name, _ in named)
    names: dict[nn.Parameter, list[str]] = {}
    wrapped: dict[nn.Parameter, list[str]] = {}  # a pattern may name a parameter either way
    for name, param in named:
        names.setdefault(param, []).append(unwrapped(name))
        wrapped.setdefault(param, []).append(name)
    all_names = [*(unwrapped(name) for name, _ in named), *(name for name, _ in named)]
    asked, used = read_patterns(patterns, no_decay, all_names), set[str]()
    modules = {unwrapped(path): module for path, module in model.named_modules(remove_duplicate=False)}  # inner last
    ends, routes = find_ends(model, routing), []
    if routing != "0.1":
        add_outputs(model, ends)
    owners: dict[tuple[Any, ...], str] = {}  # of memory: peft ties adapters by parameters that are views of each other
    for param, (name, *aliases) in names.items():
        check_whole(name, param, modules[name.rpartition(".")[0]])
        route = default_route(name, param, modules, ends)
        route = replace(route, role=role_of(route, param, aliases, modules, ends))
        of_param = (name, *aliases, *wrapped[param])
        pattern, keys = next(
            (pair for pair in asked if any(fnmatchcase(alias, pair[0]) for alias in of_param)), ("", {})
        )
        if param.requires_grad:
            route = to_muon(route, modules) if routers == "muon" else route
            route = route if "split_sizes" in keys else by_head(route, modules, split_heads)
        if pattern:
            route = overridden(route, pattern, keys)
            used.add(pattern)
        if route.decays and any(fnmatchcase(alias, pattern) for alias in of_param for pattern in no_decay):
            route = replace(route, decays=False, reason=f"{route.reason}, no decay as asked")
        if not param.requires_grad:
            route = replace(route, algorithm=None, reason="frozen", flag="")
        elif param.numel() and not is_fake(param) and param.data_ptr():
            owner = owners.setdefault((param.device, param.data_ptr()), name)
            if owner != name:
                twice = f"shares its memory with {owner}: both are updated"
                route = replace(route, flag="; ".join(filter(None, (route.flag, twice))))
        if aliases:
            route = replace(route, aliases=tuple(aliases), reason=f"{route.reason}, shared with {', '.join(aliases)}")
        routes.append(route)
    warn_of_shadowed((pattern for pattern, _ in asked), used)
    return routes, list(names)
