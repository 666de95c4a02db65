"""Every model class of the installed transformers, and one model of a class on the meta device, nothing downloaded."""

from __future__ import annotations

import copy
import importlib
import inspect
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


def modeling_modules() -> list[str]:
    """Names of transformers' modules that define models, sorted: `transformers.models.llama.modeling_llama`."""
    root = Path(transformers.__file__).parent / "models"
    return [f"transformers.models.{path.parent.name}.{path.stem}" for path in sorted(root.glob("*/modeling_*.py"))]


def classes_of(module_name: str) -> list[type[PreTrainedModel]]:
    """The model classes that a module defines, by name, without the abstract bases of a family.

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


def build(cls: type[PreTrainedModel], *, num_labels: int | None = NUM_LABELS) -> nn.Module:
    """A model of default size on the meta device.

    Args:
        cls: of transformers, with a config class.
        num_labels: of its config and of the configs inside it; None leaves the default of 2.

    Returns:
        nn.Module: where a vocabulary's size equals another size of the default config, with a few rows more, so that
        a table or a head can be told by its rows; with the default sizes where the class does not take that.

    Raises:
        Exception: what the class's own code raises, of the default config.
    """
    config = _config(cls)
    if num_labels is not None:
        for part in configs(config):
            part.num_labels = num_labels
    distinct = copy.deepcopy(config)
    for part in configs(distinct):
        _make_distinct(part, distinct)
    try:
        return _on_meta(cls, distinct)
    except Exception:  # sizes that hang together
        return _on_meta(cls, config)


def _on_meta(cls: type[PreTrainedModel], config: Any) -> nn.Module:
    with torch.device("meta"):
        return cls(config)


def _config(cls: type[PreTrainedModel]) -> Any:
    """The default config of a class.

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
    """A config and all configs inside it, each once."""
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
    """Key and value of every integer of a config and of the configs and dicts inside it, its number of labels too."""
    for part in configs(config):
        yield "num_labels", part.num_labels
        yield from _integers(part.to_dict())


def _integers(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in values.items():
        for entry in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(entry, int) and not isinstance(entry, bool):
                yield key, entry
        if isinstance(value, dict) and key not in ("id2label", "label2id"):
            yield from _integers(value)


def _make_distinct(part: Any, whole: Any) -> None:
    """Add rows to each vocabulary of a config whose size is another size of the whole config as well."""
    others = Counter(value for key, value in integers(whole) if not VOCABULARY.search(key))
    for key, value in list(vars(part).items()):
        is_size = isinstance(value, int) and not isinstance(value, bool) and value > 2
        if is_size and VOCABULARY.search(key) and others[value] and not key.startswith("_"):
            setattr(part, key, value + 3)
