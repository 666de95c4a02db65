"""Fused weights whose pieces their own modules tell, since 0.2: q, k, v in one Linear, and torch's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from .fused import COPIES, Split, known_split

# Linears that hold all rows of q, then of k, then of v: so all 42 attentions of transformers 5.23 with one of these
# names do, timm's, flash-attn's and lucidrains'. Others alternate head by head: `qkv_proj` (CodeGen, MiniMax),
# `query_key_value` (GPT-NeoX, Bloom), `wqkv` (InternLM2).
_STACKED = {"qkv", "Wqkv", "to_qkv"}
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_KV_HEADS = (
    *("num_kv_heads", "num_key_value_heads", "num_heads_kv", "n_kv_heads", "n_kv_head", "kv_heads"),
    *("num_query_groups", "n_query_groups"),
)
_HEAD_DIM = ("head_dim", "head_size", "dim_head", "d_head")
_WIDTHS = (
    "embed_dim",
    "dim",
    "n_embd",
    "d_model",
    "hidden_size",
    "dim_out",
    "hidden_size_output",
    "inner_dim",
    "attn_dim",
)


def split_of(name: str, shape: Sequence[int], modules: Mapping[str, nn.Module], *, is_told: bool) -> Split | None:
    """Return the pieces of a fused weight whose layout is known; None for any other.

    Args:
        name: qualified name of the parameter, a key of `modules` before its last dot.
        shape: [rows, cols], or [experts, rows, cols].
        is_told: also by what its modules say of their sizes, a rule of 0.2.

    Returns:
        Their sizes in elements, which fill dimension -2 or -1, and that dimension.
    """
    split = known_split(name, shape, modules)
    if split is not None or not is_told or len(shape) != 2:
        return split
    path, _, local = name.rpartition(".")
    owner = modules.get(path)
    if local == "in_proj_weight" or local.startswith(("weight_ih", "weight_hh")):
        return None if owner is None else layer_split(owner, shape[0])
    path, _, module = COPIES.sub("", path).rpartition(".")
    parent = modules.get(path)
    if local != "weight" or parent is None:
        return None
    if module == "c_attn":
        return _c_attn_split(parent, shape)
    return _qkv_split(parent, shape) if module in _STACKED else None


def layer_split(layer: nn.Module, num_rows: int) -> Split | None:
    """Return the pieces of the fused weights of torch's own layers: q, k, v of attention, gates of LSTM and GRU."""
    size = 0
    if isinstance(layer, nn.MultiheadAttention):
        size = int(layer.embed_dim)
    elif isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        size = int(layer.hidden_size)
    is_fused = size > 0 and num_rows % size == 0 and num_rows > size
    return ((size,) * (num_rows // size), -2) if is_fused else None


def _c_attn_split(attention: nn.Module, shape: Sequence[int]) -> Split | None:
    """Return the pieces of nanoGPT's Linear, by its `n_embd`, and of a Conv1D, by the `split_size` that it is cut by.

    A Linear of this name alternates head by head in GPTBigCode, which has no `n_embd`.
    """
    size, rows = getattr(attention, "n_embd", None), shape[0]
    if type(size) is int and rows == 3 * size:
        return (size,) * 3, -2
    size, cols = getattr(attention, "split_size", None), shape[1]
    if type(getattr(attention, "c_attn", None)).__name__ == "Conv1D" and type(size) is int and cols == 3 * size:
        return (size,) * 3, -1
    return None


def _qkv_split(attention: nn.Module, shape: Sequence[int]) -> Split | None:
    """Return q's, k's and v's rows, as the heads or a width that the module names tell; None if none of them fits."""
    rows, cols = shape
    heads, kv_heads, head_dim = (_read(attention, names) for names in (HEADS, _KV_HEADS, _HEAD_DIM))
    if heads and kv_heads:
        head_dim = head_dim or rows // (heads + 2 * kv_heads)
        sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        return (sizes, -2) if sum(sizes) == rows else None
    widths = {cols, heads * head_dim, *(getattr(attention, name, None) for name in _WIDTHS)}
    return ((rows // 3,) * 3, -2) if rows % 3 == 0 and rows // 3 in widths else None


def _read(module: nn.Module, names: Sequence[str]) -> int:
    """Return the first of these sizes that a module has, or its config; 0 if there is none."""
    for source in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(source, name, None)
            if type(value) is int and value > 0:
                return value
    return 0
