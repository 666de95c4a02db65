"""Which class of transformers a configuration is built by, and which part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What configurations call the most tokens; the first is what most do.
_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")


def library() -> Any:
    """Return transformers.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError("building a model needs transformers: pip install transformers") from None
    return transformers


def longest(config: Any) -> int | None:
    """Return the most tokens that the model takes, None where its configuration sets no limit (none, or -1)."""
    text = text_config(config)
    limits = (getattr(text, key, None) for key in _POSITIONS)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def text_config(config: Any) -> Any:
    """Return the part of a configuration that has the sizes of the language model: itself, or a nested one."""
    try:
        return config.get_text_config()
    except ValueError:  # it has several, such as those of a text encoder and a decoder
        return config.get_text_config(decoder=True)


@dataclass(frozen=True)
class Class:
    """A class of transformers: `make(config, dtype=...)` builds the model; `own`: it is built whole."""

    make: Any
    config: Any
    own: bool = False


def model_class(config: Any) -> Class:
    """Return transformers' class of a model.

    It is that of `architectures` for encoder-decoders and classifiers, else the causal language model: of a model that
    also sees or hears its text part, or the whole where transformers has no class for that part alone.

    Raises:
        ValueError: there is none of these.
    """
    known, text = library(), text_config(config)
    listed = getattr(config, "architectures", None)
    named = next((n for n in (listed if isinstance(listed, list) else [listed]) if isinstance(n, str)), "")
    own: Any = getattr(known, named, None) if named else None
    is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
    is_classifier = named.endswith(("ForSequenceClassification", "ForTokenClassification"))
    if hasattr(own, "_from_config") and (is_classifier or is_encoder_decoder):
        return Class(own._from_config, config, own=True)
    for kind in (known.AutoModelForSeq2SeqLM, known.AutoModelForSpeechSeq2Seq) if is_encoder_decoder else ():
        if type(config) in kind._model_mapping:
            return Class(kind.from_config, config, own=True)
    auto = known.AutoModelForCausalLM
    if type(text) in auto._model_mapping:
        return Class(auto.from_config, text)
    for kind in (auto, known.AutoModelForImageTextToText):
        if type(config) in kind._model_mapping:
            whole = kind._model_mapping[type(config)]
            is_text_part = getattr(whole, "config_class", None) is type(text)
            return Class(whole._from_config, text) if is_text_part else Class(kind.from_config, config)
    raise ValueError(
        f"{config.model_type}: transformers has no language model of this configuration{named and f' ({named})'}; give "
        "that of a causal language model, an encoder-decoder, or a text classifier"
    )


def notes(config: Any) -> tuple[str, ...]:
    """Return sentences on the parts of the model that are counted otherwise than they run.

    Those are all parts but the text part of a model that also sees or hears.
    """
    found, text = model_class(config), text_config(config)
    if found.own or text is config:
        return ()
    rest = ", ".join(name for name in config.sub_configs if getattr(config, name, None) not in (None, text))
    rest = f"the rest ({rest or 'the layers between'})"
    if found.config is config:
        return (
            f"The text part of this {config.model_type} model is trained, as in the scripts; of {rest} the weights are "
            "counted, frozen, and no pass.",
        )
    return (
        f"Only the text part ({text.model_type}) of this {config.model_type} model is counted: {rest} lies beside it, "
        "frozen in the scripts, and takes more.",
    )
