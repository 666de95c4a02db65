"""Peak memory of real CPU training steps against `muon8bit estimate`, for every optimizer that exists.

    PYTHONPATH=.:kernels python kernels/bench/memory_peaks.py [--out FILE.json]

A random Llama of 30M parameters, the second step (the first one makes the state). Measured are the bytes of all tensors
by torch's MemTracker; a process's resident memory is mostly imports. `muon_bf16` has bf16 weights, as torch.optim.Muon
keeps its momentum in their dtype, with fp32 moments for the rest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, LlamaConfig

from muon8bit import Muon8bit, param_groups
from muon8bit.memory import Estimator, Setup
from muon8bit.memory.activations import checkpoint

LLAMA_30M = {
    "vocab_size": 16384,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
}
MEASURED = ("adamw", "adamw8bit", "muon", "muon_bf16", "muon8bit")
# (sequences, tokens): the peak in the step, and in the backward pass.
BATCHES = ((1, 64), (4, 256))


def optimizers(name: str, model: torch.nn.Module) -> list[Optimizer]:
    """Optimizers that together are the column `name` of the estimate."""
    groups = param_groups(model, lr=1e-3)
    if name == "muon8bit":
        return [Muon8bit(groups, lr=1e-3)]
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=1e-3)]
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return [AdamW8bit(model.parameters(), lr=1e-3)]
    matrices = [pair for group in groups if group["algorithm"] == "muon" for pair in group["params"]]
    rest = [group for group in groups if group["algorithm"] == "adamw"]
    if name == "muon":
        others = [param for group in rest for _, param in group["params"]]
        return [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, lr=1e-3)]
    return [torch.optim.Muon(matrices, lr=1e-3), Muon8bit(rest, lr=1e-3)]


def peak_bytes(config: Any, name: str, setup: Setup) -> int:
    """Most bytes of tensors that are alive at once in a training step."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=setup.weight_dtype)
    model.train()
    if setup.checkpointing:
        checkpoint(model)
    both = optimizers(name, model)
    tokens = torch.randint(config.vocab_size, (setup.batch, setup.seq))

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        for optimizer in both:
            optimizer.step()
        for optimizer in both:
            optimizer.zero_grad()

    step()
    tracker = MemTracker()
    tracker.track_external(model, *both, tokens)
    with tracker:
        step()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def compare(config: Any, batch: int, seq: int) -> Iterator[dict[str, Any]]:
    """A row for each optimizer, with and without activation checkpointing: measured and estimated bytes, the relative
    error of the estimate and its phase of the peak."""
    estimator = Estimator(config)
    for name in MEASURED:
        for checkpointing in (False, True):
            dtype = "bf16" if name == "muon_bf16" else "fp32"
            setup = Setup(batch=batch, seq=seq, dtype=dtype, checkpointing=checkpointing, device="cpu")
            peak = estimator.estimate(setup).optimizers[name].peak(checkpointing)
            measured = peak_bytes(config, name, setup)
            yield {
                "optimizer": name,
                "batch": batch,
                "seq": seq,
                "dtype": dtype,
                "checkpointing": checkpointing,
                "measured_bytes": measured,
                "estimated_bytes": peak.peak_bytes,
                "phase": peak.phase,
                "error": round(peak.peak_bytes / measured - 1, 4),
            }


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    rows = []
    print("| optimizer | tokens | checkpointing | measured MiB | estimated MiB | error | peak in |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for batch, seq in BATCHES:
        for row in compare(LlamaConfig(**LLAMA_30M), batch, seq):
            rows.append(row)
            sizes = " | ".join(f"{row[key] / 2**20:.1f}" for key in ("measured_bytes", "estimated_bytes"))
            checkpointing = "yes" if row["checkpointing"] else "no"
            print(
                f"| {row['optimizer']} | {batch} x {seq} | {checkpointing} | {sizes} | {row['error']:+.1%} "
                f"| {row['phase']} |",
                flush=True,
            )
    if args.out is not None:
        versions = {"torch": torch.__version__, "model": LLAMA_30M}
        args.out.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
