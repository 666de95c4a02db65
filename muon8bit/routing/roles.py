"""Roles of parameters in a rule of width transfer: by what routing has found, and by where the model ends."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .adapters import other_adapter
from .ends import Ends
from .linears import linear_shape
from .lora import is_adapter
from .newer_rules import ROUTER
from .rules import Route

# Beside `choices.SCALING_ROLES`, which users may give: a tensor that is embedding and head, the last norm before such a
# head, and a part of an adapter, for which there is no rule.
TIED, FINAL_NORM, ADAPTER = "tied embedding", "final norm", "adapter"
_LAYER = re.compile(r"(.*\.)?\d+(?=\.|$)")
_VECTORS = ("bias", "norm", "vector")
_TABLES = ("position table", "learned input", "bare parameter named like an embedding")


def role_of(
    route: Route, param: nn.Parameter, aliases: Sequence[str], modules: Mapping[str, nn.Module], ends: Ends
) -> str:
    """Return the role of a parameter by the rules, before any pattern; empty for one that they do not know.

    An embedding that a Linear shares, under one of its `aliases`, is a head too.
    """
    name, owner = route.name, modules[route.name.rpartition(".")[0]]
    if is_adapter(name) or route.is_adapter or other_adapter(name, modules) or "trainable_tokens_delta" in name:
        return ADAPTER
    is_shared = any(linear_shape(modules[alias.rpartition(".")[0]]) for alias in aliases)
    if param in ends.embeddings and (param in ends.heads or is_shared):
        return TIED
    if len(route.shape) < 2 or route.reason in _VECTORS:
        return "vector"
    if param in ends.heads or param in ends.embeddings:
        return "head" if param in ends.heads else "embedding"
    if route.reason == ROUTER:
        return "router"
    if route.reason.startswith(_TABLES):
        return "embedding"
    is_convolution = isinstance(owner, nn.modules.conv._ConvNd) and not isinstance(
        owner, nn.modules.conv._ConvTransposeNd
    )
    return "hidden" if route.algorithm == "muon" or is_convolution else ""


def is_transposed(route: Route, modules: Mapping[str, nn.Module]) -> bool:
    """Check whether a matrix is stored [inputs, outputs]: GPT-2's, and the experts of gpt-oss and Llama 4."""
    owner = modules[route.name.rpartition(".")[0]]
    if len(route.shape) == 2 and (shape := linear_shape(owner)):
        return shape != tuple(route.shape) and shape[::-1] == tuple(route.shape)
    return len(route.shape) == 3 and getattr(owner, "is_transposed", False) is True


def find_final_norm(routes: Sequence[Route], tied: Route, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the parameters of the norm whose result a tied head takes, weight and bias.

    It is the last norm of the embedding's width behind all hidden matrices, and in no layer that has some.

    Raises:
        ValueError: there is none, or its weight does not multiply, as Gemma's, which adds 1.
    """
    way_out = (
        "untie them (tie_word_embeddings false), or give roles=[(pattern, 'embedding')] for it and divide the "
        "logits by the ratio of widths"
    )
    owners = {r.name.rpartition(".")[0] for r in routes if r.shape == tied.shape[-1:]}
    norms = {path for path in owners if "norm" in type(modules[path]).__name__.lower()}
    hidden = [r.name for r in routes if r.role == "hidden"]
    last = max((i for i, r in enumerate(routes) if r.role == "hidden"), default=-1)
    paths = [p for r in routes[last + 1 :] if (p := r.name.rpartition(".")[0]) in norms and not _is_inside(p, hidden)]
    if not paths:
        raise ValueError(
            f"scaling: {tied.name} is embedding and head, whose rates follow the width differently, and no norm before "
            f"the head was found that could take the head's factor: {way_out}"
        )
    if not _is_multiplied(modules[paths[-1]], tied.shape[-1]):
        raise ValueError(
            f"scaling: {tied.name} is embedding and head, and the weight of {paths[-1]}, which would take the head's "
            f"factor, does not multiply what it gives: {way_out}"
        )
    return [r.name for r in routes if r.name.rpartition(".")[0] == paths[-1]]


def _is_inside(path: str, hidden: Sequence[str]) -> bool:
    """Check whether a module lies in a numbered layer that has hidden matrices."""
    layer = _LAYER.match(path)
    return layer is not None and any(name.startswith(f"{layer[0]}.") for name in hidden)


class _WithoutHooks(nn.Module):
    """A norm whose hooks are not called: those of FSDP2 want the whole model to run."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: torch.Tensor) -> object:
        """Return what the norm gives."""
        return self.norm.forward(hidden)


def _is_multiplied(norm: nn.Module, size: int) -> bool:
    """Check whether a norm with its parameters at 0 gives 0; none of its own parameters is read."""
    zeros = {f"norm.{name}": torch.zeros(param.shape) for name, param in norm.named_parameters()}
    given = torch.func.functional_call(_WithoutHooks(norm), zeros, (torch.arange(1.0, size + 1).unsqueeze(0),))
    return isinstance(given, torch.Tensor) and not given.any()
