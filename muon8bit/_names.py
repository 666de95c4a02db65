"""Names of parameters without what wrappers put into them, so that a wrapped and a plain model agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable

# Segments that torch.compile, FSDP1 and activation checkpointing add, anywhere in a name.
_PRIVATE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# DDP's, DataParallel's and DeepSpeed's. A model may call a part of its own so: see `unwrapper`.
_MODULE = "module"


def unwrapper(names: Iterable[str]) -> Callable[[str], str]:
    """Return the function that takes wrappers' segments out of the names of one model, of parameters or modules.

    `module` is taken for a wrapper's where every name begins with it. A name is left as it is where two would become
    equal.

    Args:
        names: qualified names of all the model's parameters.

    Source: the prefixes are those of torch 2.11's `nn.Module.state_dict` under each wrapper.
    """
    names = list(dict.fromkeys(names))
    plain = [_without(name, _PRIVATE) for name in names]
    depth = min((_leading_modules(name) for name in plain), default=0)

    def unwrapped(name: str) -> str:
        parts = _without(name, _PRIVATE).split(".")
        return ".".join(parts[depth:]) if parts[:depth] == [_MODULE] * depth else ".".join(parts)

    return unwrapped if len({unwrapped(name) for name in names}) == len(names) else lambda name: name


def is_same(name: str, other: str) -> bool:
    """Return whether two names are equal but for wrappers' segments, `module` anywhere included."""
    return name == other or _without(name, (*_PRIVATE, _MODULE)) == _without(other, (*_PRIVATE, _MODULE))


def _without(name: str, segments: tuple[str, ...]) -> str:
    return ".".join(part for part in name.split(".") if part not in segments)


def _leading_modules(name: str) -> int:
    """Count the segments `module` that a parameter's name begins with, its last segment left out."""
    parts = name.split(".")[:-1]
    return next((i for i, part in enumerate(parts) if part != _MODULE), len(parts))
