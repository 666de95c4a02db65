"""Activations of a model before and after a few steps, at one width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from finetune.config.errors import InputError
from finetune.config.recipe import SEQ_LEN, Recipe
from finetune.data.corpus import open_corpus
from finetune.models.build import build_model, model_config
from finetune.models.optimizers import build_optimizers
from finetune.models.tokens import TokenCache
from finetune.setup.prepare import tokens_of
from finetune.training.loss import summed_nats
from finetune.training.train_step import Blocks

PROBED = 4  # sequences on which activations are compared
FINAL_NORM = "final norm"
_ATTENTION, _MLP = ("attn", "attention"), ("mlp", "feed_forward", "moe", "ffn")


def prepare_tokens(recipe: Recipe) -> tuple[Any, TokenCache]:
    """Return the tokenizer and the tokens of a recipe, as the pretraining script makes them.

    Raises:
        InputError: as there.
    """
    sized = replace(recipe, seq_len=recipe.seq_len or SEQ_LEN)
    return tokens_of(open_corpus(sized), sized, model_config(sized))


def measure_changes(recipe: Recipe, initialization: str, tokenizer: Any, cache: TokenCache) -> dict[str, Any]:
    """Return the RMS of each activation at the start and of its change after `recipe.max_steps` steps at a constant lr.

    Args:
        recipe: with its width, seed and --scaling, by which the rates go.
        initialization: rule by which the model starts; one of the values of --scaling.
        tokenizer, cache: of `prepare_tokens`.

    Returns:
        `width`, `seed`, `activations` (name -> "initial" and "change"), and `losses`, nats per token of every step.

    Raises:
        InputError: the model has no numbered layers of attention, or an option cannot be obeyed.
    """
    device, seq_len = torch.device("cpu"), recipe.seq_len or SEQ_LEN
    torch.manual_seed(recipe.seed)
    start = replace(recipe, scaling=initialization)
    model = build_model(start, model_config(start), tokenizer, device)
    optimizers = build_optimizers(model, recipe)
    train = Blocks(cache.train, seq_len, recipe.seed)
    held_out = Blocks(cache.validation, seq_len)
    probe = held_out.batch(range(min(PROBED, len(held_out))), device)["input_ids"]
    before, losses = activations(model, probe), []
    for step in range(recipe.max_steps):
        rows = [train.shuffled(step * recipe.batch_size + i) for i in range(recipe.batch_size)]
        batch = train.batch(rows, device)
        loss = summed_nats(model, batch) / batch["targets"].numel()
        loss.backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    after = activations(model, probe)
    found = {n: {"initial": _rms(value), "change": _rms(after[n] - value)} for n, value in before.items()}
    return {"width": recipe.width, "seed": recipe.seed, "activations": found, "losses": losses}


def activations(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Return the results of each layer's attention and MLP, of each layer, of the final norm and of the head.

    That of the norm is before its weight, which may have a tied head's factor of the width.
    """
    found: dict[str, Tensor] = {}
    with torch.no_grad(), _recorded(model, found):
        logits = model(input_ids=tokens, use_cache=False).logits
    return found | {"logits": logits.float()}


@contextmanager
def _recorded(model: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    """Keep what the modules give that are looked at, in the order of the model."""

    def keep(name: str) -> Any:
        def hook(module: nn.Module, _inputs: Any, given: Any) -> None:
            value = (given[0] if isinstance(given, tuple) else given).detach().float()
            found[name] = value / module.weight if name == FINAL_NORM else value.clone()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in _looked_at(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _looked_at(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return name and module of each activation but the logits."""
    body = next((m for m in model.modules() for c in m.children() if isinstance(c, nn.ModuleList)), None)
    layers: Any = [] if body is None else next(c for c in body.children() if isinstance(c, nn.ModuleList))
    chosen: list[tuple[str, nn.Module]] = []
    for number, layer in enumerate(layers):
        for kind, words in (("attention", _ATTENTION), ("mlp", _MLP)):
            for name, child in layer.named_children():
                if any(word in name for word in words) and "norm" not in name:
                    chosen.append((f"{kind} {number}", child))
        chosen.append((f"stream {number}", layer))
    if body is None or not any(name.startswith("attention") for name, _ in chosen):
        raise InputError("--recipe", f"{type(model).__name__} has no numbered layers of attention to look at")
    norms = [child for child in body.children() if "norm" in type(child).__name__.lower()]
    return chosen + [(FINAL_NORM, norm) for norm in norms[-1:]]


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def check_rules(recipe: Recipe, initialization: str) -> None:
    """Check on the meta device that a recipe has the rules that are asked for, before anything is trained.

    Raises:
        InputError: names the option.
    """
    causal: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = causal.from_config(model_config(recipe))
    for rule in (recipe.scaling, initialization):
        asked = replace(recipe, scaling=rule)
        build_optimizers(model, asked)
