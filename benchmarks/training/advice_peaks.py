"""Peak memory of the commands that `muon8bit estimate --budget` offers, against what it says of them.

    python -m benchmarks.training.advice_peaks [--only MODEL ...] [--out FILE.json]

Small models of six architectures, three budgets for each: shares of the peak of all weights in fp32. Each command is
parsed by the script that it names and set up as that does it, on a CPU, with random weights; measured are the bytes of
all tensors in the second step, by torch's MemTracker. A command for several GPUs is not run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.training.memory_peaks import tracked_bytes
from benchmarks.training.recipe_peaks import RecipeTraining
from finetune import sft
from finetune.config.sft_recipe import SftRecipe, resolve
from muon8bit.cli import main as muon8bit

_SIZES: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
_SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES},
    "qwen3": {"model_type": "qwen3", **_SIZES, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **_SIZES},  # caps its logits: no --loss-chunk
    "gpt_neox": {"model_type": "gpt_neox", **_SIZES},
    "mistral": {"model_type": "mistral", **_SIZES, "sliding_window": None},
    "olmo2": {"model_type": "olmo2", **_SIZES},
}
BUDGETS = (0.9, 0.6, 0.35)  # of the peak of the setup as asked
ASKED = ("--device", "cpu", "--dtype", "fp32", "--batch-size", "4", "--seq-len", "256")
# Beyond this the exit code is 1.
TOLERANCE = 0.02


def estimated(folder: Path, *options: str) -> dict[str, Any]:
    """Return what `muon8bit estimate` prints as JSON."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = muon8bit(["estimate", str(folder), *ASKED, *options, "--json"])
    assert code == 0, options
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def parsed(command: str) -> SftRecipe:
    """Return the recipe that a command line of `finetune.sft` makes."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "finetune.sft"], command
    recipe, _ = sft.parse(words[3:])
    return resolve(recipe, 1000, 1)[0]


def measured_bytes(recipe: SftRecipe, config: Any) -> int:
    """Return the most bytes of tensors that are alive at once in the second step."""
    training = RecipeTraining(recipe, config)
    training.step()
    tracker = MemTracker()
    optimizers = [optimizer.optimizer for optimizer in training.optimizers]
    nothing = torch.zeros(1, requires_grad=True).register_hook(lambda grad: grad)
    for param in training.model.parameters():
        if not param.requires_grad:  # the tracker would hook its gradient, which torch refuses
            tracker._param_to_grad_hook_handles[param] = (nothing, nothing)
    return tracked_bytes(tracker, training.step, training.model, *optimizers, *training.batches[0].values())


def rows(names: list[str], budgets: tuple[float, ...] = BUDGETS) -> Iterator[dict[str, Any]]:
    """Yield one for each command of each budget of each model."""
    for name in names:
        config = AutoConfig.for_model(**MODELS[name], **_IDS)
        with tempfile.TemporaryDirectory() as home:
            folder = Path(home) / name
            causal: Any = AutoModelForCausalLM
            causal.from_config(config).save_pretrained(folder)
            asked = estimated(folder)["optimizers"]["muon8bit"]["peak_bytes"]
            done: dict[str, int] = {}
            for share in budgets:
                budget = int(share * asked)
                for offer in estimated(folder, "--budget", f"{budget}B")["offers"]:
                    if offer["setup"]["num_gpus"] > 1:
                        continue
                    command = offer["command"]
                    if command not in done:
                        done[command] = measured_bytes(replace(parsed(command), model=name), config)
                    measured = done[command]
                    yield {
                        "model": name,
                        "budget_bytes": budget,
                        "command": command.replace(str(folder), name),
                        "estimated_bytes": offer["peak_bytes"],
                        "measured_bytes": measured,
                        "error": round(offer["peak_bytes"] / measured - 1, 4),
                    }


def main() -> int:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=list(MODELS), help="models to run")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    found = []
    print("| model | budget MiB | estimated MiB | measured MiB | error | command |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows(args.only):
        found.append(row)
        sizes = " | ".join(f"{row[f'{key}_bytes'] / 2**20:.1f}" for key in ("budget", "estimated", "measured"))
        print(f"| {row['model']} | {sizes} | {row['error']:+.2%} | `{row['command']}` |", flush=True)
    if args.out is not None:
        about = {
            "command": shlex.join(["python", "-m", "benchmarks.training.advice_peaks", *sys.argv[1:]]),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
            "models": MODELS,
            "asked": shlex.join(ASKED),
            "unit": "bytes of tensors alive at once in a step; error: estimated over measured, less one",
        }
        args.out.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")
    return int(any(abs(row["error"]) > TOLERANCE for row in found))


if __name__ == "__main__":
    sys.exit(main())
