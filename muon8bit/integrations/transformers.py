"""Muon8bit for Hugging Face's Trainer and its subclasses (TRL's SFTTrainer): `optimizer_cls_and_kwargs`."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from glob import escape
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from muon8bit import Muon8bit, param_groups

_GROUP_OPTIONS = frozenset(inspect.signature(param_groups).parameters) - {"model"}
# What the groups say of each parameter, and eps, which would be one name for two things (adamw_eps is AdamW's).
_OPTIONS = _GROUP_OPTIONS | (frozenset(inspect.signature(Muon8bit).parameters) - {"params", "eps"})


class Muon8bitFactory:
    """Factory of the optimizer, for `Trainer(optimizer_cls_and_kwargs=(Muon8bitFactory, {...}))`.

    Trainer calls `Muon8bitFactory()(model, **kwargs)` and gives it the model alone: `muon8bit_for_trainer` makes the
    pair with the values of TrainingArguments.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            raise TypeError(
                "Muon8bitFactory was called as an optimizer class, as transformers before 5.2 does: upgrade it, or "
                "pass optimizers=(Muon8bit(param_groups(model, lr=...)), None) to Trainer"
            )

    def __call__(self, model: nn.Module, *, lr: float | None = None, **options: Any) -> Muon8bit:
        """Return the optimizer of the model's trainable parameters.

        Weight decay is 0 where `param_groups` or Trainer's own rule (`get_decay_parameter_names`: norms and biases,
        by name and module) says so. Without `weight_decay` it is that of `param_groups`, 0.1, not TrainingArguments'.

        Args:
            model: as Trainer hands it over, adapters included; floating parameters that are not sharded.
            lr: as in `param_groups`; required.
            options: of `param_groups` (weight_decay, adamw_lr, adamw_betas, patterns, loraplus_ratio, ...) and of
                `Muon8bit` (momentum, codebook, bits, param_rounding, ...).

        Raises:
            ValueError: lr missing, an unknown option, or what `param_groups` and `Muon8bit` raise.
            NotImplementedError: `shard_state=True`.
        """
        if lr is None:
            raise ValueError(
                "Muon8bitFactory needs lr: Trainer does not hand the learning rate of TrainingArguments to a factory. "
                "Use optimizer_cls_and_kwargs=muon8bit_for_trainer(args), or (Muon8bitFactory, {'lr': ...})"
            )
        _check_names(options)
        if options.get("shard_state"):
            raise NotImplementedError(
                "shard_state=True cannot be used in Trainer, which takes state_dict() on one rank alone: use "
                "fully_shard (fsdp_version 2), whose state is sharded too, or Accelerate with "
                "muon8bit.integrations.accelerate.register"
            )
        decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # does not use self
        exempt = [name for name, p in model.named_parameters() if p.ndim > 1 and name not in decayed]
        options["no_decay"] = [*options.get("no_decay", ()), *map(escape, exempt)]
        group_options = {key: options.pop(key) for key in _GROUP_OPTIONS & options.keys()}
        return Muon8bit(param_groups(model, lr=lr, **group_options), **options)


def muon8bit_for_trainer(args: TrainingArguments, **options: Any) -> tuple[type[Any], dict[str, Any]]:
    """Return what `Trainer(model, args, optimizer_cls_and_kwargs=...)` takes to train by Muon8bit.

    Args:
        args: `learning_rate`, `weight_decay`, `adam_beta1`, `adam_beta2` and `adam_epsilon` are taken from here. With
            `adjust_lr_fn="match_rms_adamw"`, the default, one learning rate serves Muon and AdamW.
        options: further options of `Muon8bitFactory`; they win over `args`.

    Returns:
        (Muon8bitFactory, its keyword arguments).

    Raises:
        ValueError: an unknown option; `args.optim` or `args.optim_args`, which this would silently override.
        NotImplementedError: `args` asks for DeepSpeed, which flattens the matrices that Muon needs whole.
    """
    _check_names(options)
    if args.deepspeed_plugin is not None:
        raise NotImplementedError(
            "Muon8bit cannot run under DeepSpeed, which flattens the matrices that Muon needs whole: use DDP, that is "
            "torchrun or accelerate launch without a DeepSpeed config"
        )
    default = type(args).__dataclass_fields__["optim"].default
    if args.optim_args or args.optim != default:
        raise ValueError(
            f"{args.optim} and optim_args={args.optim_args!r} of TrainingArguments would be ignored: "
            "leave both out, and pass Muon8bit's options to muon8bit_for_trainer(args, ...)"
        )
    from_args = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "adamw_betas": (args.adam_beta1, args.adam_beta2),
        "adamw_eps": args.adam_epsilon,
    }
    return Muon8bitFactory, from_args | options


def _check_names(options: dict[str, Any]) -> None:
    """Raise ValueError for an option that neither `param_groups` nor `Muon8bit` has."""
    for key in options.keys() - _OPTIONS:
        hints = {"betas": "adamw_betas", "eps": "adamw_eps", "learning_rate": "lr"}
        near = [hints[key]] if key in hints else get_close_matches(key, _OPTIONS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(_OPTIONS))}"
        raise ValueError(f"unknown option {key!r}{hint}")
