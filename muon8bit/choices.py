"""Choices that options have, by name.

No torch in here, so that command lines can be parsed and explained without it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Codebook: TypeAlias = Literal["linear", "dynamic"]
Backend: TypeAlias = Literal["reference", "triton"]
OnNonfinite: TypeAlias = Literal["raise", "raise_at_once", "skip"]
ScalingRule: TypeAlias = Literal["spectral", "essential"]
ScalingRole: TypeAlias = Literal["hidden", "embedding", "head", "router", "vector"]
AdjustLR: TypeAlias = Literal["original", "match_rms_adamw", "spectral"]
SecondMomentKind: TypeAlias = Literal["row", "shape", "element"]
EpsForm: TypeAlias = Literal["add", "clamp"]
Rescale: TypeAlias = Literal["keep", "rms"]
ParamRounding: TypeAlias = Literal["nearest", "stochastic"]
Algorithm: TypeAlias = Literal["muon", "adamw"]
Bits: TypeAlias = Literal[8, 32]
StateDevice: TypeAlias = Literal["cpu"]
ZeroSlices: TypeAlias = Literal["skip", "step"]
Routing: TypeAlias = Literal["0.1", "0.2"]
SplitHeads: TypeAlias = Literal["head", "head_kv"]
Routers: TypeAlias = Literal["adamw", "muon"]

CODEBOOKS: tuple[str, ...] = get_args(Codebook)
BACKENDS: tuple[str, ...] = get_args(Backend)
ON_NONFINITE: tuple[str, ...] = get_args(OnNonfinite)
SCALING_RULES: tuple[str, ...] = get_args(ScalingRule)
SCALING_ROLES: tuple[str, ...] = get_args(ScalingRole)
ADJUST_LR: tuple[str, ...] = get_args(AdjustLR)
SECOND_MOMENTS: tuple[str, ...] = get_args(SecondMomentKind)
EPS_FORMS: tuple[str, ...] = get_args(EpsForm)
RESCALES: tuple[str, ...] = get_args(Rescale)
PARAM_ROUNDINGS: tuple[str, ...] = get_args(ParamRounding)
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
BITS: tuple[int, ...] = get_args(Bits)
STATE_DEVICES: tuple[str, ...] = get_args(StateDevice)
ZERO_SLICES: tuple[str, ...] = get_args(ZeroSlices)
ROUTINGS: tuple[str, ...] = get_args(Routing)
SPLIT_HEADS: tuple[str, ...] = get_args(SplitHeads)
ROUTERS: tuple[str, ...] = get_args(Routers)

# Block sizes in elements: those that bitsandbytes' CUDA kernels accept.
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)

# Presets of the optimizers that have some, by the scripts' names of these; what each has: muon8bit.family.
PRESETS: dict[str, tuple[str, ...]] = {
    "normuon8bit": ("paper", "official", "dion", "modded"),
    "adamuon8bit": ("paper", "official"),
}

# Who saved a checkpoint that is converted, and whose formats can be written.
Dialect: TypeAlias = Literal["muon8bit", "torch", "jordan", "heavy-ball", "normuon", "adamuon", "dion", "adamw"]
DIALECTS: tuple[str, ...] = get_args(Dialect)
EXPORTS = ("muon8bit", "torch")
