"""Bytes alive during one forward and backward pass, counted on fake tensors: nothing is computed or allocated.

    activations(t) = bytes of all tensor storages alive at t, less parameters, buffers and finished gradients
    pass(t)        = activations(t) + bytes of the gradients finished by then

Both at their maxima over all operations t of the real modeling code, forward and backward. Attention is torch's fused
kernel, which keeps no [seq, seq] matrix; temporaries inside one operation are not seen.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .losses import RefusedError, check_head, loss_of
from .models import as_nf4

_NOT_WRITTEN = "transformers has none for its class"
_NO_VALUES = "its code asks for the values of tensors"


@dataclass(frozen=True)
class Pass:
    """Maxima over one forward and backward pass.

    Attributes:
        activations_bytes: most bytes of activations at once.
        with_gradients_bytes: most bytes of activations together with the gradients finished by then.
        phase: in which `with_gradients_bytes` is reached, "forward" or "backward".
        at_gradients: for each parameter the bytes of activations, its own gradient included, when that gradient is
            finished; all earlier gradients are freed.
        no_fused: why the model's code does not run with fused attention and no mask, so that eager attention with a
            mask was counted; "" where the fused pass was counted.
    """

    activations_bytes: int
    with_gradients_bytes: int
    phase: str
    at_gradients: dict[str, int]
    no_fused: str = ""


def run_op(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
    """Run an operation on fake tensors, also where these know fewer dtypes of it than are computed."""
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:  # of experts
        return func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **(kwargs or {})).to(args[0].dtype)
    return func(*args, **(kwargs or {}))


class _Live(TorchDispatchMode):
    """Counts the storages that operations make until they die."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "forward"
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._keep = [tensor.untyped_storage() for tensor in known]
        self._watches: dict[int, Any] = {}
        self._live = self._gradients = self._peak = self._pass_peak = 0
        self._at_gradients: dict[str, int] = {}
        self._pass_phase = self.phase

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = run_op(func, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        if self._live > self._pass_peak:
            self._pass_peak, self._pass_phase = self._live, self.phase
        self._peak = max(self._peak, self._live - self._gradients)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._live += storage.nbytes()
            self._watches[key] = weakref.ref(storage, partial(self._forget, key))

    def _forget(self, key: int, _: object) -> None:
        self._live -= self._sizes.pop(key)
        del self._watches[key]

    def finish(self, name: str, param: Tensor) -> None:
        """Note that the gradient of `param` is complete: from now on its bytes are a gradient's and no activation's."""
        assert param.grad is not None
        self._add(param.grad)
        self._at_gradients[name] = self._live - self._gradients
        self._gradients += param.grad.untyped_storage().nbytes()

    def result(self) -> Pass:
        return Pass(self._peak, self._pass_peak, self._pass_phase, self._at_gradients)


def trace(
    meta_model: nn.Module,
    *,
    batch: int,
    seq: int,
    is_checkpointed: bool,
    autocast: torch.dtype | None = None,
    loss_chunk: int | None = None,
    is_nf4: bool = False,
) -> Pass:
    """Count one pass of a causal language model with its cross-entropy loss.

    Nobody keeps the logits once the loss is known. A model whose code does not run with fused attention and without a
    mask, as one that reads its mask itself, is counted with eager attention and a mask: `Pass.no_fused` says so.

    Args:
        meta_model: a transformers model on the meta device; it is copied.
        batch: sequences of `seq` tokens each.
        is_checkpointed: recompute the activations of each layer in the backward pass.
        autocast: dtype of automatic mixed precision; None without it.
        loss_chunk: tokens whose logits exist at once; None for all of them.
        is_nf4: the frozen linear layers are those of a base in NF4.

    Raises:
        ValueError: the model cannot be checkpointed, or its passes fail both ways; with the reason of each.
    """
    how: dict[str, Any] = {
        "batch": batch,
        "seq": seq,
        "is_checkpointed": is_checkpointed,
        "autocast": autocast,
        "loss_chunk": loss_chunk,
        "is_nf4": is_nf4,
    }
    own: Any = meta_model
    has_fused = getattr(own.get_base_model() if hasattr(own, "get_base_model") else own, "_supports_sdpa", True)
    try:
        if not has_fused:  # as transformers would run it
            return replace(_passed(meta_model, "eager", **how), no_fused=_NOT_WRITTEN)
        return _passed(meta_model, fused_attention(), **how)
    except RefusedError:
        raise
    except Exception as error:  # whatever a model's own code meets
        first, no_fused = error, reason(error)
    try:
        return replace(_passed(meta_model, "eager", is_masked=True, **how), no_fused=no_fused)
    except Exception as error:
        eager = reason(error)
    reasons = f"with fused attention {no_fused}; with eager attention and a mask {eager}"
    reasons = no_fused if eager == no_fused else reasons
    way_out = (
        "measure a short run" if _NO_VALUES in eager else "check the sizes in its config.json, or measure a short run"
    )
    raise ValueError(
        f"the activations of this model cannot be counted without running it: {reasons}; {way_out}"
    ) from first


def reason(error: Exception) -> str:
    """Return why a pass on fake tensors failed, in words without a full stop."""
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return f"{_NO_VALUES} ({error.func})"
    text = " ".join(str(error).split())[:200].rstrip(".")
    return f"{type(error).__name__}: {text or 'it gives no reason'}"


@contextmanager
def unlogged() -> Iterator[None]:
    """Keep torch from logging the traceback of an operation that fails; here the error is one sentence."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _passed(
    meta_model: nn.Module,
    attention: str,
    *,
    batch: int,
    seq: int,
    is_checkpointed: bool,
    autocast: torch.dtype | None,
    loss_chunk: int | None,
    is_nf4: bool,
    is_masked: bool = False,
) -> Pass:
    """Count one pass with an implementation of attention, with a mask if the model's own code reads it."""
    model: Any = deepcopy(meta_model)
    for module in model.modules():
        if hasattr(module, "layerdrop"):  # layers left out at random: count the pass that leaves out none
            module.layerdrop = 0.0
    if is_nf4:
        as_nf4(model)
    if is_checkpointed:
        checkpoint(model)
    with FakeTensorMode(), unlogged():
        model.config._attn_implementation = attention
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        model.tie_weights()  # which moving them one by one has undone
        known = [*model.parameters(), *model.buffers()]
        tokens = torch.zeros(batch, seq, dtype=torch.long, device="cpu")
        mask = {"attention_mask": torch.ones(batch, seq, dtype=torch.long, device="cpu")} if is_masked else {}
        if loss_chunk is not None:
            check_head(model, tokens[:1, :4])
        live = _Live(known)
        with _hooked(model, live.finish), live:
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                loss = loss_of(model, tokens, loss_chunk, **mask)
            live.phase = "backward"
            loss.backward()
    return live.result()


def fused_attention() -> str:
    """Register causal attention by torch's fused kernel, without a mask, and return its name in transformers.

    With fake tensors transformers' own path makes a mask and repeats keys and values, which a real run does not.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name = "muon8bit_fused"
    AttentionInterface.register(name, _attend)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    return name


def _attend(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Compute causal attention in the form that transformers asks for.

    Query, key and value are [batch, heads, seq, head_dim]; the result is [batch, seq, heads, head_dim].
    """
    assert attention_mask is None
    width, gap = value.shape[-1], query.shape[-1] - value.shape[-1]
    if gap > 0:  # MLA's values are narrower than its keys; the CPU's fused kernel wants them equal
        value = functional.pad(value, (0, gap))
    is_grouped = key.shape[1] != query.shape[1]
    scale = options.get("scaling")
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped)
    return out[..., :width].transpose(1, 2).contiguous(), None


def checkpoint(model: Any) -> None:
    """Let a transformers model recompute activations in the backward pass."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    elif getattr(model, "supports_gradient_checkpointing", False):  # its name in earlier versions of transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    else:
        raise RefusedError(f"{type(model).__name__} does not support activation checkpointing; leave it out")


@contextmanager
def _hooked(model: nn.Module, finish: Callable[[str, Tensor], None]) -> Iterator[None]:
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    handles = [param.register_post_accumulate_grad_hook(partial(finish, name)) for name, param in trained]
    yield
    for handle in handles:
        handle.remove()
