"""Tables and figure of docs/results/architectures.md, out of the recipes' shapes and the committed records.

python -m benchmarks.training.architectures          # rewrite the tables of the page, and its figure
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.generation_speed import RECIPES
from finetune.config.recipe import read_recipe
from finetune.evidence.arms import Arms, differences, fill_marks, markdown, read_arms
from finetune.evidence.figures import FONT_SIZE, new_axes
from finetune.storage.plots import point_style, save_figure
from finetune.sweep.records import loss_of
from muon8bit.estimate import Setup, load_config
from muon8bit.estimate.models import build
from muon8bit.estimate.optimizers import state_bytes
from muon8bit.estimate.sizes import measure
from muon8bit.estimate.token_costs import token_costs

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results" / "architectures.md"
NAMES = {
    "dense": "dense, GQA (the control)",
    "mha": "dense, full attention (`llama_4m`)",
    "mla": "dense, MLA",
    "moe": "experts, GQA (Qwen3-MoE)",
    "mla_moe": "experts, MLA (DeepSeek-V3)",
}
# Those that were trained: the control also with weights that begin at another standard deviation.
TRAINED = {arm: name for arm, name in NAMES.items() if arm != "mha"}
TRAINED["dense_init"] = "dense, GQA, weights begin at 0.056"
OPTIMIZERS = {"adamw": "AdamW", "muon32": "Muon", "muon8": "Muon8bit"}
SWEEP = "python -m finetune.sweep benchmarks/sweeps/architectures.toml"
SPEED = "python -m benchmarks.training.generation_speed --out benchmarks/results/generation_speed.json"


@cache
def costs_of(arm: str) -> dict[str, int]:
    """Return parameters, those active for a token, and bytes: of a token's cache, and of the state by optimizer."""
    config = load_config(read_recipe(RECIPES[arm]).model)
    model = build(config, torch.float32)
    token = token_costs(model, config)
    found = {"total": sum(param.numel() for param in model.parameters())}
    found |= {"active": token.active_parameters or 0, "cache": token.cache_bytes or 0}
    for name in OPTIMIZERS:
        setup = Setup(batch=1, seq=8, dtype="fp32", device="cpu", bits=32 if name == "muon32" else 8)
        found[name] = state_bytes("adamw" if name == "adamw" else "muon8bit", measure(model, setup).trained)
    return found


def architecture_table(folder: Path) -> str:
    """Return what the architecture alone decides: parameters, cache, and speed of generation where it is measured."""
    file = folder / "generation_speed.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"contexts": {}}
    dense, rows = costs_of("dense"), []
    for arm, name in NAMES.items():
        costs = costs_of(arm)
        row = [name, f"{costs['active'] / 1e6:.2f}M", f"{costs['total'] / 1e6:.2f}M", f"{costs['cache']:,}"]
        row.append(f"{costs['cache'] / dense['cache']:.3f}")
        for measured in record["contexts"].values():
            one = measured[arm]
            if one["cache_bytes"] != costs["cache"]:
                raise ValueError(f"{file}: the cache of {arm} has {one['cache_bytes']} bytes a token; measure it anew")
            row.append(f"{one['speed']:.2f} ({one['range'][0]:.2f} to {one['range'][1]:.2f})")
        rows.append(row)
    head = ["architecture", "active", "total", "KV bytes a token, fp32", "over dense"]
    table = markdown([*head, *(f"speed at {context} tokens" for context in record["contexts"])], rows)
    return table if record["contexts"] else f"{table}\n\nSpeed is not measured yet: `{SPEED}`."


def optimizer_table(_folder: Path) -> str:
    """Return what the optimizer alone decides: bytes of its state, for each architecture."""
    rows = []
    for arm in (arm for arm in NAMES if arm != "mha"):
        costs = costs_of(arm)
        shown = [f"{costs[name] / 1e6:.1f} MB" for name in OPTIMIZERS]
        rows.append([NAMES[arm], *shown, *(f"{costs['muon8'] / costs[name]:.3f}" for name in ("adamw", "muon32"))])
    return markdown(["architecture", *OPTIMIZERS.values(), "Muon8bit over AdamW", "over Muon"], rows)


def loss_table(folder: Path) -> str:
    """Return the losses by seed, each arm at its best rate."""
    arms, rows = _read_losses(folder), []
    for arm, name in TRAINED.items():
        cells = [_losses(arms, f"{arm}_{optimizer}") for optimizer in OPTIMIZERS]
        gaps = [differences(arms, f"{arm}_{optimizer}", f"{arm}_muon32") for optimizer in ("adamw", "muon8")]
        rows.append([name, *cells, *(", ".join(f"{gap:+.4f}" for gap in each.values()) or "-" for each in gaps)])
    head = ["architecture", *OPTIMIZERS.values(), "AdamW minus Muon", "Muon8bit minus Muon"]
    return markdown(head, rows) if arms else f"Not measured yet: `{SWEEP}`."


def _read_losses(folder: Path) -> Arms:
    """Read the runs of the sweep, and check that their state has the bytes of `optimizer_table`.

    Raises:
        ValueError: the state of a run has other bytes.
    """
    file = folder / "architectures.jsonl"
    arms: Arms = read_arms(file) if file.exists() else {}
    for arm, runs in arms.items():
        architecture, _, optimizer = arm.replace("_init", "").rpartition("_")
        known, found = costs_of(architecture)[optimizer], {r["metrics"]["state_bytes"] for r in runs.values()}
        if found != {known}:
            raise ValueError(f"{file}: the state of {arm} has {found} bytes instead of {known}; run it anew")
    return arms


def _losses(arms: Arms, arm: str) -> str:
    runs = arms.get(arm, {}).values()
    losses = [f"{loss:.4f}" for record in runs if (loss := loss_of(record)) is not None]
    return f"{', '.join(losses)} (lr {next(iter(runs))['rate']:g})" if losses else "-"


def losses_figure(arms: Arms) -> Any:
    """Draw the loss of each seed, by architecture and optimizer."""
    figure, (axes,) = new_axes("architecture", "validation loss, nats per token", "4M active parameters, 250 steps")
    for number, (optimizer, called) in enumerate(OPTIMIZERS.items()):
        runs = [(at, arms.get(f"{name}_{optimizer}", {}).values()) for at, name in enumerate(TRAINED)]
        points = [(at + 0.15 * (number - 1), loss_of(record)) for at, of in runs for record in of]
        xs, ys = ([point[i] for point in points] for i in (0, 1))
        axes.plot(xs, ys, ls="", ms=5, label=called, **point_style(number))
    axes.set_xticks(range(len(TRAINED)), list(TRAINED), fontsize=FONT_SIZE)
    axes.legend(fontsize=FONT_SIZE)
    return figure


TABLES = {"architecture": architecture_table, "optimizer": optimizer_table, "losses": loss_table}


def filled(page: str, folder: Path = RESULTS) -> str:
    """Return a page with each of `TABLES` between its marks; see `fill_marks`."""
    return fill_marks(page, TABLES, lambda name: TABLES[name](folder))


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
    if arms := _read_losses(RESULTS):
        save_figure(losses_figure(arms), PAGE.parent / "figures" / "architectures.png", {"Software": None})
