"""Output heads and tables that no getter returns: by sizes, by place, and by what takes their result."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from .adapters import other_adapter
from .ends import WRAPPERS, Ends
from .linears import Flow, linear_shape, weight_of
from .lora import is_adapter

Linear: TypeAlias = tuple[str, Tensor, tuple[int, int]]  # path, weight, (size that it gives, size that it takes)

# A component of a path that means an output: of a language model, a classifier, a detector, a speech model.
_WORD = re.compile(
    r"(^|_)heads?(_|$)|logits?(_|$)|classif|predict|(^|_)score|(^|_)cls(_|$)|(class|bbox|box|label)_embed|vocab|unembed"
    r"|output_proj|prob_out|feat_out|qa_outputs|lm_out|^seq_relationship$",
    re.IGNORECASE,
)
# Leaves that mean one at the end of a user's own model.
_OWN_WORD = re.compile(
    r"^(fc\w*|out|outputs?|output_\w+|final\w*|last\w*|to_(logits|out|rgb|pixels|classes|patch\w*)|\w+_out|decoder|generator|cls|proj_out|linear_out|readout"
    r"|\w*out_proj|top|policy|value|q_values?|actor|critic)$",
    re.IGNORECASE,
)
_OUT = re.compile(r"(^|\.)(out|output)$")
_ATTENTION = re.compile(
    r"attn|attention|(multi|_)head_|talking|pos_head|points?_head|ada_?ln|modulation", re.IGNORECASE
)
_PROJECTION = re.compile(
    r"^(w?[qkv]|(to_)?(q|k|v|qk|kv|qkv)|(query|key|value|[qkv])(_(proj|lin|linear|layer|a_proj|b_proj))?)$"
)
# Keys of configs that count what an output has a row for.
_SIZE_KEY = re.compile(r"vocab|^n(um)?_\w*(labels|classes)$|codebook_size$|^num_answers$", re.IGNORECASE)
POSITIONS = re.compile(
    r"(^|[._])(w?pos|wpe|position(al|s)?|rel(ative)?_?pos\w*|a?pe)([._]|$|emb|enc)|rel(ative)?_pos|posemb|timestep"
    r"|time_emb|emb(ed\w*)?_rel(ative)?(_|$)|(^|[._])(rel(ative)?_\w*|(row|col(umn)?|temporal|spatial|frame)_)emb",
    re.I,
)


def add_outputs(model: nn.Module, ends: Ends) -> None:
    """Add to `ends` tables of other classes than nn.Embedding, Linears that stand for a table, and output heads.

    A Linear is a head where nothing near it takes its result, and either its name or place says so, or its rows are as
    many as those of a vocabulary, of labels or of a codebook. Of a model that is not Hugging Face's, the last Linear
    is one by its name, else `ends.doubtful`.
    """
    modules = {WRAPPERS.sub("", path): module for path, module in model.named_modules(remove_duplicate=False)}
    for module in modules.values():
        table = module._parameters.get("weight")
        if table is not None and "embedding" in type(module).__name__.lower() and linear_shape(module) is None:
            ends.embeddings.setdefault(table, "embedding, by its class")
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            ends.heads.update(dict.fromkeys(module.parameters(), "output head, adaptive softmax"))
    tables = {weight_of(m) for p, m in modules.items() if isinstance(m, nn.Embedding) and not POSITIONS.search(p)}
    tokens = {table.shape[0] for table in tables if table is not None} | set(_config_sizes(modules, ("vocab",)))
    sizes = tokens | set(_config_sizes(modules, ("",)))
    dims = {table.shape[1] for table in tables if table is not None and table.ndim == 2}
    flow = Flow(modules)
    linears = list(_linears(model))
    for path, weight, (rows, cols) in linears:
        if weight in ends.heads or weight in ends.embeddings or _is_attention(path, flow):
            continue
        if reason := _why_head(path, rows, cols, sizes, flow):
            ends.heads[weight] = reason
        elif not _scope(path)[1] and cols in tokens - dims and cols > rows and not flow.is_given(path, cols):
            ends.embeddings[weight] = "table: a column for each token"
        elif not _scope(path)[1] and not flow.leads_on(path, rows):
            ends.sinks.add(weight)
    _find_last(modules, linears, ends, flow)


def _linears(model: nn.Module) -> Iterator[Linear]:
    """Yield the Linears that belong to no adapter, those that an adapter wraps or copies under the first one's path."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        shape, weight, name = linear_shape(module), weight_of(module), f"{path}.weight"
        if shape and weight is not None and not is_adapter(name) and other_adapter(name, modules) is None:
            yield WRAPPERS.sub("", path), weight, shape


def _why_head(path: str, rows: int, cols: int, sizes: set[int], flow: Flow) -> str:
    """Say why the Linear at `path` is an output head; empty if it is none.

    Inside numbered layers the word must stand beside the numbers.
    """
    outer, inner = _scope(path)
    is_named = any(map(_WORD.search, (*outer[-1:], *inner[-2:]) if inner else outer))
    is_named |= flow.is_top(path) and any(map(_OWN_WORD.search, outer[-1:])) and not flow.leads_on(path, rows)
    is_sized = rows in sizes and (is_named or not flow.takes(rows, by_scores=False))
    is_taken = flow.is_taken(path, rows, any_order=rows == cols)
    if is_sized and not flow.is_taken(path, rows, any_order=rows == cols, by_scores=False):
        return f"output head: {rows:,} rows, as a vocabulary, labels or a codebook has"
    parent = path.rpartition(".")[0]
    if rows in sizes and not inner and _OUT.search(path) and not (parent and flow.is_taken(parent, rows)):
        return f"output head, by its name and {rows:,} rows"
    is_placed = is_named and (not inner or _WORD.search(outer[-1]) is not None)
    return "output head, by its name and place" if is_placed and not is_taken else ""


def _is_attention(path: str, flow: Flow) -> bool:
    """Return whether the Linear at `path` is a projection of attention, or makes what modulates another layer.

    Directly in the model a `value` is one only beside another projection.
    """
    parts = path.split(".")
    if _PROJECTION.search(parts[-1]):
        return not flow.is_top(path) or any(map(_PROJECTION.search, flow.beside(path)))
    words = [part for part in parts if not part.isdigit()]
    is_numbered = parts[-1].isdigit() and any(re.search("attn|attention", word) for word in words[-2:])
    return is_numbered or any(map(_ATTENTION.search, parts[-2:]))


def _scope(path: str) -> tuple[list[str], list[str]]:
    """Split a path into its components before the first number, and those after the last inside a numbered layer."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return parts, []
    return parts[: numbers[0]], parts[numbers[-1] + 1 :] or ([] if len(numbers) == 1 else parts[numbers[-1] - 1 :])


def _find_last(modules: Mapping[str, nn.Module], linears: Sequence[Linear], ends: Ends, flow: Flow) -> None:
    """Find the last Linear that lies in no model of Hugging Face's: a head by its name, else doubtful."""
    inside = [path for path, module in modules.items() if hasattr(module, "get_output_embeddings")]
    own = [linear for linear in linears if not any(f"{linear[0]}.".startswith(f"{at}.") for at in inside)]
    if "" in inside or not own:
        return
    last, weight, _ = own[-1]
    has_head = any(own_weight in ends.heads for _, own_weight, _ in own)
    for path, own_weight, (rows, _) in own:
        outer, inner = _scope(path)
        is_named = not inner and not _is_attention(path, flow) and any(map(_OWN_WORD.search, outer[-2:]))
        if is_named and not flow.is_taken(path, rows) and (not flow.takes(rows) or (path == last and not has_head)):
            ends.heads.setdefault(own_weight, "output head, by its name and place")
    if weight in ends.heads or weight in ends.embeddings:
        ends.doubtful = None
    elif not (_scope(last)[1] and any(own_weight in ends.heads for _, own_weight, _ in own)):
        ends.doubtful = weight


def _config_sizes(modules: Mapping[str, nn.Module], words: tuple[str, ...]) -> Iterator[int]:
    """Yield the sizes that the configs of all modules name, nested ones included, under keys that hold a word."""
    seen: set[int] = set()
    todo: list[Any] = [getattr(module, "config", None) for module in modules.values()]
    while todo:
        config = todo.pop()
        values = config if isinstance(config, dict) else getattr(config, "__dict__", None)
        if values is None or id(config) in seen:
            continue
        seen.add(id(config))
        for key, value in [*values.items(), ("num_labels", getattr(config, "num_labels", None))]:
            if isinstance(value, int) and not isinstance(value, bool) and value > 1:
                if _SIZE_KEY.search(str(key)) and any(word in str(key) for word in words):
                    yield value
            elif str(key).endswith(("config", "configs")):
                todo += value if isinstance(value, list) else [value]
