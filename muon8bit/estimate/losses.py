"""Inputs of a transformers model, and the loss of its pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as recompute

# Operations whose result has the values of what they were given.
_SAME_VALUES = ("_to_copy", "alias", "view", "_unsafe_view", "slice", "detach", "clone", "transpose", "expand")


class RefusedError(ValueError):
    """A kind of model, or an option for it, that is not known here; not a failure of the model's code."""


def inputs_of(model: Any, tokens: Tensor) -> dict[str, Any]:
    """Return what a model of this kind is called with besides a mask: text, or the sound that an encoder hears.

    Args:
        tokens: [batch, seq] int64, the text and the labels.

    Raises:
        RefusedError: it takes something else.
    """
    config, name = model.config, type(model).__name__
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions
        sound = torch.zeros(len(tokens), config.num_mel_bins, frames, dtype=model.dtype, device=tokens.device)
        return {"input_features": sound, "labels": tokens}
    if main != "input_ids":
        raise RefusedError(
            f"{name} takes {main}, whose shape is not known here; models are estimated that take text, or sound as "
            "Whisper does"
        )
    if name.endswith("ForSequenceClassification"):
        return {"input_ids": tokens, "labels": tokens[:, 0]}
    return {"input_ids": tokens, "labels": tokens}


def loss_of(model: Any, tokens: Tensor, chunk: int | None, **mask: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token, 0-d.

    Args:
        model: a transformers model, maybe with an adapter.
        tokens: [batch, seq] int64, the text and the labels.
        chunk: tokens whose logits exist at once; they are recomputed in the backward pass. None: the model's own loss,
            over all logits at once.
        mask: the model's mask as a keyword argument, if it needs one.

    Raises:
        RefusedError: the model has no loss, or with `chunk` is no causal language model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    if chunk is None:
        cache = {} if name.endswith("Classification") else {"use_cache": False}
        whole = getattr(model(**inputs_of(base, tokens), **mask, **cache), "loss", None)
        if not isinstance(whole, Tensor):
            raise RefusedError(f"{name} has no loss; give in 'architectures' a class with a head that is trained")
        return whole
    head = _head(base)
    states = getattr(base.base_model(input_ids=tokens, use_cache=False, **mask), "last_hidden_state", None)
    if states is None:
        raise RefusedError(f"--loss-chunk: {name} has no part that ends before its head; leave it out")
    hidden = states[:, :-1].flatten(0, 1)
    targets = tokens[:, 1:].flatten()

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        logits = functional.linear(states, head.weight, head.bias)
        return functional.cross_entropy(logits.float(), wanted, reduction="sum")

    parts = [
        recompute(part, states, wanted, use_reentrant=False)
        for states, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.stack(parts).sum() / len(targets)


def _head(base: Any) -> Any:
    head, name = base.get_output_embeddings(), type(base).__name__
    if head is None or getattr(base.config, "is_encoder_decoder", False):
        raise RefusedError(f"--loss-chunk is for causal language models, and {name} is none; leave it out")
    return head


@torch.no_grad()
def check_head(model: Any, tokens: Tensor) -> None:
    """Find out whether a model's logits are what its head gives: only then are they computed right in chunks.

    Args:
        model: a causal language model, maybe with an adapter.
        tokens: [1, seq] int64; a few are enough.

    Raises:
        RefusedError: it scales or caps them, as Gemma-2 does, or has no head.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, follow = _head(base), _SameValues()
    handle = head.register_forward_hook(lambda _module, _args, out: follow.begin(out))
    try:
        with follow:
            logits = getattr(model(input_ids=tokens, use_cache=False), "logits", None)
    finally:
        handle.remove()
    if not isinstance(logits, Tensor) or not follow.has(logits):
        name = type(base).__name__
        raise RefusedError(f"--loss-chunk: {name} changes the logits that its head gives; leave it out")


class _SameValues(TorchDispatchMode):
    """Follows a tensor through operations that leave its values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: list[Any] = []

    def begin(self, tensor: Tensor) -> None:
        self._storages = [tensor.untyped_storage()]

    def has(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage()._cdata == storage._cdata for storage in self._storages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in _SAME_VALUES and isinstance(args[0], Tensor) and self.has(args[0]):
            self._storages.append(out.untyped_storage())
        elif name.endswith("_") and not name.startswith("_") and args and isinstance(args[0], Tensor):
            changed = args[0].untyped_storage()._cdata
            self._storages = [storage for storage in self._storages if storage._cdata != changed]
        return out
