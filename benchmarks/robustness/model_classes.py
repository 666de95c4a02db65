"""Every model class of the installed transformers, and one model of a class on the meta device, nothing downloaded."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

NUM_LABELS = 37  # no width of any default config
# Keys of a config that hold the size of a vocabulary, of labels, or of a codebook; and numbers of experts.
VOCABULARY = re.compile(
    r"(^|_)vocab(ulary)?(_size)?(_per_layer_input|_raw)?$|vocab_size|codebook_size$|num_(codes|codebook_vectors|embeddings|audio_tokens|labels)$|"
    r"_num_labels$|num_(\w+_)?(classes|answers)$|(in|out)put_vocab_size$|(audio|speech|image|text)_tokens_size$"
)
EXPERTS = re.compile(r"(^|_)(n|num)_(\w+_)?experts$|num_experts|moe_num_experts|n_routed_experts")
# Classes that are made of two others, by the attribute names of their configs and the classes of small parts.
_PAIRS = {
    "EncoderDecoderModel": ("encoder", "BertConfig", "decoder", "BertConfig"),
    "VisionEncoderDecoderModel": ("encoder", "ViTConfig", "decoder", "GPT2Config"),
    "SpeechEncoderDecoderModel": ("encoder", "Wav2Vec2Config", "decoder", "BartConfig"),
    "VisionTextDualEncoderModel": ("vision", "ViTConfig", "text", "BertConfig"),
    "RagModel": ("question_encoder", "DPRConfig", "generator", "BartConfig"),
    "RagSequenceForGeneration": ("question_encoder", "DPRConfig", "generator", "BartConfig"),
    "RagTokenForGeneration": ("question_encoder", "DPRConfig", "generator", "BartConfig"),
    "MusicgenForConditionalGeneration": ("text_encoder", "T5Config", "decoder", "MusicgenDecoderConfig"),
}

_LAYERS = (
    "num_hidden_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "n_layer",
    "depth",
)
# What default configs leave open, and what those of single classes lack.
_OPEN: dict[str, Any] = {
    "prediction_length": 24,
    "context_length": 24,
    "vocabulary_map": {"<image>": 4},
    "vocab_size": 4099,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 704,
    "decoder_hidden_size": 512,
    "decoder_depth": 2,
    "decoder_num_heads": 16,
    "deepstack_layer_map": [(0, 0), (1, 1)],
    "spatial_target_layers": [2, 3],
    "downsample_rate": "1/2",
    "mlp_dim": 3072,
    "downsample_channels": [512, 1024],
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LACKING: dict[str, dict[str, Any]] = {
    "BeitConfig": {"out_indices": [3, 5, 7, 11]},
    "BridgeTowerConfig": {"contrastive_hidden_size": 512, "logit_scale_init_value": 2.6592},
    "CohereCompassTextConfig": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "DbrxAttentionConfig": {"rope_theta": 10000.0},
    "ReformerConfig": {"is_decoder": True},
    "SiglipVisionConfig": {"num_attention_heads": 16},
    "Gemma4TextConfig": {"hidden_size_per_layer_input": 0},
}


def modeling_modules() -> list[str]:
    """Return the sorted names of modules that define models: `transformers.models.llama.modeling_llama`."""
    root = Path(transformers.__file__).parent / "models"
    return [f"transformers.models.{path.parent.name}.{path.stem}" for path in sorted(root.glob("*/modeling_*.py"))]


def classes_of(module_name: str) -> list[type[PreTrainedModel]]:
    """Return the model classes that a module defines, by name, without the abstract bases of a family.

    Raises:
        Exception: what the import raises, such as an ImportError of a package that is not installed.
    """
    module = importlib.import_module(module_name)
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.__module__ == module_name
    ]
    names = {cls.__name__ for cls in found}
    is_base = {base.__name__ for cls in found for base in cls.__mro__[1:]} & names
    return sorted(
        (cls for cls in found if not (cls.__name__ in is_base and re.search(r"PreTrained|Preload", cls.__name__))),
        key=lambda cls: cls.__name__,
    )


def build(cls: type[PreTrainedModel], num_layers: int | None = None) -> nn.Module:
    """Build a model of default size on the meta device.

    Args:
        cls: of transformers, with a config class.
        num_layers: at most so many in each of its parts, where it takes that; None for the default.

    Returns:
        nn.Module: with 37 labels, and with a few rows more where the size of a vocabulary equals another size of the
        config, so that a table or a head can be told by its rows. A class that does not take that is built as its
        default config is, or with what that lacks, or from one of the configs inside it.

    Raises:
        Exception: what the class's own code raises, of the default config.
    """
    reason: Exception | None = None
    attempts = itertools.product(
        (_default, _filled), dict.fromkeys((num_layers, None)), ((_add_labels, _make_distinct), (_add_labels,), ())
    )
    for make, count, changes in attempts:
        try:
            config = make(cls)
            if count is not None:
                _shorten(config, count)
            for change in changes:
                change(config)
            return _on_meta(cls, config)
        except Exception as error:  # of the class's own code, whatever it is
            reason = reason if changes or count else reason or error
    for part in list(configs(_default(cls)))[1:]:
        try:
            _add_labels(part)
            return _on_meta(cls, part)
        except Exception:  # this part was not the one
            continue
    assert reason is not None
    raise reason


def _on_meta(cls: type[PreTrainedModel], config: Any) -> nn.Module:
    with torch.device("meta"):
        return cls(config)


def _default(cls: type[PreTrainedModel]) -> Any:
    """Return the default config of a class.

    Raises:
        ValueError: if it has none.
    """
    if cls.config_class is None:
        raise ValueError("no config class")
    if cls.__name__ not in _PAIRS:
        return cls.config_class()
    first, first_class, second, second_class = _PAIRS[cls.__name__]
    configs = {first: getattr(transformers, first_class)(), second: getattr(transformers, second_class)()}
    if second_class.startswith(("GPT2", "Bert", "Bart")):
        configs[second].is_decoder = configs[second].add_cross_attention = True
    if cls.config_class.__name__.startswith("VisionTextDual"):
        return cls.config_class(vision_config=configs["vision"].to_dict(), text_config=configs["text"].to_dict())
    return cls.config_class(**{name: part.to_dict() for name, part in configs.items()})


def configs(config: Any) -> Iterator[Any]:
    """Yield a config and all configs inside it, each once."""
    seen: set[int] = set()
    queue = [config]
    while queue:
        part = queue.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, (list, tuple)):
            queue += part
        elif hasattr(part, "to_dict"):
            yield part
            queue += vars(part).values()


def integers(config: Any) -> Iterator[tuple[str, int]]:
    """Yield key and value of each integer of a config, and of configs and dicts inside it, its number of labels too."""
    for part in configs(config):
        yield "num_labels", getattr(part, "num_labels", 0)
        yield from _integers(part.to_dict())


def _integers(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in ((str(key), value) for key, value in values.items()):
        for entry in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(entry, int) and not isinstance(entry, bool):
                yield key, entry
        if isinstance(value, dict) and key not in ("id2label", "label2id"):
            yield from _integers(value)


def _filled(cls: type[PreTrainedModel]) -> Any:
    """Return the default config with what it leaves open, and without timm."""
    config = _default(cls)
    for part in list(configs(config)):
        for key, value in {**_OPEN, **_LACKING.get(type(part).__name__, {})}.items():
            if getattr(part, key, 0) is None or key in _LACKING.get(type(part).__name__, {}):
                setattr(part, key, value)
        if vars(part).get("head_dim", 0) is None:
            part.head_dim = part.hidden_size // part.num_attention_heads
        if vars(part).get("num_key_value_heads", 0) is None:
            part.num_key_value_heads = part.num_attention_heads
        for key in ("layer_types", "mlp_layer_types"):
            if getattr(part, key, 0) is None:
                kinds = ("full_attention", "conv") if key == "layer_types" else ("dense", "sparse")
                setattr(part, key, [kinds[index % 2] for index in range(part.num_hidden_layers)])
        if isinstance(getattr(part, "hidden_sizes", None), tuple):
            part.hidden_sizes = list(part.hidden_sizes)
        if hasattr(part, "use_timm_backbone") or "Timm" in type(getattr(part, "backbone_config", None)).__name__:
            part.use_timm_backbone = False
            part.backbone_config = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    return config


def _shorten(config: Any, num_layers: int) -> None:
    """Keep the first layers alone, and what lists say of them."""
    for part in configs(config):
        for key in _LAYERS:
            before = getattr(part, key, None)
            if isinstance(before, int) and before > num_layers:
                setattr(part, key, num_layers)
                for other, value in list(vars(part).items()):
                    if isinstance(value, list) and len(value) == before:
                        setattr(part, other, value[:num_layers])


def _add_labels(config: Any) -> None:
    for part in configs(config):
        part.num_labels = NUM_LABELS


def _make_distinct(config: Any) -> None:
    """Add rows to each vocabulary of a config whose size is another size of the whole config, or a round number."""
    others = Counter(value for key, value in integers(config) if not VOCABULARY.search(key))
    for part in configs(config):
        for key, value in list(vars(part).items()):
            is_size = isinstance(value, int) and not isinstance(value, bool) and value > 2 and not key.startswith("_")
            if is_size and VOCABULARY.search(key) and (others[value] or value % 64 == 0) and key != "num_labels":
                setattr(part, key, value + 3)
