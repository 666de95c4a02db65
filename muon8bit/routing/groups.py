"""From a model to parameter groups: hidden matrices to Muon, all else to AdamW, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .._values import shown
from ..config import (
    ADJUST_LR,
    DEFAULT_ADAMW_BETAS,
    DEFAULT_ADAMW_BITS,
    DEFAULT_ADAMW_EPS,
    DEFAULT_BLOCK_SIZE,
    DEFAULT_ROUTING,
    DEFAULT_WEIGHT_DECAY,
    MIN_QUANTIZED_COLUMNS,
    ROUTINGS,
    AdjustLR,
    Bits,
    Routers,
    Routing,
    SplitHeads,
)
from ..report import ADAMW_BYTES, bnb_bytes
from ..step.options import SCALED_FOR_KEY
from .checks import check_any_matrix, check_arguments, check_ratio
from .heads_and_routers import check_heads, check_routers
from .patterns import Target
from .routes import route_all
from .rules import Route
from .scaling import Scaling
from .table import ParamGroups
from .width_rules import ScaleFactors


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = DEFAULT_WEIGHT_DECAY,
    adamw_lr: float | None = None,
    adjust_lr_fn: AdjustLR | None = "match_rms_adamw",
    adamw_betas: tuple[float, float] = DEFAULT_ADAMW_BETAS,
    adamw_eps: float = DEFAULT_ADAMW_EPS,
    adamw_bits: Bits = DEFAULT_ADAMW_BITS,
    patterns: Sequence[tuple[str, Target]] = (),
    no_decay: Sequence[str] = (),
    loraplus_ratio: float | None = None,
    routing: Routing = DEFAULT_ROUTING,
    split_heads: SplitHeads | None = None,
    routers: Routers = "adamw",
    scaling: Scaling | None = None,
) -> ParamGroups:
    """Return groups for `Muon8bit`, of a model whose parameters are routed by rules.

    2-D hidden weights and stacked experts go to Muon; embeddings, output head (tied or not), norms, biases, MoE
    routers, convolutions, other 1-D, 3-D and more to AdamW; frozen ones to none.

    LoRA as peft names it: factors A and B of hidden matrices to Muon, each a matrix of its own; those of embeddings,
    head, MoE routers and convolutions, B of stacked experts, DoRA magnitudes, biases, and the trained copies of
    embeddings and head (`modules_to_save`, `trainable_token_indices`) to AdamW.

    Fused weights whose layout is known go to groups with their `split_sizes` and `split_dim`: gate_up_proj of stacked
    experts, of Phi-3, Phi-4-multimodal and GLM; Phi-3's qkv_proj; GPT-2's and nanoGPT's c_attn; Linears called qkv,
    Wqkv or to_qkv by the heads or width that their module names; torch.nn.MultiheadAttention's in_proj_weight, and the
    gates of nn.LSTM and nn.GRU. Others that look fused are flagged, and the table shows a pattern to paste.

    Embeddings are nn.Embedding modules and what Hugging Face's `get_input_embeddings` gives. The head is what
    `get_output_embeddings` gives, a Linear that shares its weight with an embedding, or one named lm_head,
    score, classifier, ... outside the numbered layers. Without those methods (a plain nn.Sequential) it is
    the last Linear, if that has as many rows as the first embedding; without an embedding no head is assumed
    and the last Linear is flagged.

    Args:
        model: floating parameters of any dtype, on any device, meta included.
        lr: of the Muon group; RMS norm of one update over 0.2 (match_rms_adamw: an AdamW lr carries over), or
            spectral norm of one update (original; None means original, as in torch).
        weight_decay: per unit of lr; for matrices and embeddings. Norms, biases, DoRA magnitudes and other 1-D get 0.
        adamw_lr: of the AdamW groups. None: `lr`, which is right only with match_rms_adamw.
        adjust_lr_fn: how Muon scales lr by the matrix's shape, as in torch.optim.Muon.
        adamw_betas, adamw_eps: of the AdamW groups; defaults and their sources in `config`.
        adamw_bits: of the AdamW groups: 32, or 8, with which tensors of 4096 elements and more keep both moments in 8
            bits (needs bitsandbytes).
        patterns: `(pattern, target)`, fnmatch over the whole qualified name, case-sensitive; the first match wins.
            A target is "muon", "adamw", or a dict with any of these keys of a group: algorithm, lr; for Muon
            split_sizes, split_dim, flatten, bits, codebook, block_size; for AdamW adamw_bits. Without algorithm the
            parameter stays where the rules send it, and what has no meaning there is an error; `lr` is taken as it is,
            without `loraplus_ratio`; `split_sizes=None` takes a fused weight as one matrix.
            A tied tensor is matched by any of its names, and one of a wrapped model with the wrapper's prefix
            (`_orig_mod.`, `module.`) or without it. Patterns do not unfreeze. "muon" takes
            a convolution flattened, any other tensor of three or more dimensions as a stack over its last two.
        no_decay: patterns of further parameters whose weight decay is 0, Muon's too.
        loraplus_ratio: lr of every LoRA factor B over that of its A (LoRA+, where 16 is usual); None for equal ones.
            Not for an embedding's factors, of which A starts at zero, nor for biases and DoRA magnitudes.
        routing: the release whose rules say where parameters go, `"0.1"` or `"0.2"`, which is the newest.
        split_heads: cuts projections of multi-head latent attention (MLA: DeepSeek-V2 and V3, GLM4-MoE-Lite, Kimi) by
            head, and LoRA's B over them, by the sizes that the attention or its config names. `"head"`: q_b_proj, or
            q_proj where there is none, in blocks of qk_nope + qk_rope rows, kv_b_proj in blocks of qk_nope + v.
            `"head_kv"`: kv_b_proj in W_UK and W_UV of each head, blocks of qk_nope and of v rows. None: whole, and
            flagged. Attention of other kinds (MHA, GQA) is never cut by head: the authors of Gram Newton-Schulz report
            that it raised the loss there. A pattern with split_sizes comes first.
        routers: `"muon"` sends the matrices of MoE routers [experts, cols], and LoRA over them, to Muon; `"adamw"`,
            the default, keeps them. A gate of one row and `e_score_correction_bias` stay where they are.
        scaling: carries lr, adamw_lr and weight_decay, then those of its base's width, to the model's by the role of
            each parameter; the table shows factors. An lr of a pattern stays. None: they are the model's. At another
            width Muon groups say in `scaled_for` for which optimizer they are; others refuse them.

    Returns:
        ParamGroups: dicts in the order muon before adamw, without before with splits or flatten (each kind by first
        appearance), others before LoRA's raised B, decay before none; empty ones left out; `params` as (name,
        Parameter) pairs in the model's order, named as in the model that a wrapper holds. A tied tensor appears
        once, under its first name.

    Raises:
        TypeError: `model` is no module, or `scaling` no Scaling.
        ValueError: a value that an argument cannot have; adamw_lr missing with `original`; a pattern that matches
            nothing, sends a tensor of fewer than two dimensions to Muon, or gives keys that do not fit a parameter; a
            flattened or uninitialized weight; no matrix for Muon; loraplus_ratio without a factor B; split_heads
            without MLA, or with sizes that do not fill its rows; routers="muon" without a router; a scaling with the
            base of another model, a parameter whose role it does not know, an adapter, or a tied head without a norm.

    Source: which parameters are hidden: K. Jordan's Muon notes (2024) and Moonlight (arXiv 2502.16982); LoRA+:
    arXiv 2402.12354.
    """
    check_arguments(
        model,
        lr=lr,
        weight_decay=weight_decay,
        adamw_lr=adamw_lr,
        adamw_betas=adamw_betas,
        adamw_eps=adamw_eps,
        adamw_bits=adamw_bits,
        split_heads=split_heads,
        routers=routers,
    )
    if adjust_lr_fn is not None and adjust_lr_fn not in ADJUST_LR:
        raise ValueError(f"adjust_lr_fn is {adjust_lr_fn!r}; it must be one of {ADJUST_LR} or None")
    if adamw_lr is None and adjust_lr_fn != "match_rms_adamw":
        raise ValueError(
            f"adjust_lr_fn={adjust_lr_fn!r} makes lr the spectral norm of Muon's update, which an "
            "AdamW lr is not (usual values differ tenfold and more): give adamw_lr, or use "
            "adjust_lr_fn='match_rms_adamw'"
        )
    if routing not in ROUTINGS:
        raise ValueError(f"routing is {routing!r}; it must be one of {ROUTINGS}, the releases whose rules are known")
    routes, params = route_all(model, patterns, no_decay, routing, split_heads, routers)
    check_any_matrix(routes)
    check_heads(split_heads, routes)
    check_routers(routers, routes)
    check_ratio(loraplus_ratio, routes)
    if scaling is not None:
        if not isinstance(scaling, Scaling):
            raise TypeError(f"scaling must be None or a muon8bit.Scaling, not {shown(scaling)}")
        routes = scaling.scaled(model, routes, adjust_lr_fn)
    muon = {"algorithm": "muon", "lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": adjust_lr_fn}
    if scaling is not None and any(route.scale and route.scale.is_off_base for route in routes):
        muon[SCALED_FOR_KEY] = (scaling.optimizer, adjust_lr_fn)
    adamw = {"algorithm": "adamw", "lr": lr if adamw_lr is None else adamw_lr, "weight_decay": weight_decay}
    adamw |= {"betas": adamw_betas, "eps": adamw_eps, "adamw_bits": adamw_bits}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    done: list[Route] = []
    for route, param in zip(routes, params, strict=True):
        if route.algorithm is not None:
            keys, options = route.matrix_keys if route.algorithm == "muon" else {}, dict(route.options)
            is_raised = route.is_lora_b and loraplus_ratio is not None and "lr" not in options
            group = {**(muon if route.algorithm == "muon" else adamw), **keys, **options, "params": []}
            if is_raised:
                group["lr"] = group["lr"] * loraplus_ratio  # not in place: a tensor is that of all groups
                route = replace(route, reason=f"{route.reason}, lr x {loraplus_ratio:g} (LoRA+)")
            if not route.decays:
                group["weight_decay"] = 0.0
            factors = _scale(group, route.scale, has_lr="lr" in options)
            kind = (route.algorithm == "adamw", bool(keys), is_raised, bool(options), not route.decays)  # as documented
            group = groups.setdefault((*kind, *keys.items(), *options.items(), factors), group)
            group["params"].append((route.name, param))
            state = _predicted_bytes(route, adamw_bits)
            route = replace(route, lr=group["lr"], weight_decay=group["weight_decay"], state_bytes=state)
        done.append(route)
    return ParamGroups([groups[key] for key in sorted(groups, key=lambda key: key[:5])], done)


def _scale(group: dict[str, Any], scale: ScaleFactors | None, *, has_lr: bool) -> tuple[float, float]:
    """Multiply lr and weight decay of a new group by the factors of a scaling, and return these.

    An lr that a pattern gave stays; the decay by lr times weight decay is the rule's all the same.
    """
    if scale is None:
        return 1.0, 1.0
    rate, decay = (1.0, scale.lr * scale.weight_decay) if has_lr else (scale.lr, scale.weight_decay)
    if not group["weight_decay"]:
        decay = 1.0  # so that groups do not part by it
    if rate != 1:
        group["lr"] = group["lr"] * rate  # not in place: a tensor is that of all groups
    if decay != 1:
        group["weight_decay"] = group["weight_decay"] * decay
    return rate, decay


def _predicted_bytes(route: Route, adamw_bits: int) -> int:
    """Return the state bytes at the defaults and a pattern's own keys.

    They are codes, a scale per row and block; an fp32 buffer; or AdamW's two moments.
    """
    options: dict[str, int] = dict(route.options)
    if route.algorithm == "adamw":
        is_8bit = options.get("adamw_bits", adamw_bits) == 8
        return bnb_bytes(route.num_elements) if is_8bit else ADAMW_BYTES * route.num_elements
    first_of_row = 1 if route.flatten else len(route.shape) - 1
    rows, cols = math.prod(route.shape[:first_of_row]), math.prod(route.shape[first_of_row:])
    if cols < MIN_QUANTIZED_COLUMNS or options.get("bits", 8) == 32:
        return 4 * route.num_elements
    return route.num_elements + 4 * rows * math.ceil(cols / options.get("block_size", DEFAULT_BLOCK_SIZE))
