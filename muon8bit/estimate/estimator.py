"""The estimate: for each optimizer what lies in memory while it trains, and when it is the most.

    peak = weights + state + max(pass, step)
    pass = communication + activations with the gradients finished by then, at the worst operation
    step = gradients + workspace + staging

State on the host is not in the peak, which is the GPU's; what a step stages of it is `staging`, else 0.

Sharded, or with accumulation: pass = communication + all activations + all gradients, or the part's. With gradient
release there is no step of its own: pass = max(activations, activations when a gradient is finished + its own
workspace), and `gradients_bytes` are the two largest, of which `activations` hold those that are in the making; staging
is a parameter's, as workspace is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .._text import gib
from ..orthogonalize import device_kind
from . import classes, models
from .activations import Pass, trace
from .exchange import is_shared, shared_step_bytes
from .host import bus_bytes, host_bytes, is_on_host, staging_bytes
from .optimizers import FAMILY, OPTIMIZERS, state_bytes, step_bytes
from .setup import Setup
from .sizes import Sizes, measure
from .token_costs import TokenCosts, token_costs


@dataclass(frozen=True)
class Peak:
    """With or without activation checkpointing: bytes of activations and of everything, and the phase of the peak."""

    activations_bytes: int
    peak_bytes: int
    phase: str


@dataclass(frozen=True)
class Memory:
    """Bytes of one optimizer on one GPU; `plain` without activation checkpointing, `checkpointed` with it.

    `workspace_bytes` are what a step allocates at once, with what it sends and receives where GPUs share matrices.

    `state_bytes` is the size of the state, wherever it is. With it on the host `host_state_bytes` is the pinned memory
    that it takes there, more than the state, `staging_bytes` what a step stages of it on the GPU, and `bus_bytes` what
    a step moves between them; else they are 0. `checkpoint_bytes` are the tensors of a checkpoint of the scripts, of
    all GPUs; the headers of its files take some KiB more.
    """

    weights_bytes: int
    gradients_bytes: int
    state_bytes: int
    workspace_bytes: int
    communication_bytes: int
    plain: Peak
    checkpointed: Peak | None
    host_state_bytes: int = 0
    staging_bytes: int = 0
    bus_bytes: int = 0
    checkpoint_bytes: int = 0

    @property
    def resident_state_bytes(self) -> int:
        """Bytes of the state that is on the GPU all the time."""
        return 0 if self.host_state_bytes else self.state_bytes

    def peak(self, checkpointing: bool) -> Peak:
        """Return the peak with or without activation checkpointing; without, if the model does not support it."""
        return self.checkpointed if checkpointing and self.checkpointed is not None else self.plain


@dataclass(frozen=True)
class Estimate:
    """Every optimizer's memory for one setup.

    Attributes:
        setup: as asked.
        num_parameters: elements of all parameters.
        num_trained: elements of the trained ones.
        optimizers: memory by the names of `OPTIMIZERS`, and of the one of `FAMILY` that was asked for.
        costs: what a token takes.
        notes: sentences on parts of the model that are not counted, or that may run otherwise than they are counted.
    """

    setup: Setup
    num_parameters: int
    num_trained: int
    optimizers: dict[str, Memory]
    costs: TokenCosts
    notes: tuple[str, ...] = ()

    def peak_bytes(self, optimizer: str) -> int:
        """Return an optimizer's peak in bytes, with activation checkpointing if the setup has it."""
        return self.optimizers[optimizer].peak(self.setup.checkpointing).peak_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able record.

        Its keys are `num_parameters`, `num_active_parameters` (None where unknown), `num_trained_parameters`,
        `kv_cache_bytes_per_token` (None where there is no cache, or unknown), `setup`, `notes`, and `optimizers`, by
        the names of `OPTIMIZERS`. Each optimizer has state_bytes, weights_bytes, gradients_bytes, workspace_bytes,
        communication_bytes, host_state_bytes, staging_bytes, bus_bytes, checkpoint_bytes, activations_bytes,
        peak_bytes and peak_phase as set up. Under `without_checkpointing` and `with_checkpointing` it has
        {activations_bytes, peak_bytes, peak_phase}; the latter is None where the model does not support checkpointing.
        """
        optimizers = {}
        for name, memory in self.optimizers.items():
            sizes = (
                *("state", "weights", "gradients", "workspace", "communication"),
                *("host_state", "staging", "bus", "checkpoint"),
            )
            optimizers[name] = {
                **{f"{size}_bytes": getattr(memory, f"{size}_bytes") for size in sizes},
                **_peak_dict(memory.peak(self.setup.checkpointing)),
                "without_checkpointing": _peak_dict(memory.plain),
                "with_checkpointing": None if memory.checkpointed is None else _peak_dict(memory.checkpointed),
            }
        return {
            "num_parameters": self.num_parameters,
            "num_active_parameters": self.costs.active_parameters,
            "num_trained_parameters": self.num_trained,
            "kv_cache_bytes_per_token": self.costs.cache_bytes,
            "setup": dict(vars(self.setup)),
            "notes": list(self.notes),
            "optimizers": optimizers,
        }


def _peak_dict(peak: Peak) -> dict[str, Any]:
    return {"activations_bytes": peak.activations_bytes, "peak_bytes": peak.peak_bytes, "peak_phase": peak.phase}


class Estimator:
    """Estimates of one model; what several setups share is built and counted once.

    Args:
        config: transformers configuration, of `configs.load_config`.
        tell: called with what is built or counted next, as a few words; None: nobody is told.
    """

    def __init__(self, config: Any, tell: Callable[[str], object] | None = None) -> None:
        self.config, self._tell = config, tell
        self._models: dict[tuple[Any, ...], nn.Module] = {}
        self._passes: dict[tuple[Any, ...], Pass] = {}

    def estimate(self, setup: Setup, optimizer: str = "muon8bit") -> Estimate:
        """Estimate every optimizer's memory.

        Args:
            setup: how it trains.
            optimizer: one of `FAMILY` is estimated beside all `OPTIMIZERS`.

        Raises:
            ValueError: a sequence longer than the model takes, or a model that cannot be estimated.
            ImportError: transformers or peft is not installed.
        """
        model, sizes = self._sizes(setup)
        plain = self._pass(model, setup, False)
        can_checkpoint = getattr(model, "supports_gradient_checkpointing", True)
        checkpointed = self._pass(model, setup, True) if can_checkpoint else None
        names = (*OPTIMIZERS, optimizer) if optimizer in FAMILY else OPTIMIZERS
        optimizers = {name: _memory(name, sizes, setup, plain, checkpointed) for name in names}
        costs = token_costs(model, self.config)
        notes = classes.notes(self.config) + _notes(plain, sizes) + costs.notes
        num_trained = sum(param.num_elements for param in sizes.whole)
        return Estimate(setup, sizes.num_parameters, num_trained, optimizers, costs, notes)

    def memory(self, optimizer: str, setup: Setup) -> Peak:
        """Return one optimizer's peak as set up; unlike `estimate`, count only the pass that is asked for.

        Args:
            optimizer: of `OPTIMIZERS` or `FAMILY`.
            setup: with or without activation checkpointing.

        Raises:
            ValueError, ImportError: as `estimate`.
        """
        model, sizes = self._sizes(setup)
        return _memory(optimizer, sizes, setup, self._pass(model, setup, setup.checkpointing), None).plain

    def host_bytes(self, optimizer: str, setup: Setup) -> int:
        """Return the bytes of host memory that one optimizer's state takes, 0 where it is not kept there.

        Args:
            optimizer: of `OPTIMIZERS` or `FAMILY`.
            setup: as for `estimate`, with its errors.
        """
        return host_bytes(optimizer, self._sizes(setup)[1].trained) if is_on_host(optimizer, setup) else 0

    def _sizes(self, setup: Setup) -> tuple[nn.Module, Sizes]:
        longest = classes.longest(self.config)
        if longest is not None and setup.seq > longest:
            raise ValueError(f"--seq-len {setup.seq} exceeds the {longest} positions that the model has")
        key = (setup.weight_dtype, setup.rank, setup.targets, setup.dora)
        if key not in self._models:
            self._say(f"building {self.config.model_type} without weights")
            self._models[key] = models.build(self.config, *key)
        model = self._models[key]
        if setup.checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
            raise ValueError(f"a {self.config.model_type} model does not support activation checkpointing")
        return model, measure(model, setup)

    def _say(self, text: str) -> None:
        if self._tell is not None:
            self._tell(text)

    def _pass(self, model: nn.Module, setup: Setup, is_checkpointed: bool) -> Pass:
        key = (
            setup.batch,
            setup.seq,
            setup.weight_dtype,
            setup.rank,
            setup.targets,
            setup.dora,
            setup.qlora,
            setup.autocast,
            setup.loss_chunk,
            is_checkpointed,
        )
        if key not in self._passes:
            what = [f"batch {setup.batch} x {setup.seq}"]
            what += ["checkpointed"] if is_checkpointed else []
            what += [] if setup.loss_chunk is None else [f"loss by {setup.loss_chunk}"]
            self._say(f"counting a pass: {', '.join(what)}")
            self._passes[key] = trace(
                model,
                batch=setup.batch,
                seq=setup.seq,
                is_checkpointed=is_checkpointed,
                autocast=setup.autocast,
                loss_chunk=setup.loss_chunk,
                is_nf4=setup.qlora,
            )
        return self._passes[key]


def _notes(traced: Pass, sizes: Sizes) -> tuple[str, ...]:
    notes = []
    if sizes.unquantized_bytes:
        notes.append(
            "NF4 holds the linear layers of the base but the head; embeddings, head and norms stay unquantized, "
            f"{gib(sizes.unquantized_bytes - sizes.experts_bytes)} of the weights."
        )
    if sizes.experts_bytes:
        notes.append(
            f"The stacked experts stay unquantized too, {gib(sizes.experts_bytes)} of the weights: a 3-D parameter "
            "holds them all, and bitsandbytes makes NF4 of linear layers alone."
        )
    if traced.no_fused:
        notes.append(
            "This model's code does not run with fused attention and without a mask, so its activations are counted "
            f"with eager attention, which takes more ({traced.no_fused})."
        )
    unused = [param for param in sizes.whole if param.name not in traced.at_gradients]
    if unused:
        notes.append(
            f"No gradient reaches {len(unused)} tensors ({sum(param.num_elements for param in unused):,} elements), "
            f"such as {unused[0].name}; they are counted as trained."
        )
    return tuple(notes)


def _memory(name: str, sizes: Sizes, setup: Setup, plain: Pass, checkpointed: Pass | None) -> Memory:
    kind = "cuda" if setup.device == "cuda" else device_kind(torch.device("cpu"))
    # Newton-Schulz takes whole matrices, AdamW what lies here.
    taken = [p if p.is_muon and "muon" in name else q for p, q in zip(sizes.whole, sizes.trained, strict=True)]
    on_host, staging, gradients = is_on_host(name, setup), 0, sizes.gradients_bytes
    together = [[param] for param in taken] if setup.release else [taken]
    if is_shared(name, setup):
        workspace = shared_step_bytes(name, sizes.whole, sizes.trained, setup, kind)
    else:
        workspace = max(
            (step_bytes(name, params, kind, is_staged=on_host, is_cautious=setup.cautious) for params in together),
            default=0,
        )
    if setup.release:
        gradients = sum(sorted(param.num_bytes for param in sizes.trained)[-2:])
    if on_host:
        staging = max((staging_bytes(name, params, kind) for params in together), default=0)
    memory = Memory(
        weights_bytes=sizes.weights_bytes,
        gradients_bytes=gradients,
        state_bytes=state_bytes(name, sizes.trained),
        workspace_bytes=workspace,
        communication_bytes=sizes.communication_bytes,
        plain=Peak(0, 0, ""),
        checkpointed=None,
        host_state_bytes=host_bytes(name, sizes.trained) if on_host else 0,
        staging_bytes=staging,
        bus_bytes=bus_bytes(name, sizes.trained) if on_host else 0,
        checkpoint_bytes=sizes.saved_bytes + state_bytes(name, sizes.whole),
    )
    with_plain = replace(memory, plain=_peak(name, memory, plain, sizes, setup, kind))
    if checkpointed is None:
        return with_plain
    return replace(with_plain, checkpointed=_peak(name, memory, checkpointed, sizes, setup, kind))


def _peak(name: str, memory: Memory, traced: Pass, sizes: Sizes, setup: Setup, kind: str) -> Peak:
    more = sizes.dequantized_bytes
    activations = traced.activations_bytes + more
    phases: dict[str, int] = {}
    if setup.release:
        stepping, on_host = 0, is_on_host(name, setup)
        # What got no gradient from text, as a vision tower, is not stepped.
        for p in (param for param in sizes.whole if param.name in traced.at_gradients):
            taken = step_bytes(name, [p], kind, is_staged=on_host, is_cautious=setup.cautious)
            taken += staging_bytes(name, [p], kind) if on_host else 0
            stepping = max(stepping, traced.at_gradients[p.name] + taken)
        phases = {"backward": max(activations, stepping + more)}
    else:
        in_pass = traced.with_gradients_bytes + more
        if setup.num_shards > 1 or setup.accumulation > 1:
            in_pass = activations + memory.gradients_bytes
        in_step = memory.gradients_bytes + memory.workspace_bytes + memory.staging_bytes
        if setup.shard == "ddp":  # its buckets stay
            in_step += memory.communication_bytes
        phases = {traced.phase: in_pass + memory.communication_bytes, "step": in_step}
    phase = max(phases, key=lambda key: phases[key])
    return Peak(activations, memory.weights_bytes + memory.resident_state_bytes + phases[phase], phase)
