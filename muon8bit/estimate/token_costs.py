"""Costs of one token: the parameters that it passes through, and the bytes that it leaves in the cache."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..routing.experts import is_stack, row_stack
from ..routing.lora import adapter_part
from .activations import fused_attention, reason, run_op, unlogged
from .classes import model_class, text_config

# What configurations call the number of routed experts that a token goes to.
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "experts_per_token")
# An expert in a list, as `mlp.experts.3.w1.weight` or `mlp.experts.expert_3.fc1.weight`.
_LISTED = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?:expert_)?\d+\.")
_TOKENS = 2


@dataclass(frozen=True)
class TokenCosts:
    """Costs of a token.

    Attributes:
        active_parameters: elements of the parameters that a token passes through, embeddings included: of routed
            experts those of as many as it goes to, everything else whole. None where the configuration does not say how
            many experts those are.
        cache_bytes: that a token leaves in all layers' keys and values, or latents, while text is generated, in the
            dtype of the model. None for a model that keeps none, and where that was not found out.
        notes: sentences on what is not in `cache_bytes`.
    """

    active_parameters: int | None
    cache_bytes: int | None
    notes: tuple[str, ...] = ()


def token_costs(meta_model: nn.Module, config: Any) -> TokenCosts:
    """Count what a token takes.

    Args:
        meta_model: of `models.build`; it is copied for a pass of two tokens that computes nothing.
        config: that it was built from.
    """
    active = active_parameters(meta_model, config)
    notes = () if active is not None else ("How many experts a token goes to is not in the configuration.",)
    if model_class(config).own:
        return TokenCosts(active, None, notes)
    try:
        layers = _cached_layers(meta_model)
    except Exception as error:  # whatever a model's own code meets
        return TokenCosts(active, None, (*notes, f"The cache of this model was not counted: {reason(error)}."))
    kept = [layer for layer in layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
    cached = sum(t.nbytes // t.shape[-2] for layer in kept for t in (layer.keys, layer.values) if t.numel())
    return TokenCosts(active, cached or None, notes + _cache_notes(layers, len(kept)))


def active_parameters(model: nn.Module, config: Any) -> int | None:
    """Return `TokenCosts.active_parameters`; an adapter over stacked experts counts as these do."""
    top_k = next((k for key in _TOP_K if type(k := getattr(text_config(config), key, None)) is int), None)
    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    active = 0
    for name, param in model.named_parameters():
        num_experts = _num_experts(name, tuple(param.shape), modules)
        if num_experts == 1:
            active += param.numel()
        elif top_k is None:
            return None
        else:
            active += param.numel() * min(top_k, num_experts) // num_experts
    return active


def _num_experts(name: str, shape: Sequence[int], modules: Mapping[str, nn.Module]) -> int:
    """Return among how many routed experts a parameter is divided; 1 for one that every token passes through."""
    part = adapter_part(name, modules)
    if part is not None:
        return part.num_experts
    if listed := _LISTED.match(name):
        return len(list(modules[listed["experts"]].children()))
    if is_stack(name, shape, modules):
        return shape[0]
    rows = row_stack(name, shape, modules)
    return 1 if rows is None else len(rows)


class _AnyDtype(TorchDispatchMode):
    """Lets fake tensors go through operations that they know for fewer dtypes than are computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_op(func, args, kwargs)


def _cached_layers(meta_model: nn.Module) -> list[Any]:
    """Return the layers of the cache that transformers makes for `_TOKENS` tokens of one sequence, of fake tensors."""
    model: Any = deepcopy(meta_model)
    with FakeTensorMode(), unlogged(), torch.no_grad():
        model.config._attn_implementation = fused_attention()
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        with _AnyDtype():
            out = model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device="cpu"), use_cache=True)
    return list(getattr(getattr(out, "past_key_values", None), "layers", ()))


def _cache_notes(layers: Sequence[Any], num_kept: int) -> tuple[str, ...]:
    notes = []
    windows = Counter(int(layer.sliding_window) for layer in layers if getattr(layer, "is_sliding", False))
    for window, count in sorted(windows.items()):
        notes.append(
            f"{count} of {len(layers)} layers attend to a window: of a longer text they keep {window - 1:,} tokens."
        )
    if 0 < num_kept < len(layers):
        notes.append(f"{len(layers) - num_kept} of {len(layers)} layers keep a state of fixed size, or none.")
    return tuple(notes)
