"""Latent attention cut by head, and MoE routers on Muon: `split_heads` and `routers` of `param_groups`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..config import MIN_QUANTIZED_COLUMNS, Routers, SplitHeads
from .fused import COPIES
from .lora import adapter_part
from .newer_rules import ROUTER
from .projections import HEADS
from .rules import FUSED_FLAG, LORA_ROUTER, NARROW_FLAG, Route, split_in_words

HEADS_FLAG = "could be split by head: split_heads='head'"
QUERIES_FLAG = "queries of this attention stay whole: no q_b_proj or q_proj"
# Names in transformers 5.23 (DeepSeek, GLM, Kimi, LongCat, MiniCPM3, ...), and in DeepSeek's own code. A module with a
# Linear for keys and values out of one latent is an MLA; its queries come from the first of these that it has.
_KEY_VALUE = ("kv_b_proj", "wkv_b")
_QUERY = ("q_b_proj", "wq_b", "q_proj", "wq")
_SIZES = {"nope": ("qk_nope_head_dim",), "rope": ("qk_rope_head_dim",), "v": ("v_head_dim",), "heads": HEADS}


def by_head(route: Route, modules: Mapping[str, nn.Module], split_heads: SplitHeads | None) -> Route:
    """Return the route of a projection of MLA, or of LoRA's B over one, cut by head; any other route as it is.

    Rows of a head: nope then rope of queries; nope then v of keys and values, which `"head_kv"` takes apart.

    Args:
        route: by the rules, of a parameter that is trained.
        modules: of the model, by path.
        split_heads: None flags the route and changes nothing else.

    Raises:
        ValueError: the module does not name its sizes, or they do not fill the rows; names the parameter.
    """
    target = _projection(route, modules)
    if target is None:
        return route
    attention, is_query = target
    sizes = {key: _size(attention, names) for key, names in _SIZES.items()}
    missing = [" or ".join(_SIZES[key][:2]) for key, size in sizes.items() if size is None]
    found = {key: size for key, size in sizes.items() if size is not None}
    if split_heads is None:
        is_known = not missing and sum(_head(found, is_query)) * found["heads"] == route.shape[0]
        return replace(route, flag=_flag(route.flag, HEADS_FLAG)) if is_known else route
    ways_out = "give its pieces by a pattern with split_sizes, or leave split_heads out"
    kind = type(attention).__name__
    if missing:
        raise ValueError(
            f"split_heads={split_heads!r} cannot cut {route.name}: its {kind} does not name {', '.join(missing)}, nor "
            f"does its config: {ways_out}"
        )
    head = _head(found, is_query)
    if sum(head) * found["heads"] != route.shape[0]:
        raise ValueError(
            f"split_heads={split_heads!r} cannot cut {route.name} of shape {route.shape}: its {kind} names "
            f"{found['heads']} heads of {' + '.join(map(str, head))} rows, {sum(head) * found['heads']} in all: "
            f"{ways_out}"
        )
    pieces = head if split_heads == "head_kv" and not is_query else (sum(head),)
    split = (tuple(size for size in pieces if size) * found["heads"], -2)
    more = "" if is_query or _child(attention, _QUERY) else QUERIES_FLAG
    reason = f"{route.reason}, by head{split_in_words(split)}"
    return replace(route, split=split, reason=reason, flag=_flag(route.flag, more), is_by_head=True)


def check_heads(split_heads: SplitHeads | None, routes: Sequence[Route]) -> None:
    """Raise ValueError if `split_heads` is asked for and cuts nothing."""
    if split_heads is None or any(route.is_by_head and route.algorithm == "muon" for route in routes):
        return
    raise ValueError(
        f"split_heads={split_heads!r}, but no MLA projections found among Muon's parameters: it cuts q_b_proj (or "
        "q_proj) and kv_b_proj of multi-head latent attention, as in DeepSeek-V3, and no attention of other kinds; "
        "leave split_heads out"
    )


def to_muon(route: Route, modules: Mapping[str, nn.Module]) -> Route:
    """Return the route of a router [experts, cols], or of its LoRA factors, as Muon's; any other as it is.

    Gates of one row, as of a shared expert, stay with AdamW, and so do biases and what is no parameter.
    """
    if route.reason not in (ROUTER, LORA_ROUTER) or len(route.shape) != 2 or min(route.shape) == 1:
        return route
    part = adapter_part(route.name, modules)
    if part is not None and getattr(part.layer, "out_features", 1) == 1:
        return route
    reason = ROUTER if part is None else f"LoRA {part.kind} of a {ROUTER}"
    flag = NARROW_FLAG if route.shape[-1] < MIN_QUANTIZED_COLUMNS else ""
    return replace(route, algorithm="muon", reason=reason, flag=flag, is_router=True)


def check_routers(routers: Routers, routes: Sequence[Route]) -> None:
    """Raise ValueError if routers are to go to Muon and none does."""
    if routers == "adamw" or any(route.is_router and route.algorithm == "muon" for route in routes):
        return
    raise ValueError(
        "routers='muon', but no trainable MoE router [experts, cols] found, as `mlp.gate.weight` of Qwen-MoE and "
        "DeepSeek: leave routers out, or send the router to 'muon' by `patterns`"
    )


def _projection(route: Route, modules: Mapping[str, nn.Module]) -> tuple[nn.Module, bool] | None:
    """Return the MLA whose projection a route is, and whether it makes queries; None for any other route."""
    if route.algorithm != "muon" or len(route.shape) != 2 or route.split is not None:
        return None
    path, _, local = route.name.rpartition(".")
    if part := adapter_part(route.name, modules):
        if part.kind != "B" or part.num_experts > 1:
            return None
        path, local = part.path, "weight"
    path, _, child = COPIES.sub("", path).rpartition(".")
    attention = modules.get(path)
    if local != "weight" or attention is None:
        return None
    query, key_value = (_child(attention, names) for names in (_QUERY, _KEY_VALUE))
    return (attention, child == query) if key_value and child in (query, key_value) else None


def _child(attention: nn.Module, names: Sequence[str]) -> str:
    """Return the first of these names that a module's child has; empty if there is none."""
    return next((name for name in names if isinstance(getattr(attention, name, None), nn.Module)), "")


def _size(attention: nn.Module, names: Sequence[str]) -> int | None:
    """Return the first of these sizes that a module names, or else its config; 0 is one, of a head without rope."""
    sources = (attention, getattr(attention, "config", None))
    values = (getattr(source, name, None) for source in sources for name in names)
    return next((value for value in values if type(value) is int and value >= 0), None)


def _head(sizes: Mapping[str, int], is_query: bool) -> tuple[int, int]:
    """Return the rows of one head: without and with positions, or of keys and values."""
    return sizes["nope"], sizes["rope" if is_query else "v"]


def _flag(flag: str, more: str) -> str:
    """Return a flag with another one in place of what looks fused."""
    kept = [part for part in flag.split("; ") if part and part != FUSED_FLAG]
    return "; ".join(filter(None, (*kept, more)))
