"""A second rule of what must not go to Muon, which knows nothing of how `muon8bit.param_groups` decides.

It looks at modules, at the numbers of the model's config (vocabularies, labels, codebooks, experts), and at which
module comes last, and is given only where each parameter went.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from benchmarks.robustness.model_classes import EXPERTS, VOCABULARY, integers

# Parameters by the last part of their names that are added, looked up or multiplied element by element.
_ADDED = re.compile(
    r"(^|_)(pos|position|positional|positions|embed|embeds|embedding|embeddings|emb|token|tokens|cls|mask|query|queries"
    r"|latent|latents|prompt|prompts|table|codebook|codebooks|centroids|anchors|memory|prototype|register|registers)(_|$)"
    r"|relative_position|rel_pos|latents?$|quer(y|ies)$"
)
_ELEMENTWISE = re.compile(
    r"^(bias|gamma|beta|scale|D|A_log|dt_bias|lambda\d*|layer_scale\w*|time_\w+|\w+_scale)$|bias$"
)
# Matrices of attention and MLP under the names that most families give them.
_HIDDEN = re.compile(
    r"(^|\.)(q|k|v|o|out|qkv|query|key|value|gate|up|down|gate_up|in|wq|wk|wv|wo|wi|w1|w2|w3|fc1|fc2|c_attn|c_proj|c_fc"
    r"|query_key_value|dense_h_to_4h|dense_4h_to_h|lin1|lin2|q_lin|k_lin|v_lin|out_lin)(_proj)?\.weight$"
)
_LAYER = re.compile(r"(^|\.)\d+\.")


class Placed(NamedTuple):
    """Place of a parameter.

    `muon` or `adamw`, whether its group decays it, whether the table flags it, and into how many matrices its group
    cuts it.
    """

    algorithm: str
    decays: bool
    is_flagged: bool = False
    num_pieces: int = 1


class Fault(NamedTuple):
    """A parameter in the wrong place; `kind` is one of a few words."""

    kind: str
    name: str
    shape: tuple[int, ...]


class Owner(NamedTuple):
    """One of the names of a parameter, and the module that it belongs to."""

    path: str
    local: str
    module: nn.Module

    @property
    def name(self) -> str:
        """Name of the parameter, in the whole model."""
        return f"{self.path}.{self.local}".removeprefix(".")

    @property
    def type_name(self) -> str:
        """Type of the module, in lower case."""
        return type(self.module).__name__.lower()


def faults(model: nn.Module, placed: Mapping[str, Placed]) -> list[Fault]:
    """Return the parameters that went to Muon, or are decayed, and must not.

    Args:
        model: of transformers, or any other; on any device, meta included.
        placed: one entry for each trainable parameter, by any of its names.

    Returns:
        list[Fault]: at most one of a parameter, in the model's order. Of what may be an output by its place alone,
        and of a bare matrix, it is enough that it is flagged.
    """
    facts, found = Facts(model), []
    for param, owners in facts.owners.items():
        place = _place(owners, placed)
        kinds: list[str] = []
        if place is not None and place.algorithm == "muon":
            kinds = [*facts.not_for_muon(param, owners)]
            if not place.is_flagged:
                kinds += facts.to_be_flagged(param, owners, place.num_pieces)
        elif place is not None and place.decays:
            kinds = [*facts.not_to_decay(param, owners)]
        if kinds and param.numel():
            found.append(Fault(kinds[0], owners[0].name, tuple(param.shape)))
    return found


def lost(model: nn.Module, placed: Mapping[str, Placed]) -> list[str]:
    """Return the names of matrices of attention and MLP in numbered layers that AdamW has.

    They have 32 rows and columns or more.
    """
    facts, found = Facts(model), []
    for param, owners in facts.owners.items():
        place = _place(owners, placed)
        is_matrix = param.ndim == 2 and min(param.shape) >= 32 and _is_linear(owners[0].module)
        is_hidden = all(_HIDDEN.search(owner.name) and _LAYER.search(owner.name) for owner in owners)
        is_hidden &= not any(facts.is_in_router(owner) for owner in owners)
        if place is None or place.algorithm == "muon" or not (is_matrix and is_hidden):
            continue
        if not any(facts.not_for_muon(param, owners)):
            found.append(owners[0].name)
    return found


def _place(owners: list[Owner], placed: Mapping[str, Placed]) -> Placed | None:
    return next((placed[owner.name] for owner in owners if owner.name in placed), None)


class Facts:
    """Facts that the second rule knows of a model, before any parameter: owners, sizes from the config, ends."""

    def __init__(self, model: nn.Module) -> None:
        self.owners: dict[Tensor, list[Owner]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for local, param in module.named_parameters(recurse=False):
                self.owners.setdefault(param, []).append(Owner(path, local, module))
        numbers = next((numbers for module in model.modules() if (numbers := _numbers(module))), [])
        others = {value for key, value in numbers if not VOCABULARY.search(key)}
        sizes = {value for key, value in numbers if VOCABULARY.search(key) and value > 2} - others
        labels = {value for key, value in numbers if key == "num_labels"} & sizes
        books = {size * count for size in sizes if size > 100 and size % 64 for count in range(2, 65)} - others
        self.vocabularies = sizes | {size + 1 for size in labels} | books
        self.experts = {value for key, value in numbers if EXPERTS.search(key) and value > 1}
        self.heads, self.last = set(_heads(model)), set(_last(model))
        self.modules = dict(model.named_modules(remove_duplicate=False))

    def not_for_muon(self, param: Tensor, owners: list[Owner]) -> Iterator[str]:
        """Yield the kinds for which a parameter is none of Muon's."""
        shape = tuple(param.shape)
        if param.ndim < 2:
            yield "1-D"
        if param.ndim >= 2 and param.numel() == max(shape):
            yield "one row or column"
        if param in self.heads:
            yield "output"
        for owner in owners:
            is_linear = _is_linear(owner.module)
            if isinstance(owner.module, nn.modules.conv._ConvNd):
                yield "convolution"
            if owner.local.endswith("bias"):
                yield "bias"
            if "norm" in owner.type_name and param.ndim < 3 and not is_linear:
                yield "norm"
            if isinstance(owner.module, (nn.Embedding, nn.EmbeddingBag)):
                yield "embedding"
            if param.ndim == 2 and self.vocabularies & set(shape if not is_linear else shape[:1]):
                yield "vocabulary or labels"
            if param.ndim == 2 and "Conv1D" in type(owner.module).__name__ and shape[1] in self.vocabularies:
                yield "vocabulary or labels"
            is_scores = bool(self.experts & set(shape)) and self._is_beside_experts(owner)
            if param.ndim == 2 and (is_scores or re.search(r"(^|[._])router$", owner.path)):
                yield "router"
            if not is_linear and (_ADDED.search(owner.local.lower()) or "embed" in owner.type_name):
                yield "table or latent"
            if not is_linear and _ELEMENTWISE.search(owner.local):
                yield "element by element"

    def to_be_flagged(self, param: Tensor, owners: list[Owner], num_pieces: int) -> Iterator[str]:
        """Yield the kinds for which a parameter is Muon's only if the user is told to look at it."""
        if param in self.last and param.shape[0] * 2 <= param.shape[1]:
            yield "may be an output"
        is_layer = all(_LAYER.search(owner.path) for owner in owners)
        if param.ndim == 2 and param.shape[0] <= 4 and param.shape[1] >= 32 and not is_layer:
            yield "few outputs"
        for owner in owners:
            if not _is_linear(owner.module) and not self._is_stack(param, owner, num_pieces):
                yield "bare"

    def not_to_decay(self, param: Tensor, owners: list[Owner]) -> Iterator[str]:
        """Yield the kinds for which weight decay would be wrong."""
        for owner in owners:
            if param.ndim < 2 or owner.local.endswith("bias") or ("norm" in owner.type_name and param.ndim < 2):
                yield "decayed: 1-D, norm or bias"
            is_module = isinstance(owner.module, (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd))
            if is_module or _is_linear(owner.module):
                continue
            if _ADDED.search(owner.local.lower()):
                yield "decayed: table or latent"
            if _ELEMENTWISE.search(owner.local):
                yield "decayed: element by element"

    def is_in_router(self, owner: Owner) -> bool:
        """Return whether a matrix is one of a router of several layers."""
        paths = [owner.path.rsplit(".", count)[0] for count in range(4)]
        return any("router" in type(self.modules[path]).__name__.lower() for path in paths)

    def _is_beside_experts(self, owner: Owner) -> bool:
        """Return whether the module that owns a matrix, or one of the two around it, has experts for a child."""
        if re.search(r"rout|gate|topk", owner.type_name):
            return True
        path = owner.path
        for _ in range(3):
            children = self.modules[path].named_children() if path in self.modules else ()
            if any("expert" in name or "expert" in type(child).__name__.lower() for name, child in children):
                return "expert" not in owner.path.removeprefix(path)
            if not path:
                return False
            path = path.rpartition(".")[0]
        return False

    def _is_stack(self, param: Tensor, owner: Owner, num_pieces: int) -> bool:
        """Return whether a bare parameter is a stack of experts, or experts one below the other that its group cuts."""
        is_named = "expert" in f"{owner.path}.{owner.local}".lower() or "expert" in owner.type_name
        return is_named and (param.shape[0] in self.experts | {1} if param.ndim == 3 else num_pieces in self.experts)


def _is_linear(module: nn.Module) -> bool:
    """Return whether its weight multiplies: nn.Linear, nn.MultiheadAttention, and classes that are called so."""
    is_known = isinstance(module, (nn.Linear, nn.MultiheadAttention))
    return is_known or bool(re.search(r"Linear|Conv1D$|Dense$", type(module).__name__))


def _numbers(module: nn.Module) -> list[tuple[str, int]]:
    config: Any = getattr(module, "config", None)
    return list(integers(config)) if hasattr(config, "to_dict") else []


def _heads(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weights of what `get_output_embeddings` of any module returns."""
    for module in model.modules():
        if hasattr(module, "get_output_embeddings"):
            try:
                end = module.get_output_embeddings()
            except (AttributeError, NotImplementedError):
                continue
            if isinstance(end, nn.Module):
                yield from (param for param in end.parameters() if param.ndim == 2)


def _last(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weights of the Linears that end the parts of a `...For...` behind its base.

    No later part takes what they give.
    """
    base = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    children = list(model.children())
    behind = children[children.index(base) + 1 :] if base in children else []
    parts = [[(p, m) for p, m in child.named_modules() if getattr(m, "weight", None) is not None] for child in behind]
    linears = [[(p, m) for p, m in part if m.weight.ndim > 1] for part in parts]
    for index, part in enumerate(linears):
        path, last = part[-1] if part else ("", None)
        is_inside = re.search(r"(layers|blocks|stages|h)\.\d+\.\w+\.", path) or _HIDDEN.search(f"{path}.weight")
        if last is None or not _is_linear(last) or is_inside:
            continue
        weight = last.weight
        if not any(later and later[0][1].weight.shape[-1] == weight.shape[0] for later in linears[index + 1 :]):
            yield weight
