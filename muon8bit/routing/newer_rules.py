"""Rules of routing that hold since 0.2, looked at before those of 0.1; `routing="0.1"` leaves them out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..config import Algorithm
from .adapters import other_adapter
from .ends import Ends
from .experts import expert_counts, halves, is_router, is_stack, row_stack, stack_counts
from .fused import Split
from .linears import is_bare, linear_shape
from .lora import is_adapter
from .outputs import POSITIONS

ROUTER = "MoE router"  # why a parameter goes to AdamW
_BIAS = re.compile(r"bias(es)?$|bias_table$|bias_[a-z]$", re.IGNORECASE)
# State-space models' decay rates and skip gains: Mamba, Zamba, S4, H3, RWKV.
_STATE_SPACE = re.compile(r"^(A|D|(.*_)?A_(log|real|imag)|(inv|log)_A\w*|(log_)?dt\w*|time_\w+|Lambda\w*)$")
_TABLE = re.compile(r"emb|token", re.IGNORECASE)
_START = re.compile(
    r"latent|(level|seg|class|label|type)_?\w*emb|(^|_)quer(y|ies)(_|$)|prompt|prefix|soft_|mask_token|cls|(^|_)tokens?$|memory|mem_|slots?|anchor|prototype"
    r"|refpoint|register|inducing|cent(er|roid)s?$|(^|_)(ctx|null|mask_emb\w*|slopes?|gain|thresholds?|freq\w*)(_|$)|^[hc]0$|init_(h|c|state)|initial_|state0|sink|layer_?scale|^ls\d*$|gamma|lambda|scale|temperature",
    re.IGNORECASE,
)
_INPUT = re.compile(r"(quer(y|ies)|latent|prompt)[^.]*$|(^|\.)prompt_encoder\.\w+\.embedding$", re.IGNORECASE)
_NUMBERS = re.compile(r"(\.\d+)+$")
_ROUTER = re.compile(r"router|gat(e|ing)(?!_(up_)?proj)|(^|_)wg$", re.IGNORECASE)


@dataclass(frozen=True)
class Role:
    """Role of a parameter by a rule: where it goes; fields as in `Route`."""

    algorithm: Algorithm
    reason: str
    flag: str = ""
    decays: bool = True
    split: Split | None = None
    is_adapter: bool = False


def newer_role(name: str, param: nn.Parameter, modules: Mapping[str, nn.Module], ends: Ends) -> Role | None:
    """Return the role of a parameter by the first rule that applies; None leaves it to the rules of 0.1."""
    path, _, local = name.rpartition(".")
    shape, owner = tuple(param.shape), modules[path]
    if is_adapter(name):
        return None
    if part := other_adapter(name, modules):
        end = ends.heads.get(part.base) or ends.embeddings.get(part.base) if part.base is not None else None
        if end:
            return Role("adamw", f"adapter of the {end}", decays=not _is_vector(shape))
        if part.is_factor and len(shape) == 2 and min(shape) > 1:
            return Role("muon", f"factor of an adapter ({part.kind})", is_adapter=True)
        if len(shape) > 1 and _is_vector(shape):
            return Role("adamw", "one row or column", decays=False)
        reason = f"adapter ({part.kind}): no factor of a product of matrices"
        return Role("adamw", reason, decays=len(shape) > 1, is_adapter=len(shape) > 1)
    if len(shape) < 2:
        return None
    if _BIAS.search(local) or (local == "weight" and _BIAS.search(path)):
        return Role("adamw", "bias", decays=False)
    is_linear = linear_shape(owner) is not None and local == "weight"
    if "norm" in type(owner).__name__.lower():
        if not is_linear and local in ("weight", "scale", "gamma", "g"):
            return Role("adamw", "norm", decays=False)
        return _linear_role(name, shape, modules) if is_linear else _bare_role(name, shape, modules)
    if param in ends.embeddings and param not in ends.heads and POSITIONS.search(".".join(path.split(".")[-2:])):
        return Role("adamw", "position table", decays=False)
    if param in ends.embeddings and param not in ends.heads and _INPUT.search(path):
        return Role("adamw", "learned input", decays=False)
    if is_bare(local, owner) and param not in ends.heads and not (local == "weight" and param in ends.embeddings):
        return _bare_role(name, shape, modules)
    if end := ends.heads.get(param) or ends.embeddings.get(param):
        return Role("adamw", end)
    return _linear_role(name, shape, modules) if is_linear else None


def _linear_role(name: str, shape: tuple[int, ...], modules: Mapping[str, nn.Module]) -> Role | None:
    """Return the role of a Linear's weight."""
    path = name.rpartition(".")[0]
    counts = expert_counts(path, modules)
    if is_router(name, modules) and shape[0] == shape[1] and not counts:
        return Role("muon", "hidden matrix", flag="called a gate, but beside no experts")
    whole = _NUMBERS.sub("", path)  # of a router of several layers
    rows = {given[0] for module in modules[whole].modules() if (given := linear_shape(module))}
    is_scored = _ROUTER.search(whole.rpartition(".")[2]) and rows & counts
    if is_router(name, modules) or path.endswith("router") or is_scored or rows & stack_counts(whole, modules):
        return Role("adamw", ROUTER)
    if min(shape) == 1:
        return Role("adamw", "one row or column")
    if "norm" in type(modules[path]).__name__.lower():
        return Role("muon", "hidden matrix")
    return None


def _bare_role(name: str, shape: tuple[int, ...], modules: Mapping[str, nn.Module]) -> Role | None:
    """Return the role of a parameter of two or more dimensions that is no module's weight of a known kind."""
    path, _, local = name.rpartition(".")
    is_marked = getattr(modules[path]._parameters.get(local), "_no_weight_decay", False)
    if _is_vector(shape):
        return Role("adamw", "vector", decays=False)
    if is_marked or _STATE_SPACE.search(local):
        return Role("adamw", "no matrix (state space, _no_weight_decay)", decays=False)
    is_scored = _ROUTER.search(f"{path.rpartition('.')[2]}.{local}") and shape[0] in expert_counts(path, modules)
    if is_router(name, modules) or (len(shape) == 2 and is_scored):
        return Role("adamw", ROUTER)
    if is_stack(name, shape, modules):
        return Role("muon", "stacked experts", split=halves(name, shape, modules))
    if sizes := row_stack(name, shape, modules):
        return Role("muon", f"stacked experts, {len(sizes)} one below the other", split=(sizes, -2))
    if POSITIONS.search(f"{path.rpartition('.')[2]}.{local}"):
        return Role("adamw", "position table", decays=False)
    if _TABLE.search(local) and not _START.search(local):
        return Role("adamw", "bare parameter named like an embedding")
    if _START.search(local):
        return Role("adamw", "learned input or scale, by its name", decays=False)
    if len(shape) > 2:
        return None
    return Role("adamw", "bare parameter", flag="no Linear's weight: a pattern sends it to Muon if it is a matrix")


def _is_vector(shape: tuple[int, ...]) -> bool:
    """Return whether all dimensions but one have one element."""
    return math.prod(shape) == max(shape, default=1)
