"""The optimizers that are compared, each on the same parameters and gradients.

The parameters are bf16 except where an arm needs fp32: torch.optim.Muon keeps its momentum in the gradient's dtype,
so fp32 state means fp32 parameters and gradients. torch.optim.Muon takes matrices only: a stack of experts is given
to it as one parameter for each expert, over the same storage.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from muon8bit import AdaMuon8bit, Muon8bit, NorMuon8bit
from muon8bit.tune.timing import TimedJob, UnavailableError

LINEAR, DYNAMIC, BITS32 = "this, linear", "this, dynamic", "this, bits=32"
NORMUON, ADAMUON = "NorMuon8bit", "AdaMuon8bit"
MUON_BF16, MUON_FP32 = "torch Muon, bf16 state", "torch Muon, fp32 state"
DECODED = "decode + torch Muon"
ADAMW, ADAMW8 = "torch AdamW, fused", "bitsandbytes AdamW8bit"

# So large that a step changes bf16 parameters of spread 0.02, which the check wants to see.
MUON_LR, ADAMW_LR = 2e-2, 1e-3
PARAM_SPREAD = 0.02
_BLOCK = 2048
_PROBE = 1024


class DecodeThenMuon:
    """The optimizer that a user would write around torch.optim.Muon.

    int8 codes are kept, the momentum is decoded before its step and encoded after it, by torch operations, in flat
    blocks of 2048.
    """

    def __init__(self, params: Sequence[Parameter], lr: float) -> None:
        self.muon = torch.optim.Muon(params, lr=lr)
        self.codes = {}
        for p in params:
            blocks = (-1, math.gcd(_BLOCK, p.numel()))
            codes = torch.zeros_like(p, dtype=torch.int8).view(blocks)
            self.codes[p] = (codes, torch.zeros(len(codes), 1, device=p.device))

    @torch.no_grad()
    def step(self) -> None:
        for p, (codes, scales) in self.codes.items():
            self.muon.state[p]["momentum_buffer"] = (codes * (scales / 127)).view(p.shape).to(p.dtype)
        self.muon.step()
        for p, (codes, scales) in self.codes.items():
            momentum = self.muon.state[p].pop("momentum_buffer").view(codes.shape).float()
            scales.copy_(momentum.abs().amax(1, keepdim=True))
            codes.copy_((momentum / scales.clamp(min=1e-30) * 127).round())


def _bitsandbytes_adamw(params: list[Parameter]) -> torch.optim.Optimizer:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UnavailableError("not installed")
    import bitsandbytes  # optional, and slow to import

    make: Any = bitsandbytes.optim.AdamW8bit  # type: ignore[attr-defined]
    optimizer: torch.optim.Optimizer = make(params, lr=ADAMW_LR)
    return optimizer


@dataclass(frozen=True)
class Arm:
    """A way to make an optimizer, and the bytes that an element costs it, in state and besides during a step."""

    make: Callable[[list[Parameter]], torch.optim.Optimizer | DecodeThenMuon]
    bytes_per_element: float
    fp32: bool = False
    matrices_only: bool = False


ARMS = {
    LINEAR: Arm(lambda ps: Muon8bit(ps, lr=MUON_LR), 1.01),
    DYNAMIC: Arm(lambda ps: Muon8bit(ps, lr=MUON_LR, codebook="dynamic"), 1.01),
    BITS32: Arm(lambda ps: Muon8bit(ps, lr=MUON_LR, bits=32), 4),
    NORMUON: Arm(lambda ps: NorMuon8bit(ps, lr=MUON_LR), 1.01),
    ADAMUON: Arm(lambda ps: AdaMuon8bit(ps, lr=MUON_LR), 2.02),
    MUON_BF16: Arm(lambda ps: torch.optim.Muon(ps, lr=MUON_LR), 2, matrices_only=True),
    MUON_FP32: Arm(lambda ps: torch.optim.Muon(ps, lr=MUON_LR), 4, fp32=True, matrices_only=True),
    DECODED: Arm(lambda ps: DecodeThenMuon(ps, lr=MUON_LR), 1.01 + 2, matrices_only=True),
    ADAMW: Arm(lambda ps: torch.optim.AdamW(ps, lr=ADAMW_LR, fused=True), 4),
    ADAMW8: Arm(_bitsandbytes_adamw, 2.04),
}


@dataclass(frozen=True)
class Tensors:
    """Random bf16 parameters and gradients of a workload."""

    params: list[Tensor]
    grads: list[Tensor]

    @staticmethod
    def random(shapes: Sequence[tuple[int, ...]], device: torch.device, seed: int = 0) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(spread: float) -> list[Tensor]:
            return [
                torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, spread, generator=generator)
                for shape in shapes
            ]

        return Tensors(normal(PARAM_SPREAD), normal(1.0))

    @property
    def num_elements(self) -> int:
        return sum(p.numel() for p in self.params)


def needed_bytes(arm: Arm, num_elements: int) -> int:
    """Return the bytes on the card beside the bf16 parameters and gradients: state, copies, and 1 GiB to work in."""
    return int(num_elements * (arm.bytes_per_element + (8 if arm.fp32 else 0))) + 2**30


def make_job(arm: Arm, tensors: Tensors) -> TimedJob:
    """Return the arm's step on `tensors`.

    Raises:
        UnavailableError: if it is not installed, or does not fit on the card.
    """
    device = tensors.params[0].device
    if device.type == "cuda":
        free, needed = torch.cuda.mem_get_info(device)[0], needed_bytes(arm, tensors.num_elements)
        if needed > free:
            raise UnavailableError(
                f"does not fit: needs {needed / 2**30:.1f} GiB more, {free / 2**30:.1f} GiB are free"
            )
    params: list[Parameter] = []
    for param, grad in zip(tensors.params, tensors.grads, strict=True):
        if arm.fp32:
            param, grad = param.float(), grad.float()
        split = arm.matrices_only and param.ndim > 2
        for p, g in zip(param.unbind() if split else [param], grad.unbind() if split else [grad], strict=True):
            parameter = Parameter(p)
            parameter.grad = g
            params.append(parameter)
    optimizer = arm.make(params)
    before = [p.detach().flatten()[:_PROBE].clone() for p in params]

    def check() -> None:
        for index, (param, probe) in enumerate(zip(params, before, strict=True)):
            values = param.detach()
            if not values.isfinite().all():
                raise ValueError(f"parameter {index} {tuple(values.shape)} is not finite")
            if torch.equal(values.flatten()[:_PROBE], probe):
                raise ValueError(f"parameter {index} {tuple(values.shape)} was not updated")

    return TimedJob(optimizer.step, check)
