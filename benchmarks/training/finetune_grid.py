"""Which optimizer tunes SmolLM2-135M better: a search of learning rates, then seeds at the best of them.

    python -m benchmarks.training.finetune_grid --runs runs/grid        # continues where it was stopped
    python -m benchmarks.training.finetune_grid --runs runs/grid --table

Every run is `finetune/sft.py` with the recipe of `make finetune`; its record goes into --record as soon as it is done,
and a run that is recorded there is not run again. Stages, each waiting for the one before:

    lora-lr   LoRA r=16, 20 steps, seed 0: AdamW, and Muon8bit (linear) for all Muons, over a grid of rates that grows
              until the best is not at its end
    lora      LoRA r=16, 40 steps, seeds 0 and 1, all four arms at those rates
    full-lr   all weights, 20 steps, seed 0: the same search
    full      all weights, 20 steps, seed 0: AdamW, Muon, Muon8bit (linear) at those rates
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).parents[1] / "results" / "finetune_smollm2_135m.json"
ARMS = {
    "adamw": ["--optimizer", "adamw"],
    "muon": ["--optimizer", "muon"],
    "muon8bit linear": ["--optimizer", "muon8bit", "--codebook", "linear"],
    "muon8bit dynamic": ["--optimizer", "muon8bit", "--codebook", "dynamic"],
}
SEARCHED = ("adamw", "muon8bit linear")  # the other Muons take the latter's rate
FIRST_RATES = {
    ("lora", "adamw"): [5e-4, 1e-3, 2e-3],
    ("lora", "muon8bit linear"): [7.5e-4, 1.5e-3, 3e-3],
    ("full", "adamw"): [5e-5, 1e-4, 2e-4],
    ("full", "muon8bit linear"): [2e-4, 4e-4, 8e-4],
}
KEPT = ("val_loss_before", "val_loss", "step", "tokens", "seconds", "corpus", "model", "python", "torch")


class Grid:
    """Runs by name, and their records."""

    def __init__(self, runs: Path, record: Path) -> None:
        self.runs, self.file = runs, record
        self.records: dict[str, dict[str, Any]] = json.loads(record.read_text()) if record.exists() else {}

    def loss(self, mode: str, arm: str, lr: float, seed: int, steps: int) -> float:
        """Return a run's held-out loss, in nats per target; run it, or continue it, unless its record is there."""
        name = f"{mode}-{arm.replace(' ', '-')}-lr{lr:g}-seed{seed}-steps{steps}"
        if name not in self.records:
            folder = self.runs / name
            self._run(folder, mode, arm, lr, seed, steps)
            result = json.loads((folder / "result.json").read_text())
            state = json.loads((folder / "state_report.json").read_text())["total_bytes"]
            asked = {"mode": mode, "arm": arm, "lr": lr, "seed": seed, "steps": steps, "state_bytes": state}
            self.records[name] = asked | {key: result[key] for key in KEPT}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.records, indent=1) + "\n")
            for large in ("checkpoints", "model"):
                shutil.rmtree(folder / large, ignore_errors=True)
        return float(self.records[name]["val_loss"])

    def _run(self, folder: Path, mode: str, arm: str, lr: float, seed: int, steps: int) -> None:
        command = [sys.executable, str(ROOT / "finetune" / "sft.py")]
        if any((folder / "checkpoints").glob("step-*/progress.json")):
            command += ["--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # stopped before its first checkpoint
            command += ["--recipe", "smollm2_135m", *ARMS[arm], "--output-dir", str(folder)]
            numbers = {"mode": mode, "lr": lr, "seed": seed, "max-steps": steps, "eval-every": steps, "save-every": 10}
            numbers |= {"warmup-steps": steps // 10, "num-answers": 0, "keep-checkpoints": 1}
            command += [str(part) for key, value in numbers.items() for part in (f"--{key}", value)]
        print(" ".join(command), flush=True)
        subprocess.run(command, cwd=ROOT, check=True)

    def best_rate(self, mode: str, arm: str) -> float:
        """Return the best of a grid of rates at 20 steps, which grows by factors of 2 until the best is interior."""
        rates = list(FIRST_RATES[mode, arm])
        while True:
            losses = {lr: self.loss(mode, arm, lr, seed=0, steps=20) for lr in rates}
            best = min(losses, key=losses.__getitem__)
            if best == rates[0]:
                rates.insert(0, best / 2)
            elif best == rates[-1]:
                rates.append(best * 2)
            else:
                return best

    def table(self) -> str:
        """Return the table in Markdown: mean held-out loss by mode, arm, steps and rate, with the spread over seeds."""
        groups: dict[tuple[str, int, str, float], list[dict[str, Any]]] = {}
        for record in self.records.values():
            key = (record["mode"], record["steps"], record["arm"], record["lr"])
            groups.setdefault(key, []).append(record)
        lines = [
            "| mode | steps | optimizer | lr | seeds | loss before | loss after | spread | state |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for (mode, steps, arm, lr), found in sorted(groups.items()):
            after = [record["val_loss"] for record in found]
            before = found[0]["val_loss_before"]
            state = found[0]["state_bytes"] / 1e6
            lines.append(
                f"| {mode} | {steps} | {arm} | {lr:g} | {len(found)} | {before:.3f} | {statistics.mean(after):.3f} "
                f"| {max(after) - min(after):.3f} | {state:.1f} MB |"
            )
        return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "grid", help="folder of the runs")
    parser.add_argument("--record", type=Path, default=RECORD, help="the JSON file with a record of each run")
    parser.add_argument("--stage", choices=("lora", "full"), action="append", help="default: both")
    parser.add_argument("--table", action="store_true", help="print the table of what is recorded, and run nothing")
    options = parser.parse_args()
    grid = Grid(options.runs.resolve(), options.record)
    plans = {"lora": (list(ARMS), (0, 1), 40), "full": (["adamw", "muon", "muon8bit linear"], (0,), 20)}
    for mode in () if options.table else options.stage or plans:
        rates = {arm: grid.best_rate(mode, arm) for arm in SEARCHED}
        arms, seeds, steps = plans[mode]
        for arm in arms:
            for seed in seeds:
                grid.loss(mode, arm, rates["adamw" if arm == "adamw" else "muon8bit linear"], seed, steps)
    print(grid.table())


if __name__ == "__main__":
    main()
