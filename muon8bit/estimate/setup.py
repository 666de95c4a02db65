"""The setup of an estimate: how the model is trained, and on what devices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from .._text import gib
from ..config import DEFAULT_BLOCK_SIZE, Bits, Routers, SecondMomentKind

Dtype: TypeAlias = Literal["fp32", "bf16", "mixed"]
Shard: TypeAlias = Literal["none", "ddp", "fsdp2", "hsdp"]
DTYPES: tuple[str, ...] = get_args(Dtype)
SHARDS: tuple[str, ...] = get_args(Shard)
MixedPrecision: TypeAlias = Literal["auto", "no", "bf16"]
_OPTIONS = {
    "batch": "--batch-size",
    "seq": "--seq-len",
    "num_gpus": "--gpus",
    "lora": "--lora-rank",
    "loss_chunk": "--loss-chunk",
    "accumulation": "--gradient-accumulation",
}
# GPUs of one machine, among which HSDP shards; it replicates over machines.
GPUS_PER_NODE = 8
_UNITS = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}


@dataclass(frozen=True)
class Setup:
    """One way to train.

    Attributes:
        batch: sequences of a micro-batch, on each GPU.
        seq: tokens of a sequence.
        dtype: of weights and gradients: "fp32", "bf16", or "mixed", which becomes "fp32" with mixed_precision "bf16".
            With an adapter that of the frozen base: the adapter is fp32.
        mixed_precision: "bf16": computed in bf16 by autocast; "no": in the dtypes of the weights. "auto" becomes "bf16"
            with an adapter on a base that is not "fp32", else "no".
        checkpointing: recompute activations in the backward pass.
        lora: rank of an adapter; None trains the model itself.
        targets: names of the modules that have the adapter, with commas, or "all-linear", all but the head.
        dora: the adapter learns magnitudes beside directions.
        qlora: the frozen base in NF4 with double quantization.
        release: each gradient is used and freed in the backward pass.
        loss_chunk: tokens whose logits exist at once; they are recomputed in the backward pass. None: all, kept.
        accumulation: micro-batches of a step, whose gradients are summed: with more than one, whole gradients lie
            beside the activations of all but the first. Sharded, each is added to the shards, as the scripts do.
        num_gpus, shard: on how many GPUs, and what is divided among them.
        device: "cuda" or "cpu": where the step runs.
        state_device: "device", with the parameters, or "cpu", in host memory: of Muon8bit alone, others have no such
            option and stay as they are.
        block_size: elements that share a scale of Muon8bit's momentum.
        cautious: Muon8bit's `cautious_weight_decay`.
        bits: of the momentum of Muon8bit and its kin, and of AdaMuon8bit's second moment.
        preset: of NorMuon8bit or AdaMuon8bit, which both take theirs by this name; None: "paper".
        split_heads, routers: of `param_groups`, in the scripts' words: "none" cuts no latent attention by head.
    """

    batch: int = 1
    seq: int = 2048
    dtype: Dtype = "bf16"
    checkpointing: bool = False
    lora: int | None = None
    qlora: bool = False
    release: bool = False
    loss_chunk: int | None = None
    accumulation: int = 1
    num_gpus: int = 1
    shard: Shard = "none"
    device: Literal["cuda", "cpu"] = "cuda"
    state_device: Literal["device", "cpu"] = "device"
    mixed_precision: MixedPrecision = "auto"
    targets: str = "all-linear"
    dora: bool = False
    block_size: int = DEFAULT_BLOCK_SIZE
    cautious: bool = False
    split_heads: Literal["none", "head", "head_kv"] = "none"
    routers: Routers = "adamw"
    bits: Bits = 8
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.dtype == "mixed":
            object.__setattr__(self, "dtype", "fp32")
            object.__setattr__(self, "mixed_precision", "bf16")
        elif self.mixed_precision == "auto":
            has_autocast = self.rank is not None and self.dtype != "fp32"
            object.__setattr__(self, "mixed_precision", "bf16" if has_autocast else "no")
        for name in _OPTIONS:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{_OPTIONS[name]} must be at least 1, not {getattr(self, name)}")
        if self.release and self.shard != "none":
            raise ValueError(
                f"--release-gradients does not go with --shard {self.shard}: in the backward pass a GPU sees the "
                "gradient of its own sequences only; leave one of them out"
            )
        if self.release and self.accumulation > 1:
            raise ValueError(
                f"--release-gradients does not go with --gradient-accumulation {self.accumulation}: a gradient is used "
                "as soon as it is there; leave one of them out"
            )
        if self.state_device == "cpu" and self.shard in ("fsdp2", "hsdp"):
            raise ValueError(
                f"--state-device cpu does not go with --shard {self.shard}: the step of matrices that several GPUs "
                "share does not fetch state from the host; leave one of them out"
            )
        if self.shard != "none" and self.num_gpus == 1:
            raise ValueError(f"--shard {self.shard} divides among several GPUs; give --gpus")
        if self.shard == "hsdp" and self.num_gpus > GPUS_PER_NODE and self.num_gpus % GPUS_PER_NODE:
            raise ValueError(f"--shard hsdp takes machines of {GPUS_PER_NODE} GPUs, and --gpus is {self.num_gpus}")

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weights; with an adapter that of the frozen base."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    @property
    def normuon_moment(self) -> SecondMomentKind:
        """The `second_moment` of the preset in NorMuon8bit."""
        return "shape" if self.preset == "modded" else "row"

    @property
    def normuon_coefficients(self) -> str:
        """The `ns_coefficients` of the preset in NorMuon8bit."""
        return "polar_express" if self.preset in ("dion", "modded") else "jordan"

    @property
    def mode(self) -> str:
        """The scripts' `--mode`: "full", "lora" or "qlora"."""
        return "qlora" if self.qlora else "full" if self.lora is None else "lora"

    @property
    def rank(self) -> int | None:
        """Rank of the adapter; QLoRA without `lora` has 16."""
        return 16 if self.qlora and self.lora is None else self.lora

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of automatic mixed precision, None without it."""
        return torch.bfloat16 if self.mixed_precision == "bf16" else None

    @property
    def num_shards(self) -> int:
        """Number of GPUs among which weights, gradients and state are divided."""
        return {"fsdp2": self.num_gpus, "hsdp": min(self.num_gpus, GPUS_PER_NODE)}.get(self.shard, 1)


def parse_bytes(text: str) -> int:
    """Read a number of bytes such as `24GiB`, `24 GB`, `1.5TiB`: GB is 1000^3, GiB 1024^3.

    Raises:
        ValueError: no number, or no unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no size; give one like 24GiB or 24GB")
    if match[2] not in _UNITS:
        said = f"has no unit {match[2]!r}" if match[2] else "has no unit"
        raise ValueError(f"{text!r} {said}; give one of {', '.join(_UNITS)}, for example 24GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_budget(text: str) -> tuple[int, str]:
    """Return the bytes of a GPU's memory, and a sentence where they are not what the text says.

    A card that is sold as one of 24 GB has 24 GiB: GB, MB and TB are taken for the binary units.

    Raises:
        ValueError: as `parse_bytes`.
    """
    num_bytes = parse_bytes(text)
    sold = re.fullmatch(r"\s*([\d.]+)\s*([KMGT])B\s*", text)
    if sold is None:
        return num_bytes, ""
    binary = f"{sold[1]}{sold[2]}iB"
    said = f"{text.strip()} is taken for {binary}, as cards are sold; --budget {num_bytes}B is {gib(num_bytes)}."
    return parse_bytes(binary), said
