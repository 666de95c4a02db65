"""Two ranks against one process with twice the accumulation: the same batches, losses, validation loss and weights.

    python -m benchmarks.scaling.two_ranks --runs runs/two_ranks    # continues where it was stopped

`finetune/pretrain.py` trains a small Llama on the text of Python's standard library: on one process for three seeds,
and with the first seed on two ranks by torchrun. What must hold: the first 10 losses differ by at most 1e-4 relative,
the final validation losses by at most the spread over the seeds, and both ranks end with the same weights, bit for bit.
The record says what was found, and is written whether it holds or not; the exit status says whether it does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).parents[1] / "results" / "two_ranks.json"
SEEDS = (0, 1, 2)
MODEL = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
RECIPE = {"name": "two_ranks", "model": MODEL, "dataset": "stdlib", "optimizer": "muon8bit", "lr": 5e-3}
RECIPE |= {"warmup_steps": 20, "batch_size": 8, "seq_len": 128, "eval_every": 1000, "save_every": 50, "clip": 1.0}
FACTS = ("corpus", "tokenizer", "python", "torch", "transformers", "accelerate")


def train(folder: Path, recipe: Path, steps: int, seed: int, num_ranks: int) -> dict[str, Any]:
    """Run, or continue, one training; its result.json with the losses of all steps."""
    command = [sys.executable]
    if num_ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    command.append(str(ROOT / "finetune" / "pretrain.py"))
    if not (folder / "result.json").is_file():
        if any((folder / "checkpoints").glob("step-*")):
            command += ["--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # stopped before its first checkpoint
            numbers = {"max-steps": steps, "seed": seed, "gradient-accumulation": 2 // num_ranks}
            command += ["--recipe", str(recipe), "--output-dir", str(folder)]
            command += [str(part) for key, value in numbers.items() for part in (f"--{key}", value)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert result["world_size"] == num_ranks
    assert result["step"] == steps, f"{folder} has {result['step']} steps; give another --runs"
    result["losses"] = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result


def compare(one: list[dict[str, Any]], two: dict[str, Any]) -> dict[str, Any]:
    """Return what was found, and whether it is what must hold.

    Args:
        one: results of one process, by seed.
        two: of two ranks, with the first seed.
    """
    pairs = zip(one[0]["losses"][:10], two["losses"][:10], strict=True)
    first = max(abs(a - b) / a for a, b in pairs)
    finals = [result["val_loss"] for result in one]
    spread, gap = max(finals) - min(finals), abs(finals[0] - two["val_loss"])
    equal = len(two["parameter_hashes"]) == 2 and len(set(two["parameter_hashes"])) == 1
    return {
        "largest_relative_difference_of_the_first_10_losses": first,
        "validation_losses_of_one_process_by_seed": finals,
        "spread_over_seeds": spread,
        "validation_loss_of_two_ranks": two["val_loss"],
        "difference": gap,
        "weights_of_both_ranks_equal": equal,
        "holds": first <= 1e-4 and gap <= spread and equal and one[0]["tokens"] == two["tokens"],
    }


def main() -> int:
    """Run what is missing, compare, and write the record. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "two_ranks", help="folder of the runs")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a run")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    runs = options.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    recipe = runs / "two_ranks.yaml"
    recipe.write_text(json.dumps(RECIPE))  # JSON is YAML
    one = [train(runs / f"one-{seed}", recipe, options.steps, seed, num_ranks=1) for seed in SEEDS]
    two = train(runs / "two-0", recipe, options.steps, SEEDS[0], num_ranks=2)
    found = compare(one, two)
    command = f"python -m benchmarks.scaling.two_ranks --steps {options.steps}"
    record = {"command": command, "recipe": RECIPE, **{key: two[key] for key in FACTS}, **found}
    options.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
