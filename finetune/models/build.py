"""The model of a run: built from a configuration, or loaded to be trained further."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from finetune.config.errors import InputError
from finetune.config.recipe import Recipe
from finetune.config.width import SCALED
from finetune.data.readers import reach_hub
from finetune.models.weights import first_line, freeze_beside_text, load_whole, longest_of, model_class, text_config
from finetune.parallel.launch import plain_parameters, whole
from muon8bit import Scaling


def model_config(recipe: Recipe) -> Any:
    """Return the transformers configuration of the model to train; of a new model that takes images, its text part's.

    Raises:
        InputError: transformers does not know it, or rejects a value.
    """
    option = "--init-from" if recipe.init_from else "--model-config"
    if recipe.init_from:
        reach_hub(recipe.init_from, option, "config.json")
    try:
        if recipe.init_from:
            config = AutoConfig.from_pretrained(recipe.init_from)
        else:
            config = AutoConfig.for_model(**recipe.sized_model)
            _check_keys(recipe.model, type(config)().to_dict())
            if recipe.width is not None:
                _check_sizes(recipe.model, config)
            config = text_config(config)
    except InputError:
        raise
    except Exception as error:
        raise InputError(option, f"transformers rejects it: {first_line(error)}") from None
    longest = longest_of(config)
    if longest is not None and (recipe.seq_len or 0) > longest:
        raise InputError(
            "--seq-len",
            f"{recipe.seq_len} exceeds the model's max_position_embeddings {longest}; give at most {longest}",
        )
    return config


def _check_keys(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Check for slips: transformers keeps unknown keys, so one that is almost a known key is refused here."""
    for key in given:
        close = [] if key in known else get_close_matches(key, known, n=1, cutoff=0.8)
        if close and close[0] not in given:
            raise InputError("--model-config", f"the model has no key {key!r}; did you mean {close[0]!r}?")


def _check_sizes(given: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Check that a model that is made wider or narrower states every size that changes: a default would not.

    A default that no layer uses, as the experts' size in a dense model, may stay.
    """
    alias = config.attribute_map
    for key in SCALED:
        is_stated = key in given or alias.get(key) in given or any(alias.get(name) == key for name in given)
        size = getattr(type(config)(), key, None)
        if not is_stated and type(size) is int and _shapes(config) != _shapes(config, {key: 2 * size}):
            raise InputError("--width", f"the model states no {key}, which is scaled; write it into the model")


def _shapes(config: PretrainedConfig, change: Mapping[str, int] | None = None) -> list[torch.Size]:
    """Return the shapes of the parameters of a model, with a size of its configuration changed."""
    causal: Any = AutoModelForCausalLM
    changed = copy.deepcopy(config)
    for key, size in (change or {}).items():
        setattr(changed, key, size)
    with torch.device("meta"):
        return [param.shape for param in causal.from_config(changed).parameters()]


def config_hash(config: PretrainedConfig) -> str:
    """Return the hex SHA-256 of a configuration's values, without the version of transformers."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def make_scaling(recipe: Recipe) -> Scaling | None:
    """Return the rule that carries a recipe's rates from the width of its model as written; None for no rule."""
    if recipe.scaling == "none":
        return None
    rule: Any = recipe.scaling
    name = {"muon": "muon8bit", "adamw8bit": "adamw"}.get(recipe.optimizer, recipe.optimizer)
    return Scaling(rule, base=model_config(replace(recipe, width=None)), optimizer=name)


def check_vocabulary(config: Any, tokenizer: Any, option: str) -> None:
    """Check that every token id has an embedding; `option` is the one that gave the tokenizer.

    Raises:
        InputError: the tokenizer is larger than the model's vocabulary.
    """
    vocab_size = text_config(config).vocab_size
    if len(tokenizer) <= vocab_size:
        return
    ways_out = {
        "--model": "give --resize-embeddings, or save the tokenizer without the tokens that were added",
        "--tokenizer": "give a smaller tokenizer, or a --model-config with a larger vocabulary",
    }
    sizes = f"{len(tokenizer)} tokens and the model's vocab_size is {vocab_size}"
    raise InputError(option, f"{'its tokenizer' if option == '--model' else 'it'} has {sizes}; {ways_out[option]}")


def build_model(recipe: Recipe, config: Any, tokenizer: Any, device: torch.device) -> Any:
    """Build the model in the recipe's dtype: random from torch's seed, on the CPU, or pretrained, on the device.

    Raises:
        InputError: weights are missing or cannot be loaded, the architecture is no causal language model, or
            --scaling has no rule for it.
    """
    model: Any
    causal: Any = AutoModelForCausalLM
    dtype = torch.bfloat16 if recipe.dtype == "bf16" else torch.float32
    if recipe.init_from:
        kind = model_class(config) or causal
        model = load_whole(kind, recipe.init_from, "--init-from", device, dtype=dtype)
        freeze_beside_text(model)
    else:
        config.eos_token_id = config.bos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        try:
            model = causal.from_config(config, dtype=dtype)
        except Exception as error:
            reason = f"transformers cannot build the model: {first_line(error)}"
            raise InputError("--model-config", reason) from None
        try:
            if scaling := make_scaling(recipe):
                scaling.initialize(model)
        except ValueError as error:
            raise InputError("--scaling", str(error)) from None
    if recipe.activation_checkpointing:
        checkpoint_activations(model)
    model.train()
    return model


def logits_of(model: nn.Module, **arguments: Tensor) -> Tensor:
    """Return the fp32 logits of a causal language model that Accelerate has not prepared.

    fp32 norms or adapters among bf16 weights, as those of an NF4 base, need the automatic mixed precision used here.
    """
    param = next(model.parameters())
    with torch.autocast(param.device.type, torch.bfloat16, enabled=param.dtype == torch.bfloat16):
        logits: Tensor = model(**arguments, use_cache=False).logits
    return logits.float()


def checkpoint_activations(model: Any) -> None:
    """Let a transformers model recompute activations in the backward pass.

    Raises:
        InputError: the architecture cannot.
    """
    options = {"use_reentrant": False}
    try:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:  # its name in earlier versions of transformers
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    except ValueError as error:
        raise InputError("--activation-checkpointing", f"{first_line(error)}; leave it out") from None


def parameter_hash(model: nn.Module) -> str:
    """Return the hex SHA-256 of all trained parameters, in order, with their names: equal where they agree to the bit.

    The names are those of the model inside of wrappers. Sharded parameters are gathered one at a time, by all ranks.
    """
    digest = hashlib.sha256()
    for name, param in plain_parameters(model):
        if not param.requires_grad:
            continue
        digest.update(name.encode())
        digest.update(whole(param.detach()).float().cpu().numpy().tobytes())
    return digest.hexdigest()
