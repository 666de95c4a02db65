"""Cost of less memory in the default recipe: bf16 weights, rounded stochastically and to nearest; 8-bit AdamW.

    python -m benchmarks.training.less_memory --runs runs/less_memory          # runs what is not recorded yet
    python -m benchmarks.training.less_memory --table

Every run is `finetune/pretrain.py` with the recipe of `make pretrain` and the same initial weights, in bf16 rounded
once; its record goes into --record as soon as it is done. The gap of an arm is its loss minus that of fp32 weights,
seed by seed. The last line is the mean gap of stochastic rounding over that of rounding to nearest.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).parents[1] / "results" / "less_memory.json"
ARMS = {
    "fp32": ["--dtype", "fp32"],
    "bf16 stochastic": ["--dtype", "bf16", "--param-rounding", "stochastic"],
    "bf16 nearest": ["--dtype", "bf16", "--param-rounding", "nearest"],
    "fp32, 8-bit AdamW": ["--adamw-bits", "8"],
    "bf16 stochastic, 8-bit AdamW": ["--dtype", "bf16", "--adamw-bits", "8"],
}
SEEDS = (0, 1, 2)
KEPT = ("val_loss", "step", "tokens", "corpus", "tokenizer", "model_config", "python", "torch", "transformers")


def run(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """Run once from the start; return the record."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(ROOT / "finetune" / "pretrain.py"), *ARMS[arm], "--seed", str(seed)]
    subprocess.run([*command, "--output-dir", str(folder)], cwd=ROOT, check=True)
    result = json.loads((folder / "result.json").read_text())
    shutil.rmtree(folder)
    return {"arm": arm, "seed": seed, **{key: result[key] for key in KEPT}}


def table(records: list[dict[str, Any]]) -> str:
    """Return the table in Markdown, over the seeds that every arm has.

    It has validation losses, the mean gap to fp32, and the ratio of the mean gaps.
    """
    losses = {(record["arm"], record["seed"]): record["val_loss"] for record in records}
    seeds = [seed for seed in SEEDS if all((arm, seed) in losses for arm in ARMS)]
    if not seeds:
        return "no seed has every arm yet"
    lines = ["| weights | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean gap |"]
    lines.append("| --- " * (len(seeds) + 2) + "|")
    gaps = {arm: statistics.mean(losses[arm, seed] - losses["fp32", seed] for seed in seeds) for arm in ARMS}
    for arm, gap in gaps.items():
        lines.append(f"| {arm} | " + " | ".join(f"{losses[arm, seed]:.4f}" for seed in seeds) + f" | {gap:+.4f} |")
    lines.append(f"\ngap of stochastic over gap of nearest: {gaps['bf16 stochastic'] / gaps['bf16 nearest']:.3f}")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "less_memory", help="folder of the runs")
    parser.add_argument("--record", type=Path, default=RECORD, help="the JSON file with a record of each run")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="only these; default: all, in turn")
    parser.add_argument("--arm", choices=ARMS, action="append", help="only these; default: all")
    parser.add_argument("--table", action="store_true", help="print the table of what is recorded, and run nothing")
    options = parser.parse_args()
    file: Path = options.record
    for seed in () if options.table else options.seed or SEEDS:
        for arm in options.arm or ARMS:
            records = json.loads(file.read_text()) if file.exists() else []
            if not any((record["arm"], record["seed"]) == (arm, seed) for record in records):
                new = run(options.runs.resolve() / f"{re.sub('[ ,]+', '-', arm)}-seed{seed}", arm, seed)
                file.write_text(json.dumps([*records, new], indent=1) + "\n")
    print(table(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
