"""The optimizer classes that are looked at, and how each is given parameters, as its documentation has it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# How a class is given a model: its tensors, (name, tensor) pairs, or the groups that muon8bit.param_groups makes.
DOORS = ("tensors", "named", "param_groups")
LR = 1e-3


@dataclass(frozen=True)
class Subject:
    """One class with its options.

    Args:
        name: in the tables.
        package: the distribution whose version is told.
        target: `module:Class`.
        options: of the constructor, beside lr; weight decay is 0 unless given.
        door: one of `DOORS`.
        lr: learning rate.
        is_ours: whether a check that fails makes the exit status 1.
    """

    name: str
    package: str
    target: str
    options: dict[str, Any] = field(default_factory=dict)
    door: str = "tensors"
    lr: float = LR
    is_ours: bool = False

    @property
    def kind(self) -> Any:
        """The class; importing it may fail."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)

    def make(self, params: Sequence[tuple[str, torch.Tensor]]) -> torch.optim.Optimizer:
        """Return an optimizer of these named matrices."""
        pairs: Any = list(params) if self.door != "tensors" else [param for _, param in params]
        return self._call(pairs)

    def make_for(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return an optimizer of a whole model."""
        if self.door == "param_groups":
            from muon8bit import param_groups

            return self._call(param_groups(model, lr=self.lr, weight_decay=0.0))
        return self._call(list(model.named_parameters() if self.door == "named" else model.parameters()))

    def _call(self, params: Any) -> torch.optim.Optimizer:
        kind = self.kind
        known = inspect.signature(kind.__init__).parameters
        decay = {key: 0.0 for key in ("weight_decay", "wd") if key in known and key not in self.options}
        made: torch.optim.Optimizer = kind(params, lr=self.lr, **decay, **self.options)
        return made


_OURS = {"package": "muon8bit", "door": "param_groups", "is_ours": True}
SUBJECTS = (
    Subject("muon8bit Muon8bit", target="muon8bit:Muon8bit", **_OURS),
    Subject("muon8bit Muon8bit, dynamic", target="muon8bit:Muon8bit", options={"codebook": "dynamic"}, **_OURS),
    Subject("muon8bit Muon8bit, 32 bits", target="muon8bit:Muon8bit", options={"bits": 32}, **_OURS),
    Subject("muon8bit NorMuon8bit", target="muon8bit:NorMuon8bit", **_OURS),
    Subject("muon8bit AdaMuon8bit", target="muon8bit:AdaMuon8bit", **_OURS),
    Subject("torch Muon", "torch", "torch.optim:Muon"),
    Subject("gefen GefenMuon", "gefen", "gefen.gefen_muon:GefenMuon", {"fused": False}),
    Subject(
        "adv-optm Muon_adv, int8_sr", "adv-optm", "adv_optm:Muon_adv", {"use_muon": True, "state_precision": "int8_sr"}
    ),
    Subject("sdnq Muon, uint8", "sdnq", "sdnq.optim:Muon", {"use_quantized_buffers": True}),
    Subject("bitsandbytes AdamW8bit", "bitsandbytes", "bitsandbytes.optim:AdamW8bit"),
    Subject("bantamtrain Muon, 8 bits", "bantamtrain", "bantamtrain.optim:Muon", {"state_bits": 8}),
    Subject("muonium Muon8bit", "muonium", "muonium.optim.optim_lp:Muon8bit"),
    Subject("dtensor-muon Muon8bit", "dtensor-muon", "dtensor_muon.optim.optim_lp:Muon8bit"),
)
# Of other 8-bit Muons there is no package to install.
NOT_PACKAGED = {
    "bitsandbytes, an open proposal of an 8-bit Muon": "in a fork, not in a release",
    "axolotl muon_8bit": "in an open pull request, not in a release",
}
