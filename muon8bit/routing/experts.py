"""Experts of a mixture kept in one tensor, found by shapes and by the modules beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from .fused import Split
from .linears import linear_shape

# Modules whose matrix scores experts: Mixtral, Qwen-MoE, DeepSeek, gpt-oss, Jamba, Hunyuan in transformers.
_ROUTER = re.compile(r"(^|\.)(router|gate|wg|shared_expert_gate)(?=\.|$)")
_EXPERTS = re.compile(r"experts?$", re.IGNORECASE)
_MIXTURE = re.compile(r"expert|moe|moa(?![a-z])|mixture", re.IGNORECASE)
_COUNT_KEY = re.compile(r"num\w*experts$|n_(routed_|shared_)?experts$|^num_local_experts$")


def is_stack(name: str, shape: Sequence[int], modules: Mapping[str, nn.Module]) -> bool:
    """Return whether the parameter [experts, rows, cols] holds a matrix for each expert.

    That is said by transformers' experts (`has_gate`), by the word `experts` in its path or its module's class, or by
    a sibling of as many matrices that takes what it gives, in a module that, or whose class, is called a mixture, or
    that has a router.
    """
    path, _, local = name.rpartition(".")
    if len(shape) != 3 or min(shape[1:]) == 1:
        return False
    owner, parent = modules[path], modules.get(path.rpartition(".")[0]) if path else None
    if hasattr(owner, "has_gate") and hasattr(owner, "is_transposed"):
        return True
    if any(map(_EXPERTS.search, path.split("."))) or "expert" in type(owner).__name__.lower():
        return True
    around = [module for module in (owner, parent) if module is not None]
    rows = {given[0] for module in around for child in module.children() if (given := linear_shape(child))}
    rows |= {size for key, t in owner.named_parameters(recurse=False) if _ROUTER.search(key) for size in t.shape}
    names = (path.rpartition(".")[2], *(type(module).__name__ for module in around))
    if not any(map(_MIXTURE.search, names)) and shape[0] not in rows:
        return False
    own = owner._parameters[local]
    others = (t for module in around for t in _own(module) if t.ndim == 3 and t.shape[0] == shape[0] and t is not own)
    return any(t.shape[1] == shape[2] or t.shape[2] == shape[1] for t in others)


def halves(name: str, shape: Sequence[int], modules: Mapping[str, nn.Module]) -> Split | None:
    """Return the pieces of `input_linear.weight` [experts, 2 * rows, cols], gate then up; None for any other.

    Source: JetMoeMoE, GraniteMoeMoE and what derives from them in transformers 5.23.
    """
    path = name.rpartition(".")[0]
    parent = modules.get(path.rpartition(".")[0])
    output = linear_stack(parent, "output_linear")
    is_known = type(modules[path]).__name__.endswith("ParallelExperts") and path.endswith("input_linear")
    if not is_known or output is None or tuple(output.shape[1:]) != (shape[2], shape[1] // 2):
        return None
    return (shape[1] // 2,) * 2, -2


def linear_stack(module: nn.Module | None, child: str) -> Tensor | None:
    """Return the stacked weight of a child; None where there is none."""
    weight = getattr(getattr(module, child, None), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 3 else None


def row_stack(name: str, shape: Sequence[int], modules: Mapping[str, nn.Module]) -> tuple[int, ...] | None:
    """Return the rows of each expert in a parameter [experts * rows, cols], as DBRX keeps them; None for any other."""
    owner = modules[name.rpartition(".")[0]]
    count = getattr(owner, "moe_num_experts", getattr(owner, "num_experts", 0))
    is_expert = "expert" in type(owner).__name__.lower()
    if len(shape) != 2 or not is_expert or not isinstance(count, int) or count < 2 or shape[0] % count:
        return None
    return None if shape[0] == count else (shape[0] // count,) * count


def stack_counts(path: str, modules: Mapping[str, nn.Module]) -> set[int]:
    """Return the numbers of experts in the stacks and lists that lie in the same module as the Linear at `path`."""
    if not path:
        return set()
    around = path.rpartition(".")[0]
    own = modules[around].named_parameters(recurse=False)
    name = f"{around}." if around else ""
    counts = {t.shape[0] for key, t in own if t.ndim == 3 and is_stack(name + key, tuple(t.shape), modules)}
    return counts | _listed(modules[around])


def expert_counts(path: str, modules: Mapping[str, nn.Module]) -> set[int]:
    """Return the numbers of experts that the modules around `path` have: lists, stacks, attributes and configs."""
    counts: set[int] = set()
    for around in {path, path.rpartition(".")[0], path.rpartition(".")[0].rpartition(".")[0]}:
        module = modules.get(around)
        if module is None or (not around and path.count(".") > 1):
            continue
        counts |= _listed(module)
        for source in (module, getattr(module, "config", None)):
            values = getattr(source, "__dict__", {})
            counts |= {v for k, v in values.items() if _COUNT_KEY.search(k) and type(v) is int and v > 1}
    return counts


def _listed(module: nn.Module) -> set[int]:
    """Return the numbers of experts that the children called experts hold, in a list or in stacks."""
    counts: set[int] = set()
    for name, child in module.named_children():
        if _EXPERTS.search(name):
            counts |= {t.shape[0] for t in child.parameters(recurse=False) if t.ndim == 3}
            counts |= {len(child)} if isinstance(child, nn.ModuleList) else set()
    return counts


def _own(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters of a module and of the modules directly in it."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        yield from child.parameters(recurse=False)


def is_router(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether `name` lies in a router. A `gate` beside a module of its own shape is a gated MLP's matrix."""
    match = _ROUTER.search(name)
    if match is None:
        return False
    path = name[: match.end()]
    parent, gate = modules.get(path.rpartition(".")[0]), modules.get(path)
    if match[2] != "gate" or parent is None or gate is None:
        return True
    shapes = [getattr(getattr(child, "weight", None), "shape", None) for child in parent.children()]
    shape = getattr(getattr(gate, "weight", None), "shape", None)
    return shape is None or shapes.count(shape) < 2
