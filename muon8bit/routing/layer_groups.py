"""Matrices of a model by group of layers, as papers on spectra call them: QK, VO, W_in, W_gate, W_out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor, nn

from .._text import unwrapper
from ..config import DEFAULT_ROUTING
from .ends import find_ends
from .fused import COPIES, Split
from .outputs import add_outputs
from .rules import check_whole, default_route

QK, VO, W_IN, W_GATE, W_OUT = "QK", "VO", "W_in", "W_gate", "W_out"
# Modules by name, the same ones wherever they are; then those that are an attention's or an MLP's by their path.
_GROUPS = (
    (QK, re.compile(r"(w|to_)?[qk]|[qk]_(a_|b_)?(proj|lin|linear)|(query|key)(_proj|_layer)?")),
    (VO, re.compile(r"(w|to_)?v|v_(proj|lin|linear)|value(_proj|_layer)?|w?o|o_proj|to_out")),
    (W_IN, re.compile(r"up_proj|fc1|fc_in|c_fc|lin1|linear1|wi|wi_1|w3|w_in|dense_h_to_4h|intermediate\.dense")),
    (W_GATE, re.compile(r"gate_proj|w1|wi_0|w_gate")),
    (W_OUT, re.compile(r"down_proj|fc2|fc_out|lin2|linear2|w2|w_out|dense_4h_to_h")),
)
_BY_PATH = re.compile(r"wo|out_proj|out_lin|c_proj|dense|proj")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|dense\w+dense|experts?|(^|\.)output\.dense$", re.IGNORECASE)
_QKV = re.compile(r"qkv|c_attn|in_proj|query_key_value", re.IGNORECASE)
_GATE_UP = re.compile(r"gate_up|gate_and_up|input_linear", re.IGNORECASE)


class Piece(NamedTuple):
    """A piece of a parameter that is a matrix by itself, or a stack of them.

    Attributes:
        name: of the parameter, a piece of a fused one with its number behind.
        param_name: of the parameter alone.
        group: QK, VO, W_in, W_gate, W_out, or the layer's own name.
        param: [..., rows, cols].
        rows, cols: the part of them that is the piece.
    """

    name: str
    param_name: str
    group: str
    param: Tensor
    rows: slice = slice(None)
    cols: slice = slice(None)

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of the piece in a tensor of the parameter's shape: [count, rows, cols]."""
        return tensor[..., self.rows, self.cols].reshape(-1, *tensor[..., self.rows, self.cols].shape[-2:])


def matrix_pieces(model: nn.Module) -> list[Piece]:
    """Return the pieces of all parameters that the newest rules of `param_groups` send to Muon, frozen ones too."""
    named = [(name, param) for name, param in model.named_parameters() if param.is_floating_point()]
    unwrapped = unwrapper(name for name, _ in model.named_parameters())
    modules = {unwrapped(path): module for path, module in model.named_modules(remove_duplicate=False)}
    ends, routes = find_ends(model, DEFAULT_ROUTING), []
    add_outputs(model, ends)
    for name, param in ((unwrapped(name), param) for name, param in named):
        check_whole(name, param, modules[name.rpartition(".")[0]])
        routes.append((default_route(name, param, modules, ends), param))
    chosen = [(route, param) for route, param in routes if route.algorithm == "muon"]
    names = [route.name for route, _ in chosen]
    return [piece for route, param in chosen for piece in pieces_of(route.name, param, route.split, names)]


def pieces_of(name: str, param: Tensor, split: Split | None = None, names: Iterable[str] = ()) -> Iterator[Piece]:
    """Give the pieces of one parameter [..., rows, cols].

    Args:
        name: its qualified name.
        param: the tensor.
        split: the sizes of the pieces and their dimension, -2 or -1; None for one piece.
        names: of the model's other matrices, which tell whether a `w1` is a gate.
    """
    if split is None:
        yield Piece(name, name, group_of(name, names), param)
        return
    sizes, dim = split
    layer = _layer(name)
    known: tuple[str, ...] = (QK, QK, VO) if _QKV.search(layer) else (W_GATE, W_IN) if _GATE_UP.search(layer) else ()
    for number, (end, size) in enumerate(zip(accumulate(sizes), sizes, strict=True)):
        group = known[number] if len(known) == len(sizes) else group_of(name, names)
        part = slice(end - size, end)
        places = {"rows": part} if dim == -2 else {"cols": part}
        yield Piece(f"{name}, piece {number}", name, group, param, **places)


def group_of(name: str, names: Iterable[str] = ()) -> str:
    """Return the group of a matrix by its qualified name, else its own name: what follows the last layer's number.

    Args:
        name: of the parameter.
        names: of the model's other matrices: a `w1` is a gate only where there is a `w3`.
    """
    path = re.sub(r"\.weight$", "", name)
    path = COPIES.sub("", path)
    layer = _layer(name)
    if layer == "wo" and _MLP.search(path) and not _ATTENTION.search(path):  # T5's
        return W_OUT
    if layer == "w1" and not any(other == re.sub(r"w1(?=\.weight$|$)", "w3", name) for other in names):
        return W_IN
    for group, pattern in _GROUPS:
        if pattern.fullmatch(layer) or pattern.fullmatch(".".join(path.split(".")[-2:])):
            return group
    if _BY_PATH.fullmatch(layer) and _ATTENTION.search(path):
        return VO
    if _BY_PATH.fullmatch(layer) and _MLP.search(path):
        return W_OUT
    return re.split(r"(?:^|\.)\d+\.", path)[-1]


def _layer(name: str) -> str:
    """Return the last word of a parameter's name that is no `weight`, nor a wrapper's."""
    return COPIES.sub("", re.sub(r"(\.|_)weight$", "", name)).rpartition(".")[2]
