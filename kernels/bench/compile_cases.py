"""The calls whose kernels are compiled, and for which GPUs: every kernel that ships, in each of its configurations.

What a step of a large model launches is compiled for every target. Other block sizes, layouts and wrappers run the
same device code on tiles of as many elements: they are compiled for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from muon8bit_kernels import CODE_DTYPES, triton_kernels

NVIDIA = ("sm_80", "sm_90", "sm_100")
EVERYWHERE, ONE = (*NVIDIA, "gfx942"), ("sm_90",)
WIDE, NARROW, COUNT = (4096, 4096), (4096, 16), 3
OTHER_BLOCKS = (64, 128, 256, 512, 1024, 4096)


@dataclass(frozen=True)
class Case:
    """One kernel and configuration: `call` launches it, once."""

    name: str
    call: Callable[[], Any]
    targets: tuple[str, ...] = EVERYWHERE


def empty(*shape: int, dtype: torch.dtype = torch.float32, across: bool = False) -> torch.Tensor:
    """Without storage; `across`: each matrix column by column."""
    tensor = torch.empty(*shape[:-2], *shape[:-3:-1], dtype=dtype, device="meta")
    return tensor.mT if across else tensor.view(shape)


def momentum(
    phase: str, codebook: str | None, block: int = 2048, shape: tuple[int, int] = WIDE, across: bool = False
) -> None:
    """bf16 gradients and output, the flag of the step given."""
    codes = empty(COUNT, *shape, dtype=torch.float32 if codebook is None else CODE_DTYPES[codebook])
    scales = None if codebook is None else [empty(COUNT, shape[0], triton.cdiv(shape[1], block))]
    grads = [empty(COUNT, *shape, dtype=torch.bfloat16, across=across)]
    options: dict[str, Any] = {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": block}
    if phase == "stats":
        triton_kernels.momentum_stats([codes], scales, grads, **options)
    else:
        out, norms, skip = empty(COUNT, *shape, dtype=torch.bfloat16), empty(1, COUNT).view(COUNT), empty(1, 1).view(())
        triton_kernels.momentum_apply([codes], scales, grads, norms, out, **options, skip=skip)


def update(dtype: torch.dtype, keys: list[int] | None = None, across: bool = False) -> None:
    params, directions = [empty(COUNT, *WIDE, dtype=dtype)], empty(COUNT, *WIDE, dtype=dtype, across=across)
    triton_kernels.update_params(params, directions, decay=0.9, scale=0.1, keys=keys, skip=empty(1, 1).view(()))


def quantize(codebook: str) -> None:
    triton_kernels.quantize(empty(*WIDE, dtype=torch.bfloat16), codebook=codebook, block_size=2048)


def dequantize(codebook: str) -> None:
    codes, scales = empty(*WIDE, dtype=CODE_DTYPES[codebook]), empty(WIDE[0], 2)
    triton_kernels.dequantize(codes, scales, codebook=codebook, block_size=2048)


def _elementwise() -> list[Case]:
    cases = [
        Case(f"{phase}-{codebook}", partial(momentum, phase, codebook))
        for phase in ("stats", "apply")
        for codebook in ("linear", "dynamic", None)
    ]
    cases += [
        Case(f"{phase}-{codebook}-block{block}", partial(momentum, phase, codebook, block), ONE)
        for phase in ("stats", "apply")
        for codebook in ("linear", "dynamic")
        for block in OTHER_BLOCKS
    ]
    stochastic = partial(update, torch.bfloat16, [-5] * COUNT)
    return [
        *cases,
        Case("apply-linear-narrow", partial(momentum, "apply", "linear", shape=NARROW), ONE),
        Case("apply-dynamic-across", partial(momentum, "apply", "dynamic", across=True), ONE),
        Case("stats-linear-across", partial(momentum, "stats", "linear", across=True), ONE),
        Case("update-fp32", partial(update, torch.float32)),
        Case("update-bf16", partial(update, torch.bfloat16)),
        Case("update-bf16-stochastic", stochastic),
        Case("update-bf16-across", partial(update, torch.bfloat16, across=True), ONE),
        *[Case(f"quantize-{codebook}", partial(quantize, codebook), ONE) for codebook in ("linear", "dynamic")],
        *[Case(f"dequantize-{codebook}", partial(dequantize, codebook), ONE) for codebook in ("linear", "dynamic")],
        Case("round-stochastic", partial(triton_kernels.round_stochastic, empty(*WIDE), key=-5), ONE),
    ]


CASES = _elementwise()
JOBS = [(case, target) for case in CASES for target in case.targets]
