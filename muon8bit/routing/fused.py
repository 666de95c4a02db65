"""Weights that hold several matrices: those whose layout is known, and those that only look so."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import nn

from .linears import linear_shape, siblings

Split: TypeAlias = tuple[tuple[int, ...], int]  # sizes of the pieces, and the dimension of the matrix they lie along

# One tensor that holds several matrices: in Phi-3, GPT-2, GPT-NeoX, Falcon, InternLM, Baichuan, OLMo,
# DeepSeek, Mamba, nn.MultiheadAttention, nn.LSTM.
_FUSED = re.compile(
    r"(^|\.)(\w*qkv\w*|\w*query_key_value|c_attn|W_pack|att_proj|kv_proj|kv_a_proj_with_mqa|kv_b_proj|key_value"
    r"|gate_up_proj|up_gate_proj|gate_and_up_proj|w13|w12|in_proj(_weight|_ba)?|weight_(ih|hh)(_l\d+\w*)?)(\.|$)",
    re.IGNORECASE,
)
_ATTENTION = re.compile(r"(^|\.)\w*(attn|attention)\w*\.")
_SINGLE_PROJECTION = re.compile(
    r"(^|\.)([qkvo]|(w?[qkvo]|query|key|value|out|o)(_\w+)?|\w*_[qkvo])(\.|$)", re.IGNORECASE
)
# peft's names between a module and the weight that stands for its own.
COPIES = re.compile(r"(\.(base_layer|original_module|modules_to_save\.\w+))+$")
# Layouts as read in transformers 5.23: the class (or a base of it) around the Linear or Conv1D.
_PHI_ATTENTIONS = {"Phi3Attention", "Phi4MultimodalAttention"}  # rows of all query, key, then value heads
_PHI_MLPS = {"Phi3MLP", "Phi4MultimodalMLP", "GlmMLP", "Glm4MLP"}  # rows of the gate, then of the up projection
_GPT2_ATTENTIONS = {"GPT2Attention", "DecisionTransformerGPT2Attention"}  # Conv1D, [in, out]: columns


def known_split(name: str, shape: Sequence[int], modules: Mapping[str, nn.Module]) -> Split | None:
    """Return the pieces of a fused weight whose layout is known from its modules; None for any other.

    Args:
        name: qualified name of the parameter, a key of `modules` before its last dot.
        shape: [rows, cols], or [experts, rows, cols].

    Returns:
        Their sizes in elements, which fill dimension -2 or -1, and that dimension.
    """
    path, _, local = name.rpartition(".")
    if len(shape) == 3:
        return _experts_split(modules[path], shape) if local == "gate_up_proj" else None
    parent_path, _, module = COPIES.sub("", path).rpartition(".")
    parent = modules.get(parent_path)
    classes = {base.__name__ for base in type(parent).__mro__}
    sizes, dim = [0], -2
    if local == "weight" and module == "qkv_proj" and classes & _PHI_ATTENTIONS:
        config, head_dim = getattr(parent, "config", None), getattr(parent, "head_dim", 0)
        heads = [getattr(config, f"num_{kind}_heads", 0) for kind in ("attention", "key_value", "key_value")]
        sizes = [head_dim * count for count in heads]
    elif local == "weight" and module == "gate_up_proj" and classes & _PHI_MLPS:
        sizes = [shape[0] // 2] * 2
    elif local == "weight" and module == "c_attn" and classes & _GPT2_ATTENTIONS:
        sizes, dim = [shape[0]] * (shape[1] // shape[0]), -1
    return (tuple(sizes), dim) if sum(sizes) == shape[dim] else None


def _experts_split(experts: nn.Module, shape: Sequence[int]) -> Split | None:
    """Return the halves of `gate_up_proj` [experts, ...] along the dimension that `down_proj` tells.

    None where gate and up alternate (gpt-oss) or the module does not say that they are concatenated.
    """
    if not getattr(experts, "is_concatenated", type(experts).__name__ == "Llama4TextExperts"):
        return None
    down = tuple(getattr(getattr(experts, "down_proj", None), "shape", ()))
    rows, cols = shape[1:]
    for dim, halved in ((-2, (cols, rows // 2)), (-1, (cols // 2, rows))):
        if shape[dim] % 2 == 0 and down[1:] == halved:
            return (shape[dim] // 2,) * 2, dim
    return None


def looks_fused(name: str, shape: Sequence[int]) -> bool:
    """Return whether the matrix [rows, cols] holds several, by its name or, in attention, by sides of 1:3."""
    if _FUSED.search(name):
        return True
    attention = _ATTENTION.search(name)
    is_single = attention is not None and _SINGLE_PROJECTION.search(name[attention.end() :])
    return attention is not None and not is_single and max(shape) == 3 * min(shape)


def holds_twice(name: str, shape: Sequence[int], modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a Linear gives twice what a module beside it takes: query and gate, or gate and up projections.

    So that the second one takes the first one's result, it must also give vectors of the size that the first takes.
    """
    path, _, local = name.rpartition(".")
    path = COPIES.sub("", path)
    own = linear_shape(modules.get(path))
    if len(shape) == 3:
        owner = modules[name.rpartition(".")[0]]
        pairs = [tuple(t.shape[1:]) for key, t in owner.named_parameters(recurse=False) if t.ndim == 3 and key != local]
        return any(shape[1:] in ((2 * b, a), (b, 2 * a)) for a, b in pairs)
    if own is None or local != "weight":
        return False
    others = [other for module in siblings(path, modules) if (other := linear_shape(module))]
    return (own[1], own[0] // 2) in others and own[0] % 2 == 0 and not any(own[0] == taken for _, taken in others)
