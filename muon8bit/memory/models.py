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


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError("building a model needs transformers: pip install 'muon8bit[train]'") from None
    return transformers


def longest(config: Any) -> int | None:
    """Return the most tokens that the model takes, None where its configuration sets no limit (none, or -1)."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _from_values(values: Mapping[str, Any], where: str, path: Path | None = None) -> Any:
    auto = _transformers().AutoConfig
    try:
        config = auto.for_model(**values) if path is None else auto.from_pretrained(str(path), trust_remote_code=False)
        default = type(config)()
    except Exception as error:
        raise ValueError(f"{where}: transformers rejects it: {' '.join(str(error).split())[:200]}") from None
    aliases = getattr(config, "attribute_map", {})
    for size in _SIZES:
        names = {size, aliases.get(size, size), *(alias for alias, name in aliases.items() if name == size)}
        usual = getattr(default, size, None)
        is_said = names & values.keys() or getattr(config, size, usual) != usual  # by a legacy name
        is_needed = "experts" not in size or getattr(config, "is_moe", True)
        if isinstance(usual, int) and is_needed and not is_said:
            raise ValueError(f"{where}: {size!r} is missing, and a {config.model_type} model needs it; add it")
    return config


def _from_hub(name: str) -> Any:
    auto = _transformers().AutoConfig
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


def _model_class(config: Any) -> tuple[Any, Any]:
    """Return transformers' class of a model, and the configuration that it is built from.

    The class is that of `architectures` for encoder-decoders and classifiers, else the causal language model: of a
    model that also sees or hears its text part, which the scripts train.
    """
    library = _transformers()
    auto, named = library.AutoModelForCausalLM, (getattr(config, "architectures", None) or [""])[0]
    own = getattr(library, named, None)
    is_classifier = named.endswith(("ForSequenceClassification", "ForTokenClassification"))
    if own is not None and (is_classifier or getattr(config, "is_encoder_decoder", False)):
        return own._from_config, config
    text = config.get_text_config()
    return auto.from_config, text if type(text) in auto._model_mapping else config


def notes(config: Any) -> tuple[str, ...]:
    """Sentences on what of the model is not counted: all but the text part of one that also sees or hears."""
    _, built = _model_class(config)
    if built is config:
        return ()
    others = [name for name in config.sub_configs if getattr(config, name, None) not in (None, built)]
    return (
        f"Only the text part ({built.model_type}) of this {config.model_type} model is counted: the rest "
        f"({', '.join(others) or 'the layers between'}) lies beside it, frozen in the scripts, and takes more.",
    )


def build(config: Any, dtype: torch.dtype, lora_rank: int | None = None) -> nn.Module:
    """The model on the meta device, in training mode: see `_model_class`.

    Args:
        config: of `load_config`.
        dtype: of its weights.
        lora_rank: rank of a LoRA adapter on every linear layer but the head (fp32, the base frozen); None: none.

    Raises:
        ValueError: no class of transformers' builds it; with the reason.
        ImportError: peft, which makes the adapter, is not installed.
    """
    make, config = _model_class(config)
    config.use_cache = False
    try:
        with torch.device("meta"), _quiet():
            model = make(config, dtype=dtype)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"{config.model_type}: no language model can be built from this configuration: {reason}"
        ) from None
    if lora_rank is not None:
        try:
            import peft
        except ImportError:
            raise ImportError("an adapter needs peft: pip install 'muon8bit[train]'") from None
        adapter: Any = peft.LoraConfig(r=lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with _quiet():
            model = peft.get_peft_model(model, adapter, low_cpu_mem_usage=True)
    model.train()
    checked: nn.Module = model
    return checked


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
