"""The cases of `against_commit`: every option that changes what a step computes, and how a step is taken.

Imported by the worker beside each tree's package, and by nothing of that package: public names of torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

MATRICES: dict[str, tuple[int, ...]] = {
    "wide": (24, 200),
    "tall": (200, 24),
    "square": (72, 72),
    "stack": (3, 16, 40),
    "experts": (2, 2, 12, 20),
    "narrow": (6, 4),
    "row": (1, 48),
}
VECTORS: dict[str, tuple[int, ...]] = {"embedding": (40, 24), "bias": (21,)}
FUSED: dict[str, tuple[int, ...]] = {"fused": (24, 200), "fused stack": (3, 24, 200)}
LARGE: dict[str, tuple[int, ...]] = {"wide": (512, 2048), "tall": (2048, 512), "square": (1024, 1024)}
ALIKE: dict[str, tuple[int, ...]] = {f"alike {i}": (100, 4000) for i in range(8)}  # 7 in a batch
LEAST_WORKSPACE = 32 * 2**20

FORMATS: dict[str, dict[str, Any]] = {
    "linear": {"codebook": "linear"},
    "dynamic": {"codebook": "dynamic"},
    "32 bits": {"bits": 32},
}
JORDAN = (3.4445, -4.7750, 2.0315)

# Options of the optimizer, each alone beside each format.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no Nesterov": {"nesterov": False},
    "momentum 0": {"momentum": 0.0},
    "momentum .5": {"momentum": 0.5},
    "weight decay .3": {"weight_decay": 0.3},
    "lr 0": {"lr": 0.0},
    "lr a tensor": {"lr": torch.tensor(0.02)},
    "eps 10": {"eps": 10.0},
    "maximize": {"maximize": True},
    "clip_matrix_norm": {"clip_matrix_norm": 5.0},
    "coefficients you": {"ns_coefficients": "you"},
    "coefficients polar_express": {"ns_coefficients": "polar_express"},
    "coefficients deepseek_v4": {"ns_coefficients": "deepseek_v4", "ns_steps": 10},
    "coefficients jordan, 9 steps": {"ns_coefficients": "jordan", "ns_steps": 9},
    "coefficients a triple": {"ns_coefficients": (3.0, -3.2, 1.2), "ns_steps": 3},
    "coefficients cubic": {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 8},
    "coefficients triples": {"ns_coefficients": [JORDAN, JORDAN, (2.0, -1.5, 0.5)], "ns_steps": 3},
    "adjust_lr_fn original": {"adjust_lr_fn": "original"},
    "adjust_lr_fn match_rms_adamw": {"adjust_lr_fn": "match_rms_adamw"},
    "ns_dtype float32": {"ns_dtype": torch.float32},
    "ns_dtype bfloat16": {"ns_dtype": torch.bfloat16},
    "ns_dtype float16": {"ns_dtype": torch.float16},
    "state_device cpu": {"state_device": "cpu"},
    "backend reference": {"backend": "reference"},
}


@dataclass(frozen=True)
class StepCase:
    """Parameters and an optimizer.

    Args:
        name: in the table.
        options: arguments of the optimizer.
        muon, adamw: keys of the two groups.
        dtype: of parameters and gradients.
        matrices, vectors: shapes of the parameters of the two groups, by name.
        way: how a step is taken: `"step"`, `"closure"`, `"release"`, `"scaler"`; or, with the second of the first three
            steps bad, `"skip"`, `"raise"`, `"overflow"`; or on two ranks, `"replicas"`, `"rows"` (FSDP2), `"columns"`.
        grads: `"normal"`, `"uneven"`, `"tiny"`, `"zero"` or `"some"`; strides by `layout`.
        layout: of parameters and gradients: `""`, `"transposed"`, or `"channels_last"`.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    muon: dict[str, Any] = field(default_factory=dict)
    adamw: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    matrices: dict[str, tuple[int, ...]] = field(default_factory=lambda: MATRICES)
    vectors: dict[str, tuple[int, ...]] = field(default_factory=lambda: VECTORS)
    way: str = "step"
    grads: str = "normal"
    layout: str = ""

    @property
    def is_on_ranks(self) -> bool:
        return self.way in ("replicas", "rows", "columns")


def cases() -> list[StepCase]:
    """Return all cases; their names differ."""
    found = [*_of_options(), *_of_formats(), *_of_shapes(), *_of_adamw(), *_of_ranks()]
    assert len({case.name for case in found}) == len(found)
    return found


def _of_options() -> Iterator[StepCase]:
    for kind, stored in FORMATS.items():
        for name, options in OPTIONS.items():
            yield StepCase(f"{kind}: {name}", {"block_size": 64, **stored, **options})


def _of_formats() -> Iterator[StepCase]:
    """Yield what goes with how momentum and parameters are stored."""
    long: dict[str, tuple[int, ...]] = {"long": (4, 9000), "short": (24, 200)}
    for kind in ("linear", "dynamic"):
        for size in (64, 128, 256, 512, 1024, 2048, 4096):
            yield StepCase(f"{kind}: blocks of {size}", {"codebook": kind, "block_size": size}, matrices=long)
    for kind, stored in FORMATS.items():
        stored = {"block_size": 64, **stored}
        for dtype in (torch.bfloat16, torch.float16):
            yield StepCase(f"{kind}: {dtype} parameters".replace("torch.", ""), stored, dtype=dtype)
        rounded = {**stored, "param_rounding": "stochastic", "rounding_seed": 2**64 - 5}
        yield StepCase(f"{kind}: stochastic rounding", rounded, dtype=torch.bfloat16)
        splits = {"split_sizes": (8, 16)}
        yield StepCase(f"{kind}: stochastic rounding, split", rounded, splits, dtype=torch.bfloat16, matrices=FUSED)
        for grads in ("uneven", "tiny", "zero", "some"):
            yield StepCase(f"{kind}: {grads} gradients", stored, grads=grads)
        for way in ("closure", "release", "scaler", "skip", "raise", "overflow"):
            bad = {"on_nonfinite": "skip"} if way in ("release", "skip") else {}
            yield StepCase(f"{kind}: {way}", {**stored, **bad}, way=way)
    yield StepCase("release, bfloat16, stochastic", {"param_rounding": "stochastic", "on_nonfinite": "skip"},
                   dtype=torch.bfloat16, way="release")  # fmt: skip
    yield StepCase("scaler, float16", {"block_size": 64}, dtype=torch.float16, way="scaler")


def _of_shapes() -> Iterator[StepCase]:
    convolutions: dict[str, tuple[int, ...]] = {"convolution": (6, 3, 5, 5), "matrix": (8, 40)}
    for kind, stored in FORMATS.items():
        stored = {"block_size": 64, **stored}
        rows, cols = {"split_sizes": (8, 16)}, {"split_sizes": (72, 128), "split_dim": -1}
        yield StepCase(f"{kind}: split rows", stored, rows, matrices=FUSED)
        yield StepCase(f"{kind}: split columns, straddling blocks", stored, cols, matrices=FUSED)
        clip = {**stored, "clip_matrix_norm": 5.0}
        yield StepCase(f"{kind}: split rows, clipped", clip, rows, matrices=FUSED)
        yield StepCase(f"{kind}: split columns, clipped", clip, cols, matrices=FUSED)
        host = {**stored, "state_device": "cpu"}
        yield StepCase(f"{kind}: split columns, state_device cpu", host, cols, matrices=FUSED)
        yield StepCase(f"{kind}: flatten", stored, {"flatten": True}, matrices=convolutions)
        split = {"flatten": True, "split_sizes": (2, 4)}
        yield StepCase(f"{kind}: flatten, split", stored, split, matrices={"convolution": (6, 3, 5, 5)})
        yield StepCase(f"{kind}: channels_last", stored, {"flatten": True},
                       matrices=convolutions, layout="channels_last")  # fmt: skip
        yield StepCase(f"{kind}: transposed", stored, layout="transposed", matrices={"a": (24, 72), "b": (72, 24)})
        small = {**stored, "workspace_bytes": LEAST_WORKSPACE}
        yield StepCase(f"{kind}: batches cut", small, matrices=ALIKE)
        yield StepCase(f"{kind}: large", {**stored, "block_size": 2048}, matrices=LARGE)
    small = {"block_size": 64, "workspace_bytes": LEAST_WORKSPACE}
    yield StepCase("batches cut, clipped", {**small, "clip_matrix_norm": 5.0}, matrices=ALIKE)
    yield StepCase("batches cut, state_device cpu", {**small, "state_device": "cpu"}, matrices=ALIKE)
    halves = {"split_sizes": (1000, 3000), "split_dim": -1}
    yield StepCase("batches cut, split columns", small, halves, matrices=ALIKE)
    yield StepCase("linear: large, float32", {"ns_dtype": torch.float32}, matrices=LARGE)


def _of_adamw() -> Iterator[StepCase]:
    odd: dict[str, tuple[int, ...]] = {"embedding": (64, 96), "odd": (70, 77), "bias": (21,)}
    for bits in (8, 32):
        for name, more in {
            "defaults": {},
            "betas, eps, decay": {"betas": (0.8, 0.99), "eps": 1e-4, "weight_decay": 0.3},
            "maximize": {"maximize": True},
        }.items():
            yield StepCase(f"AdamW {bits} bits: {name}", {}, adamw={"adamw_bits": bits, **more}, vectors=odd)
        for dtype in (torch.bfloat16, torch.float16):
            name = f"AdamW {bits} bits: {dtype}".replace("torch.", "")
            yield StepCase(name, {}, adamw={"adamw_bits": bits}, vectors=odd, dtype=dtype)
        rounded = {"param_rounding": "stochastic"}
        yield StepCase(f"AdamW {bits} bits: stochastic rounding", rounded, adamw={"adamw_bits": bits},
                       vectors=odd, dtype=torch.bfloat16)  # fmt: skip
        size = (1100, 1024) if bits == 32 else (4200, 1024)
        host = {"state_device": "cpu", "workspace_bytes": LEAST_WORKSPACE}
        yield StepCase(f"AdamW {bits} bits: in parts, state_device cpu", host, adamw={"adamw_bits": bits},
                       matrices={"wide": (24, 200)}, vectors={"embedding": size, **odd})  # fmt: skip
        yield StepCase(f"AdamW {bits} bits: scaler", {}, adamw={"adamw_bits": bits}, vectors=odd, way="scaler")
        release = {"on_nonfinite": "skip"}
        yield StepCase(f"AdamW {bits} bits: release", release, adamw={"adamw_bits": bits}, vectors=odd, way="release")


def _of_ranks() -> Iterator[StepCase]:
    odd: dict[str, tuple[int, ...]] = {"embedding": (64, 96), "odd": (70, 77), "bias": (21,)}
    few = {name: shape for name, shape in MATRICES.items() if name != "experts"}
    for kind, stored in FORMATS.items():
        stored = {"block_size": 64, **stored}
        yield StepCase(f"2 ranks, process_group: {kind}", stored, way="replicas")
        yield StepCase(f"2 ranks, shard_state: {kind}", {**stored, "shard_state": True}, way="replicas")
        yield StepCase(f"2 ranks, fully_shard: {kind}", stored, matrices=few, vectors=odd, way="rows")
        yield StepCase(f"2 ranks, Shard(1): {kind}", stored, matrices=few, vectors={"bias": (21,)}, way="columns")
    rounded = {"param_rounding": "stochastic", "block_size": 64}
    for way in ("replicas", "rows"):
        yield StepCase(f"2 ranks, {way}: stochastic rounding", rounded, matrices=few, dtype=torch.bfloat16, way=way)
        even: dict[str, tuple[int, ...]] = {"embedding": (64, 96), "bias": (21,)}  # shards of whole blocks of 256
        yield StepCase(f"2 ranks, {way}: 8-bit AdamW", {}, adamw={"adamw_bits": 8}, matrices=few,
                       vectors=even, way=way)  # fmt: skip
    rows, cols = {"split_sizes": (8, 16)}, {"split_sizes": (72, 128), "split_dim": -1}
    for way, name, muon in (("replicas", "rows", rows), ("replicas", "columns", cols), ("rows", "rows", rows)):
        yield StepCase(f"2 ranks, {way}: split {name}", {"block_size": 64}, muon, matrices=FUSED, way=way)


# Configurations of small models, which `muon8bit estimate` reads in place of {NAME}.
_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_SIZES},
    "tied": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_SIZES, "tie_word_embeddings": True},
    "mixtral": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **_SIZES, "num_local_experts": 4},
}
ESTIMATES: tuple[tuple[str, ...], ...] = (
    ("TinyLlama-1.1B",),
    ("SmolLM2-135M", "--json"),
    ("{llama}", "--dtype", "fp32", "--batch", "4", "--seq", "512", "--release-gradients"),
    ("{llama}", "--gpus", "4", "--shard", "fsdp2", "--dtype", "mixed", "--json"),
    ("{llama}", "--device", "cpu", "--state-device", "cpu"),
    ("{tied}", "--budget", "300MiB", "--batch", "8"),
    ("{tied}", "--budget", "10MiB", "--json"),
    ("{tied}", "--lora", "16", "--activation-checkpointing", "--loss-chunk", "512"),
    ("{llama}", "--qlora", "--json"),
    ("{mixtral}", "--gpus", "8", "--shard", "ddp", "--gradient-accumulation", "4"),
    ("{mixtral}", "--budget", "400MiB", "--state-device", "cpu"),
    ("{tied}", "--gpus", "8", "--shard", "hsdp", "--batch", "2"),
    ("no-such-model",),
)
