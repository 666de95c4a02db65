"""The model in question, without its weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .classes import model_class, text_config


def build(
    config: Any,
    dtype: torch.dtype,
    lora_rank: int | None = None,
    targets: str = "all-linear",
    dora: bool = False,
) -> nn.Module:
    """Build the model on the meta device, in training mode: see `classes.model_class`.

    Args:
        config: of `configs.load_config`.
        dtype: of its weights.
        lora_rank: rank of a LoRA adapter on every linear layer but the head (fp32, the base frozen; a classifier's head
            is trained whole); None: none.
        targets: names of the modules that have the adapter, with commas, or "all-linear".
        dora: with a vector of magnitudes for each.

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
        modules: Any = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
        adapter: Any = peft.LoraConfig(r=lora_rank, target_modules=modules, use_dora=dora, **_task(model, excluded))
        try:
            with _quiet():
                model = peft.get_peft_model(model, adapter, low_cpu_mem_usage=True)
        except Exception as error:
            raise ValueError(
                f"--mode lora: peft makes no adapter for this {config.model_type} model, leave it out: {_said(error)}"
            ) from None
    model.train()
    checked: nn.Module = model
    return checked


def _beside_text(model: Any) -> set[str]:
    """Return the names of the parameters outside the language model, whose embeddings and head count as inside."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    text = {id(param) for part in parts if part is not None for param in part.parameters()}
    return {name for name, param in model.named_parameters() if id(param) not in text}


def _task(model: nn.Module, excluded: list[str]) -> dict[str, Any]:
    """Return options for peft, which leaves a classifier's head without an adapter and trains the head whole."""
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
    """Return the names of the weights that QLoRA keeps in NF4: those of the frozen linear layers but the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return frozenset(
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore warnings of libraries, such as those about their next versions or about adapters that they change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Matmul(torch.autograd.Function):
    """x @ weight.T, which keeps the weight alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return torch.matmul(grads[0], weight), None, None


_matmul: Any = _Matmul.apply


class _Nf4Linear(nn.Linear):
    """Computes in the dtype of the weight and returns the dtype of its input; peft clones what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        given = x.dtype
        out: Tensor = _matmul(x.to(self.weight.dtype), self.weight, self.bias)
        return out.to(given).clone()


def as_nf4(model: nn.Module) -> None:
    """Let a model on the meta device allocate in a pass what it would on a base in NF4, without the codes; in place.

    Source: bitsandbytes 0.50 `Linear4bit` and `MatMul4Bit`, and peft's layer around them. Norms are in fp32.
    """
    names = quantized_names(model)
    for name, module in model.named_modules():
        if f"{name}.weight" in names:
            module.__class__ = _Nf4Linear
        elif "Norm" in type(module).__name__:
            module.float()
