"""Bytes that a step of the family sends under FSDP2, beside Muon's, by the optimizer's plan: nothing is run.

    python -m benchmarks.scaling.family_bytes

Of the hidden matrices of Llama-3.1-8B, each parameter's rows on 8 GPUs; of one GPU, the mean of all, without the
all-gather of the sums that norms are made of.
"""

from __future__ import annotations

import argparse
from math import prod
from typing import Any

import torch

from benchmarks.scaling.simulation import MODELS
from benchmarks.scaling.transfers import bytes_sent
from muon8bit.config import Bits
from muon8bit.estimate.exchange import planned_exchange
from muon8bit.estimate.optimizers import Param

ADAMUON = {"moment": "element", "is_sign": True}
OPTIMIZERS: dict[str, tuple[Bits, dict[str, Any]]] = {
    "Muon8bit": (8, {}),
    "NorMuon8bit": (8, {"moment": "row"}),
    'NorMuon8bit, `preset="modded"`': (8, {"moment": "shape"}),
    "AdaMuon8bit": (8, ADAMUON),
    "AdaMuon8bit, `bits=32`": (32, ADAMUON),
}


def rows(model: str, num_gpus: int, kind: str) -> list[tuple[str, int, float]]:
    """Return name, bytes that a GPU sends in a step, and of each parameter, those of all GPUs together."""
    layers = [shape for _ in range(MODELS[model].layers) for shape in MODELS[model].linears()]
    num_elements, found = sum(prod(shape) for shape in layers), list[tuple[str, int, float]]()
    for name, (bits, options) in OPTIMIZERS.items():
        params = tuple(Param(f"{i}", s, torch.bfloat16, is_muon=True, bits=bits) for i, s in enumerate(layers))
        sent = sum(bytes_sent(planned_exchange(params, num_gpus, num_gpus, kind, **options)))
        found.append((name, sent // num_gpus, sent / num_elements))
    return found


def table(found: list[tuple[str, int, float]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| optimizer | sent by a GPU, GB | by all, bytes a parameter | over Muon8bit |",
        "| --- | --- | --- | --- |",
    ]
    first = found[0][1]
    lines += [f"| {name} | {sent / 1e9:.3f} | {each:.3f} | {sent / first:.3f} |" for name, sent, each in found]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Llama-3.1-8B")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--kind", default="cuda_sm90", help="device kind that the paths are for")
    args = parser.parse_args()
    print(table(rows(args.model, args.gpus, args.kind)))


if __name__ == "__main__":
    main()
