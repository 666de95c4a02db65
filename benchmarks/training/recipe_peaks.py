"""Peak memory of the recipes of record on a GPU against `muon8bit estimate`: random weights of the real shapes.

    python -m benchmarks.training.recipe_peaks [--only NAME ...] [--out FILE.json]
    python -m benchmarks.training.recipe_peaks --dry-run      # tiny models on a CPU, no figures

Each recipe takes two steps, as `finetune.sft` does: the first makes the state, the second runs beside all of it.
Measured is their `max_memory_allocated`, without the CUDA context. Before that the model is made on the GPU, saved
and loaded: up to 16 GB of the GPU, of the host's memory and of the disk (TMPDIR says where). The exit status is 1 if
a peak exceeds the most that it may be.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from finetune.config.estimated import memory_options
from finetune.config.sft_recipe import SftRecipe, read_sft_recipe, resolve, sft_recipe_from
from finetune.data.packing import collate
from finetune.data.tokenize_chat import Encoded
from finetune.models.adapters import add_adapter
from finetune.models.pretrained import compute_precision, load_base
from finetune.storage.run_dir import RunFolder
from finetune.training.loss import Batch
from finetune.training.run import make_accelerator, prepare_training
from finetune.training.train_step import accumulate_gradients, clip_gradients, num_targets
from muon8bit import estimate
from muon8bit.estimate import Estimator, Setup, load_config

# Recipe -> GiB that a step may allocate at most; its name tells the memory of the GPU.
MOST = {"llama32_3b_full_16gb": 14.5, "llama31_8b_full_32gb": 30.0, "llama31_8b_qlora_12gb": 10.5}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
# The second one finds the gradients of the first; more of them take no more memory.
MICRO_BATCHES = 2


def recipe_of(name: str) -> SftRecipe:
    """Return a recipe of `finetune/recipes/sft`, with what it leaves to be chosen."""
    return resolve(sft_recipe_from(read_sft_recipe(name), name), 1000, 1)[0]


def setup_of(recipe: SftRecipe) -> Setup:
    """Return what `muon8bit estimate` is asked for a recipe on a GPU that has bf16."""
    return estimate.setup_of(memory_options(recipe, is_cuda=True, has_bf16=True), device="cuda")


def column_of(recipe: SftRecipe) -> str:
    """Return the optimizer of the estimate that a recipe trains with."""
    return estimate.column_of(recipe.optimizer, recipe.adamw_bits, setup_of(recipe))


def preset_of(recipe: SftRecipe) -> str:
    """Return the estimate's name of the model: the last part of the hub's."""
    return recipe.model.rpartition("/")[2]


def random_batch(recipe: SftRecipe, vocab_size: int, device: torch.device) -> Batch:
    """Return full rows of random tokens, all of them targets; packed ones hold two conversations."""
    rng, num = np.random.default_rng(0), 2 if recipe.packing else 1
    length = recipe.seq_len // num
    targets = np.ones(length, np.bool_)

    def conversation() -> Encoded:
        return Encoded(rng.integers(3, vocab_size, length).astype(np.int32), targets, "random")

    return collate([[conversation() for _ in range(num)] for _ in range(recipe.batch_size)], device)


class RecipeTraining:
    """A recipe set up as `finetune.sft` does it, on a model of `config` with random weights in bf16."""

    def __init__(self, recipe: SftRecipe, config: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        self.recipe = recipe
        with tempfile.TemporaryDirectory() as folder:
            self.accelerator, _ = make_accelerator(recipe, RunFolder(Path(folder)), compute_precision(recipe))
            self.device = self.accelerator.device
            torch.manual_seed(0)
            with self.device:
                causal: Any = AutoModelForCausalLM
                causal.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
            gc.collect()
            model = load_base(folder, recipe, self.device)
        if recipe.has_adapter:
            model = add_adapter(model, recipe, recipe.model)
        self.model, self.optimizers, _ = prepare_training(self.accelerator, recipe, model, None)
        micro_batches = min(recipe.gradient_accumulation, MICRO_BATCHES)
        self.batches = [random_batch(recipe, config.vocab_size, self.device)] * micro_batches

    def step(self) -> None:
        """Take one optimizer step, as `finetune.training.trainer` takes it."""
        targets = sum(int(num_targets(batch)) for batch in self.batches)
        accumulate_gradients(self.accelerator, self.model, self.batches, targets, self.recipe.loss_chunk)
        if not self.recipe.release_gradients:
            clip_gradients(self.model, self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def allocated_bytes(training: RecipeTraining) -> int:
    """Return the most bytes that CUDA has allocated in two steps; 0 on a CPU."""
    on_gpu = training.device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    training.step()
    training.step()
    return torch.cuda.max_memory_allocated() if on_gpu else 0


def measure(name: str, dry: bool) -> dict[str, Any]:
    """Return a row of the record: measured and estimated GiB; words in place of what a dry run does not measure."""
    recipe, config = recipe_of(name), load_config(preset_of(recipe_of(name)))
    if dry:
        config.update(TINY)
        recipe = replace(recipe, seq_len=64)
    estimated = Estimator(config).estimate(setup_of(recipe)).peak_bytes(column_of(recipe))
    measured = allocated_bytes(RecipeTraining(recipe, config))
    return {
        "recipe": name,
        "optimizer": column_of(recipe),
        "most_gib": MOST[name],
        "estimated_gib": "dry run" if dry else round(estimated / 2**30, 3),
        "measured_gib": "dry run" if dry else round(measured / 2**30, 3),
    }


def main() -> int:
    """Print a row for each recipe, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(MOST), default=tuple(MOST), help="recipes to run")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on a CPU, the same steps, no figures")
    parser.add_argument("--out", type=Path, help="write the record there (JSON)")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU; --dry-run goes through the same steps on a CPU")
    rows = []
    for name in args.only:
        rows.append(measure(name, args.dry_run))
        print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        about = {
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "unit": "GiB; measured: torch.cuda.max_memory_allocated over two steps",
        }
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return int(not args.dry_run and any(row["measured_gib"] > row["most_gib"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
