"""The model in question, without its weights: from a preset, a config.json, a folder or a hub name."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .classes import library, model_class, text_config
from .presets import NAMES, nearest, preset

# Sizes that a config.json must say itself: transformers would put a default of its own in their place.
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("moe_intermediate_size", "num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank"),
)


def load_config(model: str) -> Any:
    """transformers configuration of MODEL: a preset, a config.json, a folder with one, or a hub name ("org/name").

    Nothing but the configuration is read.

    Raises:
        ValueError: an unknown name, an unreadable file, a size that is missing; names it and the way out.
        ImportError: transformers is not installed.
    """
    known = preset(model)
    if known is not None:
        return _from_values(known, f"preset {model}")
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.exists():
            raise ValueError(f"{model}: this folder holds no config.json; give a model's folder, or a preset")
    if path.is_file():
        return _from_values(_read(path), str(path), path)
    if path.name == "config.json" or path.suffix == ".json":
        raise ValueError(f"{model}: no such file; give a config.json, a folder that holds one, or a preset")
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _from_hub(model)
    names = nearest(model)
    offer = f"did you mean {', '.join(names)}?" if names else f"the presets are {', '.join(NAMES)}"
    raise ValueError(f"{model}: neither a preset nor a file, a folder or a hub name (org/name); {offer}")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"{path}: has no 'model_type'; give the config.json of a transformers model")
    return values


def _from_values(values: Mapping[str, Any], where: str, path: Path | None = None) -> Any:
    auto = library().AutoConfig
    try:
        config = auto.for_model(**values) if path is None else auto.from_pretrained(str(path), trust_remote_code=False)
        default = type(config)()
        values = values if path is None else type(config).get_config_dict(str(path))[0]  # with saved infinities
    except Exception as error:
        raise ValueError(f"{where}: transformers rejects it: {' '.join(str(error).split())[:200]}") from None
    aliases = getattr(config, "attribute_map", {})
    for size in _SIZES:
        names = {size, aliases.get(size, size), *(alias for alias, name in aliases.items() if name == size)}
        usual = getattr(default, size, None)
        is_said = names & values.keys() or getattr(config, size, usual) != usual  # by a legacy name
        is_needed = "experts" not in size or getattr(config, "is_moe", True)
        if isinstance(usual, int) and is_needed and not (is_said or _is_usual(size, values, config)):
            raise ValueError(f"{where}: {size!r} is missing, and a {config.model_type} model needs it; add it")
    return config


def _is_usual(size: str, values: Mapping[str, Any], config: Any) -> bool:
    """Whether another key, a legacy name or a list of layers, says this size, and says what is the default."""
    for key, value in values.items():
        changed = value + 1 if type(value) is int else value[:-1] if isinstance(value, list) else value
        try:
            other = type(config).from_dict({**values, key: changed}) if changed != value else config
        except Exception:  # a number that does not fit the others says another size
            continue
        if getattr(other, size) != getattr(config, size):
            return True
    return False


def _from_hub(name: str) -> Any:
    auto = library().AutoConfig
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it tells of each attempt, and the error below of the last
    try:
        return auto.from_pretrained(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}: its config.json cannot be had from the hub: {reason}") from None
    finally:
        log.setLevel(level)


def build(config: Any, dtype: torch.dtype, lora_rank: int | None = None) -> nn.Module:
    """The model on the meta device, in training mode: see `classes.model_class`.

    Args:
        config: of `load_config`.
        dtype: of its weights.
        lora_rank: rank of a LoRA adapter on every linear layer but the head (fp32, the base frozen; a classifier's head
            is trained whole); None: none.

    Raises:
        ValueError: no class of transformers' builds it; with the reason.
        ImportError: peft, which makes the adapter, is not installed.
    """
    found, text = model_class(config), text_config(config)
    config = found.config
    config.use_cache = False
    for key in ("pad_token_id", "decoder_start_token_id") if found.own else ():
        if getattr(config, key, None) is None:  # any will do, and without one there is no batch
            setattr(config, key, 0)
    try:
        with torch.device("meta"), _quiet():
            model = found.make(config, dtype=dtype)
    except Exception as error:
        raise ValueError(
            f"{config.model_type}: no language model can be built from this configuration: {_said(error)}"
        ) from None
    beside = set() if found.own or text is config else _beside_text(model)
    for name in beside:
        model.get_parameter(name).requires_grad_(False)
    if lora_rank is not None:
        try:
            import peft
        except ImportError:
            raise ImportError("an adapter needs peft: pip install peft") from None
        excluded = [name.removesuffix(".weight") for name in beside if name.endswith(".weight")]
        adapter: Any = peft.LoraConfig(r=lora_rank, target_modules="all-linear", **_task(model, excluded))
        try:
            with _quiet():
                model = peft.get_peft_model(model, adapter, low_cpu_mem_usage=True)
        except Exception as error:
            raise ValueError(
                f"--lora: peft makes no adapter for this {config.model_type} model, leave it out: {_said(error)}"
            ) from None
    model.train()
    checked: nn.Module = model
    return checked


def _beside_text(model: Any) -> set[str]:
    """Names of the parameters that are not the language model's, embeddings and head included."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    text = {id(param) for part in parts if part is not None for param in part.parameters()}
    return {name for name, param in model.named_parameters() if id(param) not in text}


def _task(model: nn.Module, excluded: list[str]) -> dict[str, Any]:
    """What to tell peft, which leaves the head of a classifier without an adapter, and trains it."""
    kinds = {"ForTokenClassification": "TOKEN_CLS", "ForSequenceClassification": "SEQ_CLS"}
    task = next((kind for suffix, kind in kinds.items() if type(model).__name__.endswith(suffix)), None)
    if task is not None:  # by the ends of names; all that it trains whole must have no adapter
        heads = [name for name, _ in model.named_modules() if name.endswith(("classifier", "score"))]
        return {"task_type": task, "exclude_modules": excluded + heads}
    if getattr(model.config, "is_encoder_decoder", False):  # its wrapper would pass text to one that hears
        return {"exclude_modules": excluded}
    return {"task_type": "CAUSAL_LM", "exclude_modules": excluded}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def quantized_names(model: nn.Module) -> frozenset[str]:
    """Names of the weights that QLoRA keeps in NF4: those of the frozen linear layers but the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return frozenset(
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of libraries about their own next versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
