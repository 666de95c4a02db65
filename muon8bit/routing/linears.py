"""Which modules multiply by a matrix, and what in a model takes vectors of which size."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

# Classes that are no nn.Linear but keep a 2-D `weight` that multiplies: transformers' Conv1D, I-BERT's QuantLinear,
# tensor-parallel Linears.
_LINEAR_CLASS = re.compile(r"linear|dense|conv1d|proj", re.IGNORECASE)
_CHAIN = re.compile(r"\d+\.")  # in a path below a module: inside a numbered layer


def linear_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """Return (sizes of the vectors that a Linear gives, that it takes); None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module._parameters.get("weight") if module is not None else None
    if weight is None or weight.ndim != 2 or not _LINEAR_CLASS.search(type(module).__name__):
        return None
    rows, cols = weight.shape
    return (cols, rows) if type(module).__name__ == "Conv1D" else (rows, cols)


def siblings(path: str, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Yield the other modules directly in the module around `path`."""
    parent = modules.get(path.rpartition(".")[0]) if path else None
    own = modules.get(path)
    if parent is not None:
        yield from (child for child in parent.children() if child is not own)


class Flow:
    """Sizes of the vectors that modules take and give.

    Args:
        modules: of a model, by path; `modules[path]` of a wrapped weight is its innermost module.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._tops = _tops(modules)
        self._takers: dict[int, list[str]] = defaultdict(list)
        self._scores = {path for path, module in modules.items() if (linear_shape(module) or (0,))[0] == 1}
        self._givers: dict[int, list[str]] = defaultdict(list)
        self._order = {path: place for place, path in enumerate(modules)}
        self._convolutions = {path for path, m in modules.items() if isinstance(m, nn.modules.conv._ConvNd)}
        for path, module in modules.items():
            shape = linear_shape(module)
            taken = shape[1] if shape else _input_size(module)
            if taken:
                self._takers[taken].append(path)
            if given := shape[0] if shape else _output_size(module):
                self._givers[given].append(path)

    def takes(self, size: int, *, by_scores: bool = True) -> bool:
        """Return whether anything in the model takes vectors of this size.

        A Linear of one row counts only `by_scores`.
        """
        return bool(self._takers_of(size, by_scores))

    def leads_on(self, path: str, size: int) -> bool:
        """Return whether the module at `path`, a later one, or one in numbered layers takes vectors of this size."""
        place = self._order.get(path, 0)
        return any(self._order[p] >= place or _CHAIN.search(p) for p in self._takers.get(size, []))

    def is_top(self, path: str) -> bool:
        """Return whether the module at `path` lies directly in the model, whatever is wrapped around that."""
        return path.rpartition(".")[0] in self._tops

    def beside(self, path: str) -> list[str]:
        """Return the names of the other modules directly in the module around `path`."""
        around = path.rpartition(".")[0]
        return [p.rpartition(".")[2] for p in self._order if p != path and p.rpartition(".")[0] == around]

    def is_taken(self, path: str, size: int, *, any_order: bool = False, by_scores: bool = True) -> bool:
        """Return whether a module beside `path` takes vectors of this size, or one around that.

        Numbered layers are looked into only from inside. A convolution must come later, and so must what is at the top
        of the model or not beside, unless `any_order`, as where a sum goes on to what came before. A Linear of one row
        counts only `by_scores`.
        """
        place = self._order.get(path, 0)
        takers = self._takers_of(size, by_scores)
        later = [p for p in takers if self._order[p] > place]
        beside = [p for p in takers if p not in self._convolutions or self._order[p] > place]
        parent = path.rpartition(".")[0]
        around = beside if any_order else later
        if self.is_top(path):
            return _is_in(parent, around, path)
        return _is_in(parent, beside, path) or _is_in(parent.rpartition(".")[0], around, path)

    def _takers_of(self, size: int, by_scores: bool) -> list[str]:
        return [path for path in self._takers.get(size, []) if by_scores or path not in self._scores]

    def is_given(self, path: str, size: int) -> bool:
        """Return whether a module beside `path`, or one level further out, gives vectors of this size."""
        givers, parent = self._givers.get(size, []), path.rpartition(".")[0]
        return _is_in(parent, givers, path) or _is_in(parent.rpartition(".")[0], givers, path)


def _tops(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the path of the model, and of what it is but a wrapper of."""
    tops, path = {""}, ""
    while len(children := [name for name, _ in modules[path].named_children()]) == 1:
        path = f"{path}.{children[0]}".removeprefix(".")
        if path not in modules:
            break
        tops.add(path)
    return tops


def _is_in(around: str, others: list[str], path: str) -> bool:
    """Return whether one of `others` but `path` lies in the module `around`, not inside its numbered layers."""
    start = f"{around}." if around else ""
    return any(o != path and o.startswith(start) and not _CHAIN.search(o[len(start) :]) for o in others)


def _input_size(module: nn.Module) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return int(module.in_channels)
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    return int(module.input_size) if isinstance(module, nn.RNNBase | nn.RNNCellBase) else 0


def _output_size(module: nn.Module) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return int(module.out_channels)
    if isinstance(module, nn.Embedding):
        return int(module.embedding_dim)
    return int(module.hidden_size) if isinstance(module, nn.RNNBase | nn.RNNCellBase) else 0


def is_bare(local: str, owner: nn.Module) -> bool:
    """Return whether a parameter is no module's weight of a known kind.

    Known are Linear, embedding, convolution, attention and recurrent layers.
    """
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag | nn.modules.conv._ConvNd):
        return False
    if isinstance(owner, nn.MultiheadAttention | nn.RNNBase | nn.RNNCellBase):
        return "weight" not in local
    return local != "weight" or linear_shape(owner) is None


def weight_of(module: nn.Module) -> Tensor | None:
    """Return the module's own `weight`, if it is a tensor."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None
