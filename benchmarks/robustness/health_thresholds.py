"""Measure what 8 bits do to the updates of small runs, sound ones and ones with a wrong codebook, for the thresholds.

    python -m benchmarks.robustness.health_thresholds            # trains what is not recorded yet
    python -m benchmarks.robustness.health_thresholds --table

A Llama 128 wide of one layer is trained on source text of the standard library: 4 query heads, 1 key and value head, an
MLP of 2048. In `uneven` runs the inputs of down_proj are multiplied by log-normal gains (of standard deviation 2),
so that columns of its gradient differ, as they do where neurons do. `planted` is no model: gradients [256, 4096] of
singular values 1/k, with log-normal rows and columns, and half as much noise in each step. All matrices are watched.
`MatrixHealth` has the measures; each line of the record is one matrix at one step.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.robustness.sign_models import HEADS, batches
from muon8bit import AdaMuon8bit, Muon8bit, NorMuon8bit, QuantizationHealth, QuantizationWarning, param_groups

RECORD = Path(__file__).parents[1] / "results" / "health_thresholds.jsonl"
LR, WARM_UP, STEPS, EVERY = 5e-3, 20, 40, 20
SIZES = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 1, "vocab_size": 1024, "head_dim": 32}
MEMBERS: dict[str, tuple[type[Muon8bit], dict[str, Any]]] = {
    "Muon linear": (Muon8bit, {}),
    "Muon dynamic": (Muon8bit, {"codebook": "dynamic"}),
    "NorMuon linear": (NorMuon8bit, {}),
    "AdaMuon dynamic": (AdaMuon8bit, {}),
    "AdaMuon linear": (AdaMuon8bit, {"codebook": "linear"}),
}
RUNS = [
    *(("even", member) for member in MEMBERS),
    *(("uneven 2", member) for member in ("Muon linear", "AdaMuon dynamic", "AdaMuon linear")),
    *(("planted", member) for member in ("Muon linear", "Muon dynamic")),
]
HEADER = "| run | descent | cosine | momentum's error | flips | zeros | warned |"


def optimizer_of(member: str, groups: list[dict[str, Any]]) -> Muon8bit:
    """Return a member of the family with blocks of 4096 in the planted case, else of 2048."""
    kind, options = MEMBERS[member]
    for group in groups if kind is not Muon8bit else ():
        group.pop("adjust_lr_fn", None)  # the preset's
    longest = max(param.shape[-1] for group in groups for _, param in group["params"])
    return kind(groups, lr=LR, block_size=4096 if longest > 2048 else 2048, **options)


def planted(member: str) -> Iterator[Muon8bit]:
    """Give the optimizer with the gradient of each step."""
    rows, cols = 256, 4096
    param = nn.Parameter(torch.zeros(rows, cols))
    left, right = (torch.linalg.qr(torch.randn(size, rows))[0] for size in (rows, cols))
    scales = torch.exp(torch.randn(rows, 1)) * torch.exp(torch.randn(1, cols))
    optimizer = optimizer_of(member, [{"params": [("planted", param)], "algorithm": "muon"}])
    for _ in range(STEPS):
        noise = torch.randn(cols, rows) / cols**0.5
        param.grad = (left / torch.arange(1, rows + 1)) @ (right + 0.5 * noise).T * scales
        yield optimizer


def trained(member: str, unevenness: float) -> Iterator[Muon8bit]:
    """Give the optimizer with the gradients of each step of the model."""
    config = AutoConfig.for_model("llama", **{**HEADS, **SIZES})
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    gains = torch.exp(unevenness * torch.randn(SIZES["intermediate_size"]))
    gains /= gains.square().mean().sqrt()

    def multiply(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0] * gains,)

    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            module.register_forward_pre_hook(multiply)
    optimizer, ids = optimizer_of(member, param_groups(model, lr=LR)), batches("moe", 0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / WARM_UP)
        batch = next(ids)
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield optimizer
        optimizer.zero_grad()


def run(kind: str, member: str) -> Iterator[dict[str, Any]]:
    """Train, and give the measures of all matrices."""
    torch.manual_seed(0)
    name, _, unevenness = kind.partition(" ")
    health = None
    for optimizer in planted(member) if name == "planted" else trained(member, float(unevenness or 0)):
        health = health or QuantizationHealth(optimizer, sample=100, every=EVERY)
        optimizer.step()
        for of in health.latest():
            measures = {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in asdict(of).items()}
            yield {"run": kind, "member": member, **measures}


def table(records: list[dict[str, Any]]) -> str:
    """Return the worst of each run in Markdown: the matrix and step that keep least of the descent, and the others'."""
    lines = [HEADER, "| --- " * 7 + "|"]
    for kind, member in dict.fromkeys((of["run"], of["member"]) for of in records):
        own = [of for of in records if (of["run"], of["member"]) == (kind, member)]
        below = sorted({of["name"].removesuffix(".weight").rpartition(".")[2] for of in own if _is_below(of)})
        most = [max(of[key] for of in own) for key in ("momentum_error", "sign_flips", "zero_codes")]
        shares = " | ".join(f"{value:.1%}" for value in most)
        least = min(of["descent"] for of in own), min(of["update_cosine"] for of in own)
        lines.append(
            f"| {kind}, {member} | {least[0]:.3f} | {least[1]:.3f} | {shares} | {', '.join(below) or 'none'} |"
        )
    return "\n".join(lines)


def _is_below(record: dict[str, Any]) -> bool:
    return bool(record["descent"] < record["min_descent"])


def main() -> None:
    """Run what is not recorded, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD, help="JSON lines")
    parser.add_argument("--table", action="store_true", help="print the table of what is recorded, and train nothing")
    options = parser.parse_args()
    file: Path = options.record
    warnings.simplefilter("ignore", QuantizationWarning)
    for kind, member in () if options.table else RUNS:
        text = file.read_text() if file.exists() else ""
        if f'"run": "{kind}", "member": "{member}"' not in text:
            file.write_text(text + "".join(json.dumps(record) + "\n" for record in run(kind, member)))
            print(f"{kind}, {member}: done", flush=True)
    print(table([json.loads(line) for line in file.read_text().splitlines()]))


if __name__ == "__main__":
    main()
