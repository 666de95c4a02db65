"""Routers of mixtures of experts in a model of transformers, told by what they give, and the biases of their choice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.config.errors import InputError
from finetune.config.options import Training, flag
from finetune.models.build import logits_of

BIAS = "e_score_correction_bias"  # added to the scores where experts are chosen, in DeepSeek-V3 and its heirs
_EXPERTS = re.compile(r"experts?$", re.IGNORECASE)
# Scores of experts from logits [tokens, experts]; the balance loss divides each token's by their sum.
SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
}
TRIAL = 8  # tokens by which routers are tried
# How far the weights of a token's experts may be from the same multiple of their scores: a few roundings of bf16.
_SPREAD = 0.03


@dataclass(frozen=True)
class Router:
    """One router, whose forward gives (logits, weights, indices), and perhaps more.

    Attributes:
        path: of its module in the model.
        num_experts: that it scores.
        top_k: experts that a token is sent to.
        score: key of `SCORES`: how its weights follow from its logits.
    """

    path: str
    num_experts: int
    top_k: int
    score: str

    @property
    def layer(self) -> int:
        """Number of the layer that it is in: the first in its path; 0 if there is none."""
        numbers = re.findall(r"\d+", self.path)
        return int(numbers[0]) if numbers else 0


def find_routers(model: nn.Module, recipe: Training) -> tuple[list[Router], str]:
    """Find the routers of a model by a forward pass of `TRIAL` tokens; a model without experts is not run.

    Args:
        model: causal language model, not prepared by Accelerate and without an adapter; its mode is left as it is.
        recipe: its options of balancing are checked against what there is.

    Returns:
        The routers in the order of the model, and a note on mixtures whose routers are of another form; if there is
        one, there are no routers.

    Raises:
        InputError: an option of balancing is above 0 and the model has no experts, or no such bias, or a mixture whose
            router is of another form.
    """
    asked = [name for name in ("router_aux_loss", "router_z_loss", "router_bias_rate") if getattr(recipe, name, 0) > 0]
    kind, mixtures = type(model).__name__, list(_mixtures(model))
    routers = _by_trial(model, mixtures) if mixtures else []
    if asked and not mixtures:
        raise InputError(flag(asked[0]), f"{kind} has no mixture of experts; give 0, or leave it out")
    unknown = [path for path in mixtures if not any(_is_inside(router.path, path) for router in routers)]
    note = ""
    if unknown:
        name = f"{unknown[0]} ({type(model.get_submodule(unknown[0])).__name__})"
        reason = f"{name} has no router that gives logits, then weights by their softmax or sigmoid, then indices"
        if asked:
            raise InputError(flag(asked[0]), f"{reason}; give 0, or leave it out")
        routers, note = [], f"note: the load of experts is not logged: {reason}"
    if getattr(recipe, "router_bias_rate", 0) > 0 and not biases(model, routers):
        raise InputError(flag("router_bias_rate"), f"{kind} has no {BIAS}; give 0, and --router-aux-loss to balance")
    return routers, note


def biases(model: nn.Module, routers: Sequence[Router]) -> dict[str, nn.Module]:
    """Return the path of each router that has a bias of its choice, with the module that holds the buffer.

    It is the router, or the mixture around it, which then hands the bias to its router.
    """
    found = {}
    for router in routers:
        parent = router.path.rpartition(".")[0]
        for path in (router.path, parent):
            module = model.get_submodule(path)
            if BIAS in module._buffers:
                found[router.path] = module
                break
    return found


def keep_biases_in_fp32(model: nn.Module, routers: Sequence[Router]) -> None:
    """Make the biases of choice fp32, which transformers builds in the dtype of the weights.

    A rate of .001 is lost in bf16 once a bias is above .25.
    """
    for module in biases(model, routers).values():
        setattr(module, BIAS, module._buffers[BIAS].float())  # type: ignore[union-attr]


def _mixtures(model: nn.Module) -> Iterator[str]:
    """Yield the paths of modules with a child that is a list of experts, or keeps them in stacks [experts, ...]."""
    for path, module in model.named_modules():
        for name, child in module.named_children():
            is_list = isinstance(child, nn.ModuleList) and len(child) > 1
            if _EXPERTS.search(name) and (is_list or any(p.ndim == 3 for p in child.parameters(recurse=False))):
                yield path
                break


def _is_inside(path: str, parent: str) -> bool:
    return path == parent or not parent or path.startswith(f"{parent}.")


@torch.no_grad()
def _by_trial(model: nn.Module, mixtures: Sequence[str]) -> list[Router]:
    """Return the routers among the modules of mixtures, in the order of the model."""
    found: dict[str, Router] = {}

    def hook(path: str, module: nn.Module) -> Callable[..., None]:
        def look(_module: nn.Module, args: Any, options: Any, given: Any) -> None:
            if _has_form(given):
                if (spread := float(given[0].float().std())) > 0:  # of 1: apart enough to tell the scores by
                    scaled = {key: _divided(value, spread) for key, value in options.items()}
                    given = module.forward(*(_divided(value, spread) for value in args), **scaled)
                score = _score(given[0], given[1], given[2], has_bias=BIAS in module._buffers)
                if score is not None:
                    found[path] = Router(path, given[0].shape[-1], given[2].shape[-1], score)

        return look

    inside = [(p, m) for p, m in model.named_modules() if any(_is_inside(p, mixture) for mixture in mixtures)]
    handles = [m.register_forward_hook(hook(p, m), with_kwargs=True) for p, m in inside]
    was_training = model.training
    model.eval()
    try:
        logits_of(model, input_ids=torch.arange(1, TRIAL + 1, device=next(model.parameters()).device)[None])
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [found[path] for path, _ in inside if path in found]


def _has_form(given: Any) -> bool:
    """Check for logits [..., experts] of `TRIAL` tokens, and the weights and indices [..., k] of those chosen."""
    if not isinstance(given, tuple) or len(given) < 3 or not all(isinstance(part, Tensor) for part in given[:3]):
        return False
    logits, weights, indices = given[:3]
    is_typed = logits.is_floating_point() and weights.is_floating_point() and not indices.is_floating_point()
    nums_tokens = {logits.shape[:-1].numel(), indices.shape[:-1].numel()}
    return is_typed and weights.shape == indices.shape and nums_tokens == {TRIAL}


def _divided(value: Any, by: float) -> Any:
    is_hidden = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
    return value / by if is_hidden else value


def _score(logits: Tensor, weights: Tensor, indices: Tensor, has_bias: bool) -> str | None:
    """Return the score whose multiples the weights of each token are; None if they are of neither.

    A single expert's weight is compared over tokens. Where it is always the same it tells nothing: with a bias of the
    choice the score is then taken to be the sigmoid.
    """
    spreads: dict[str, float] = {}
    dim = -1 if indices.shape[-1] > 1 else 0
    for name in ("sigmoid", "softmax") if has_bias else ("softmax", "sigmoid"):
        ratios = (weights.float() / SCORES[name](logits.float()).gather(-1, indices)).flatten(0, -2)
        spreads[name] = float(((ratios.amax(dim) - ratios.amin(dim)) / ratios.mean(dim)).amax())
    best = min(spreads, key=lambda name: spreads[name])
    if dim == 0 and float(weights.amax() - weights.amin()) < _SPREAD * float(weights.amax()):
        return next(iter(spreads))
    return best if spreads[best] < _SPREAD else None
