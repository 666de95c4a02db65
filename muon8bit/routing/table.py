"""The groups with their table: where each parameter goes and why, totals, and what deserves a look."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .._text import collapse, counted, format_bytes, render, template
from ..config import DEFAULT_BLOCK_SIZE, Algorithm
from .rules import FUSED_FLAG, HEAD_FLAGS, Route

# Names of weights that usually hold three, or two, pieces of one size.
_THIRDS = re.compile(r"qkv|query_key_value|c_attn|W_pack|att_proj", re.IGNORECASE)
_HALVES = re.compile(r"gate_up|up_gate|gate_and_up|w1[23]|kv_proj|key_value", re.IGNORECASE)


_HEADER = ("parameter", "shape", "goes to", "lr", "decay", "state bytes", "why")


class ParamGroups(list[dict[str, Any]]):
    """Group dicts for `Muon8bit(groups, lr=...)`.

    `routes` has one Route per parameter, in the model's order, frozen ones included; `str()` is a table of them with
    repeated layers collapsed and totals below.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], routes: Sequence[Route]) -> None:
        super().__init__(groups)
        self.routes = tuple(routes)
        params = [param for group in self for _, param in group["params"]]  # optimizers replace the pairs by tensors
        self._num_bf16 = sum(param.dtype == torch.bfloat16 for param in params)
        own = {route.name: dict(route.options) for route in self.routes if dict(route.options).keys() - {"lr"}}
        is_8bit = any(g.get("adamw_bits") == 8 and any(name not in own for name, _ in g["params"]) for g in self)
        self._assumed = f"bits=8, block_size={DEFAULT_BLOCK_SIZE}" + ", adamw_bits=8" * is_8bit
        self._assumed += ", where no pattern says otherwise" * bool(own)

    def __str__(self) -> str:
        rows: dict[Route, list[Route]] = {}
        for route in self.routes:
            rows.setdefault(replace(route, name=template(route.name), aliases=()), []).append(route)
        header, cells, align = [*_HEADER], [[*_row(routes)] for routes in rows.values()], "<<<>>><"
        if any(route.scale for route in self.routes):
            header[5:5] = ["role: init, lr, decay x"]
            align = "<<<>><><"
            for row, route in zip(cells, rows, strict=True):
                row[5:5] = [_scale(route)]
        table = render(header, cells, align)
        totals = [line for kind in ("muon", "adamw", None) if (line := _total(self.routes, kind))]
        state = sum(route.state_bytes for route in self.routes)
        totals.append(f"state in all: {format_bytes(state)}, predicted for {self._assumed}")
        if self._num_bf16:
            totals.append(
                f"bfloat16 weights: {counted(self._num_bf16, 'tensor')}; rounded to nearest, they lose updates under "
                "half a unit in their last place: Muon8bit(groups, param_rounding='stochastic') keeps them"
            )
        num_flagged = sum(bool(route.flag) for route in self.routes)
        if num_flagged:
            totals.append(f"flagged with '!': {counted(num_flagged, 'tensor')}; `patterns` can reroute what is flagged")
            totals += [hint for routes in rows.values() if (hint := _hint(routes))]
        return "\n".join((table, "", *totals))


def _scale(route: Route) -> str:
    """Return a role and its factors of initialization, lr and weight decay: `hidden: 0.7071, 0.7071, 0.7071`."""
    scale = route.scale
    if scale is None:
        return "-"
    decay = scale.weight_decay if route.weight_decay else 1
    return f"{route.role}: {scale.init:.4g}, {scale.lr:.4g}, {decay:.4g}"


def _hint(routes: Sequence[Route]) -> str:
    """Return the pattern to paste for flagged weights that differ only in the numbers of their names, or nothing.

    It is for what may be a head, and for what looks fused: where the name tells how many pieces there usually are, it
    has their sizes.
    """
    route = routes[0]
    parts = [route.name.split(".") for route in routes]
    pattern = ".".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*parts, strict=True))
    if any(flag in route.flag for flag in HEAD_FLAGS):
        return f'if it is a head: patterns=[("{pattern}", "adamw")]'
    if FUSED_FLAG not in route.flag:
        return ""
    num_pieces = 3 if _THIRDS.search(route.name) else 2 if _HALVES.search(route.name) else 0
    dim = -2 if route.shape[-2] >= route.shape[-1] else -1
    if num_pieces and route.shape[dim] % num_pieces == 0:
        sizes, condition = str((route.shape[dim] // num_pieces,) * num_pieces), "if these are its pieces"
    else:
        sizes = "(k, v)" if num_pieces == 2 else "(q, k, v)"
        condition = f"with the sizes of its pieces, {route.shape[dim]} in all"
    keys = f'{{"split_sizes": {sizes}' + (', "split_dim": -1}' if dim == -1 else "}")
    return f'{condition}, one after the other: patterns=[("{pattern}", {keys})]'


def _row(routes: Sequence[Route]) -> tuple[str, ...]:
    """Return the cells of routes that differ only in the numbers of their names."""
    first, name = routes[0], collapse([route.name for route in routes])
    shape = " x ".join(map(str, first.shape)) or "scalar"
    if first.algorithm is None:
        return name, shape, "-", "-", "-", "-", "frozen: skipped"
    state = f"{sum(route.state_bytes for route in routes):,}"
    why = first.reason + (f" ! {first.flag}" if first.flag else "")
    return name, shape, first.algorithm, f"{float(first.lr):g}", f"{first.weight_decay:g}", state, why


def _total(routes: Sequence[Route], algorithm: Algorithm | None) -> str:
    """Return `muon: 84 tensors, 1,000 parameters, 1,002 B of state, 1.002 B per parameter`; empty for none."""
    chosen = [route for route in routes if route.algorithm == algorithm]
    if not chosen:
        return ""
    num_elements = sum(route.num_elements for route in chosen)
    line = f"{algorithm or 'frozen'}: {counted(len(chosen), 'tensor')}, {counted(num_elements, 'parameter')}"
    if algorithm is None or not num_elements:
        return line
    state = sum(route.state_bytes for route in chosen)
    return f"{line}, {format_bytes(state)} of state, {state / num_elements:.4f} B per parameter"
