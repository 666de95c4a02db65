"""Rules that tell by modules, names and shapes what a parameter is (embedding, head, router, ...), and its route."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .._text import in_pieces
from ..config import MIN_QUANTIZED_COLUMNS, Algorithm
from .ends import Ends
from .experts import is_router
from .fused import Split, holds_twice, looks_fused
from .lora import Part, adapter_part, factor_split, looks_fused_factor
from .newer_rules import ROUTER, Role, newer_role
from .projections import split_of
from .width_rules import ScaleFactors

# Stacked experts [experts, rows, cols] as transformers 5 keeps them, in Mixtral, Qwen-MoE, DeepSeek, gpt-oss, Llama 4.
_EXPERTS = re.compile(r"(^|\.)experts\.")
LORA_ROUTER = f"LoRA of a {ROUTER}"
FUSED_FLAG = "looks fused: orthogonalized as one matrix"
HEAD_FLAGS = "last Linear of the model: is it the head?", "nothing in the model takes its result: is it a head?"
NARROW_FLAG = f"under {MIN_QUANTIZED_COLUMNS} columns: momentum stays fp32"


@dataclass(frozen=True)
class Route:
    """Route of one parameter: where it goes and why.

    `algorithm` None means frozen, in no group; `flag` says what to look at, or is empty; `decays` tells the
    AdamW groups apart; `lr` as in the group; `weight_decay` per unit of lr; `state_bytes` predicted for
    bits=8 and block_size 2048; `aliases` are the further names of a shared tensor. `split` (sizes of the pieces and
    their dimension) and `flatten` say which matrices Muon takes it for; without them it is one, or a stack.
    `is_lora_b`: the factor of LoRA that starts at zero, whose lr LoRA+ raises.
    `is_adapter`: part of an adapter other than LoRA. `is_by_head`: cut by heads of attention. `is_router`: a MoE router
    that Muon trains. `options` are further keys of its group that a pattern gave. `role` is by the rules, for a
    scaling, and `scale` what that makes of it; None without one.
    """

    name: str
    shape: tuple[int, ...]
    algorithm: Algorithm | None
    reason: str
    flag: str
    decays: bool
    lr: float = 0.0
    weight_decay: float = 0.0
    state_bytes: int = 0
    aliases: tuple[str, ...] = ()
    split: Split | None = None
    flatten: bool = False
    is_lora_b: bool = False
    is_adapter: bool = False
    is_by_head: bool = False
    is_router: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    role: str = ""
    scale: ScaleFactors | None = None

    @property
    def matrix_keys(self) -> dict[str, Any]:
        """Keys of a Muon group that say so; empty at their defaults."""
        keys: dict[str, Any] = {"flatten": True} if self.flatten else {}
        return keys if self.split is None else {**keys, "split_sizes": self.split[0], "split_dim": self.split[1]}

    @property
    def num_elements(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)


def default_route(name: str, param: nn.Parameter, modules: Mapping[str, nn.Module], ends: Ends) -> Route:
    """Return the default route: the first rule that applies, of those that `ends.routing` has."""
    if ends.routing != "0.1" and (role := newer_role(name, param, modules, ends)):
        return _route_of(role, name, param, modules, ends)
    path, _, local = name.rpartition(".")
    shape, is_norm = tuple(param.shape), "norm" in type(modules[path]).__name__.lower()

    def adamw(reason: str, *, decays: bool = True, flag: str = "") -> Route:
        return Route(name, shape, "adamw", reason, flag, decays)

    if local.lower().endswith("bias"):  # stacked experts have 2-D ones
        return adamw("bias", decays=False)
    if part := adapter_part(name, modules):
        return _adapter_route(name, shape, part, modules, ends)
    if is_norm or len(shape) < 2:
        return adamw("norm" if is_norm else f"{len(shape)}-D", decays=False)
    if local == "A_log" or getattr(param, "_no_weight_decay", False):  # Mamba's decay rates: 2-D, but no matrix
        return adamw("no matrix (A_log, _no_weight_decay)", decays=False)
    if end := ends.embeddings.get(param) or ends.heads.get(param):
        return adamw(end)
    if "trainable_tokens_delta" in name:  # of peft, beside a module that no getter returns
        return adamw("rows of an embedding")
    if is_router(name, modules):
        return adamw(ROUTER)
    if isinstance(modules[path], nn.modules.conv._ConvNd):
        return replace(adamw("convolution: a pattern sends it to Muon, flattened"), flatten=True)
    is_stack = len(shape) == 3 and _EXPERTS.search(name) is not None
    if len(shape) > 2 and not is_stack:
        return adamw(f"{len(shape)}-D", flag="no known stack: a pattern sends it to Muon as matrices over the last two")
    is_bare = not (is_stack or local.endswith("weight"))
    if is_bare and re.search(r"emb|token", local):
        return adamw("bare parameter named like an embedding")
    if is_bare and min(shape) == 1:  # IA3's factors
        return adamw("one row or column", decays=False)
    reason = "stacked experts" if is_stack else "hidden matrix"
    flag = "bare parameter: taken for a matrix that multiplies" if is_bare else ""
    return _route_of(Role("muon", reason, flag), name, param, modules, ends)


def _route_of(role: Role, name: str, param: nn.Parameter, modules: Mapping[str, nn.Module], ends: Ends) -> Route:
    """Return the route of a role; Muon's with the split that is known, and with what is to be looked at."""
    shape = tuple(param.shape)
    if role.algorithm == "adamw":
        return Route(name, shape, "adamw", role.reason, role.flag, role.decays, is_adapter=role.is_adapter)
    split = role.split or split_of(name, shape, modules, is_told=ends.routing != "0.1")
    is_fused = split is None and (looks_fused(name, shape[-2:]) or holds_twice(name, shape, modules))
    flags = {
        FUSED_FLAG: is_fused,
        NARROW_FLAG: shape[-1] < MIN_QUANTIZED_COLUMNS,
        role.flag: bool(role.flag),
        HEAD_FLAGS[0]: param is ends.doubtful,
        HEAD_FLAGS[1]: param in ends.sinks and param is not ends.doubtful and split is None,
    }
    flag = "; ".join(flag for flag, is_set in flags.items() if is_set)
    return Route(
        name, shape, "muon", role.reason + split_in_words(split), flag, True, split=split, is_adapter=role.is_adapter
    )


def _adapter_route(
    name: str, shape: tuple[int, ...], part: Part, modules: Mapping[str, nn.Module], ends: Ends
) -> Route:
    """Return the route of a part of a LoRA adapter.

    Factors A and B of hidden matrices go to Muon, each a matrix of its own.
    """

    def adamw(reason: str, *, decays: bool = True, flag: str = "") -> Route:
        return Route(name, shape, "adamw", reason, flag, decays, is_lora_b=part.kind == "B")

    if part.kind == "magnitude_vector":
        return adamw("DoRA magnitude", decays=False)
    if part.kind in ("embedding_A", "embedding_B"):  # A has a column for each token, seldom with a gradient
        return adamw("LoRA of an embedding")
    if part.kind not in ("A", "B"):  # AdaLoRA's singular values [r, 1] and other diagonals
        return adamw(f"lora_{part.kind}: no matrix", decays=False)
    if part.base is not None and (end := ends.heads.get(part.base) or ends.embeddings.get(part.base)):
        return adamw(f"LoRA of the {end}")
    if is_router(name, modules):
        return adamw(LORA_ROUTER)
    if len(shape) != 2:
        return replace(adamw("LoRA of a convolution: a pattern sends it to Muon, flattened"), flatten=True)
    if part.kind == "B" and part.num_experts > 1:
        return adamw("LoRA B of stacked experts", flag="the experts' columns alternate: Muon would take them as one")
    split = factor_split(part, shape, modules, is_told=ends.routing != "0.1")
    flags = {
        FUSED_FLAG: split is None and looks_fused_factor(part, shape),
        NARROW_FLAG: shape[-1] < MIN_QUANTIZED_COLUMNS,
    }
    flag = "; ".join(flag for flag, is_set in flags.items() if is_set)
    reason = f"LoRA {part.kind}{split_in_words(split)}"
    return Route(name, shape, "muon", reason, flag, True, split=split, is_lora_b=part.kind == "B")


def split_in_words(split: Split | None) -> str:
    """Return `, split 16 + 8 + 8 along -2`, as `in_pieces` has it; empty for None."""
    return "" if split is None else f", split {in_pieces(split[0])} along {split[1]}"


def check_whole(name: str, param: nn.Parameter, owner: nn.Module) -> None:
    """Raise ValueError if the parameter has no shape yet or is a flattened shard of something larger."""
    if isinstance(param, nn.parameter.UninitializedParameter):
        raise ValueError(f"{name} is not initialized yet: run one forward pass of the model before routing it")
    is_flat_matrix = isinstance(owner, (nn.Linear, nn.Embedding)) and name.endswith("weight") and param.ndim < 2
    if param.requires_grad and (is_flat_matrix or name.endswith("_flat_param")):
        raise ValueError(
            f"{name} of shape {tuple(param.shape)} is a flattened matrix, as FSDP1 and DeepSpeed ZeRO-3 make "
            "them; Muon needs whole matrices: train with DDP, which leaves them whole"
        )
