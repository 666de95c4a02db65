"""Peak memory of real CPU training steps against `muon8bit estimate`, for every optimizer that exists.

    python -m benchmarks.training.memory_peaks [--out FILE.json]

A random Llama of 30M parameters, the second step (the first one makes the state). Measured are the bytes of all tensors
by torch's MemTracker; a process's resident memory is mostly imports. `muon_bf16` has bf16 weights, as torch.optim.Muon
keeps its momentum in their dtype, with fp32 moments for the rest.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from muon8bit_kernels import reference
from torch.distributed._tools.mem_tracker import MemTracker
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, LlamaConfig

from muon8bit import Muon8bit, param_groups
from muon8bit.estimate import Estimator, Setup
from muon8bit.estimate.activations import checkpoint
from muon8bit.estimate.losses import loss_of

LLAMA_30M = {
    "vocab_size": 16384,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
}
MEASURED = ("adamw", "adamw8bit", "muon", "muon_bf16", "muon8bit", "muon8bit+adamw8bit")
# (sequences, tokens): the peak in the step, and in the backward pass.
BATCHES = ((1, 64), (4, 256))


def optimizers(name: str, model: torch.nn.Module) -> list[Optimizer]:
    """Return the optimizers that together are the column `name` of the estimate."""
    return _optimizers(name, _groups(name, model))


def _groups(name: str, model: torch.nn.Module) -> list[dict[str, Any]]:
    return param_groups(model, lr=1e-3, adamw_bits=8 if name == "muon8bit+adamw8bit" else 32)


def _optimizers(name: str, groups: list[dict[str, Any]]) -> list[Optimizer]:
    everything = [param for group in groups for _, param in group["params"]]
    if name.startswith("muon8bit"):
        return [Muon8bit(groups, lr=1e-3)]
    if name == "adamw":
        return [torch.optim.AdamW(everything, lr=1e-3)]
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return [AdamW8bit(everything, lr=1e-3)]
    matrices = [pair for group in groups if group["algorithm"] == "muon" for pair in group["params"]]
    rest = [group for group in groups if group["algorithm"] == "adamw"]
    both: list[Optimizer] = [torch.optim.Muon(matrices, lr=1e-3)] if matrices else []
    if rest and name == "muon":
        both.append(torch.optim.AdamW([param for group in rest for _, param in group["params"]], lr=1e-3))
    elif rest:
        both.append(Muon8bit(rest, lr=1e-3))
    return both


def released(name: str, model: torch.nn.Module) -> list[Optimizer]:
    """Return an optimizer for each parameter, which steps and frees its gradient in the backward pass."""
    found = []
    for group in _groups(name, model):
        for pair in group["params"]:
            (optimizer,) = _optimizers(name, [{**group, "params": [pair]}])
            found.append(optimizer)

            def use(param: torch.Tensor, optimizer: Optimizer = optimizer) -> None:
                optimizer.step()
                param.grad = None

            pair[1].register_post_accumulate_grad_hook(use)
    return found


def peak_bytes(config: Any, name: str, setup: Setup) -> int:
    """Return the most bytes of tensors that are alive at once in a training step."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=setup.weight_dtype)
    model.train()
    if setup.checkpointing:
        checkpoint(model)
    all_of_them = released(name, model) if setup.release else optimizers(name, model)
    tokens = torch.randint(config.vocab_size, (setup.batch, setup.seq))

    def step() -> None:
        for _ in range(setup.accumulation):
            tracker.reset_mod_stats()  # it takes one pass of a module otherwise
            loss_of(model, tokens, setup.loss_chunk).backward()
        if setup.release:
            return
        for optimizer in all_of_them:
            optimizer.step()
        for optimizer in all_of_them:
            optimizer.zero_grad()

    tracker = MemTracker()
    step()
    return tracked_bytes(tracker, step, model, *all_of_them, tokens)


def tracked_bytes(tracker: MemTracker, step: Callable[[], None], *external: Any) -> int:
    """Return the most bytes of tensors on the CPU that are alive at once in a step, `external` being there before."""
    tracker.track_external(*external)
    with _kernels_as_operations(), tracker:
        step()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


@contextmanager
def _kernels_as_operations() -> Iterator[None]:
    """Let a tracker see each kernel as one operation, as on a GPU, where kernels have no temporaries in memory."""
    originals = {name: getattr(reference, name) for name in reference.__all__}

    def untracked(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            with _disable_current_modes():
                return kernel(*args, **options)

        return run

    for name, kernel in originals.items():
        setattr(reference, name, untracked(kernel))
    try:
        yield
    finally:
        for name, kernel in originals.items():
            setattr(reference, name, kernel)


def compare(config: Any, name: str, setup: Setup, estimator: Estimator) -> dict[str, Any]:
    """Return measured and estimated bytes, the relative error of the estimate and its phase of the peak."""
    peak = estimator.estimate(setup).optimizers[name].peak(setup.checkpointing)
    measured = peak_bytes(config, name, setup)
    return {
        "optimizer": name,
        "batch": setup.batch,
        "seq": setup.seq,
        "dtype": setup.dtype,
        "checkpointing": setup.checkpointing,
        "release": setup.release,
        "measured_bytes": measured,
        "estimated_bytes": peak.peak_bytes,
        "phase": peak.phase,
        "error": round(peak.peak_bytes / measured - 1, 4),
    }


def rows() -> Iterator[dict[str, Any]]:
    """Yield a row for every optimizer, with and without activation checkpointing and gradient release."""
    config = LlamaConfig(**LLAMA_30M)
    estimator = Estimator(config)
    for (batch, seq), name, release, checkpointing in product(BATCHES, MEASURED, (False, True), (False, True)):
        dtype: Any = "bf16" if name == "muon_bf16" else "fp32"
        setup = Setup(batch, seq, dtype, checkpointing, release=release, device="cpu")
        yield compare(config, name, setup, estimator)


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    found = []
    print("| optimizer | tokens | checkpointing | release | measured MiB | estimated MiB | error | peak in |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows():
        found.append(row)
        how = " | ".join("yes" if row[key] else "no" for key in ("checkpointing", "release"))
        sizes = " | ".join(f"{row[key] / 2**20:.1f}" for key in ("measured_bytes", "estimated_bytes"))
        tokens = f"{row['batch']} x {row['seq']}"
        print(f"| {row['optimizer']} | {tokens} | {how} | {sizes} | {row['error']:+.1%} | {row['phase']} |", flush=True)
    if args.out is not None:
        about = {
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
            "model": LLAMA_30M,
            "unit": "bytes of tensors alive at once; error: estimated over measured, less one",
        }
        args.out.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
