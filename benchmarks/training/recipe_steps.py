"""Two steps of pretraining recipes at their real sizes, one row of a few random tokens each, on a CPU in fp32.

    python -m benchmarks.training.recipe_steps mla_30m mla_moe_30m [--tokens 16]

Each recipe's own model, optimizer and options: what the tests take in tiny. Printed is a JSON line a recipe: its
losses, the state's bytes, and the CPU seconds. The exit status is 1 if a loss is not finite, or a weight that got a
gradient stayed as it was.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetune.config.recipe import read_recipe
from finetune.models.build import model_config
from finetune.models.optimizers import build_optimizers, report_state


def two_steps(name: str, num_tokens: int) -> dict[str, Any]:
    """Take two steps of a recipe; return what is printed, with the names of weights that stayed as they were."""
    torch.manual_seed(0)
    start, recipe = time.process_time(), read_recipe(name)
    config = model_config(recipe)
    model = AutoModelForCausalLM.from_config(config)
    optimizers = build_optimizers(model, recipe)
    tokens = torch.randint(config.vocab_size, (1, num_tokens))
    before = {key: param.detach().double().sum() for key, param in model.named_parameters()}
    losses = []
    for _ in range(2):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        trained = {key for key, param in model.named_parameters() if param.grad is not None and param.grad.any()}
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    stayed = [key for key, p in model.named_parameters() if key in trained and p.detach().double().sum() == before[key]]
    state = report_state(optimizers)[0]["total_bytes"]
    cpu_seconds = round(time.process_time() - start, 1)
    return {"recipe": name, "losses": losses, "state_bytes": state, "stayed": stayed, "cpu_seconds": cpu_seconds}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--tokens", type=int, default=16, metavar="N")
    args = parser.parse_args(arguments)
    is_good = True
    for name in args.recipes:
        found = two_steps(name, args.tokens)
        print(json.dumps(found), flush=True)
        is_good &= all(map(math.isfinite, found["losses"])) and not found["stayed"]
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
