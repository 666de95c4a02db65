"""CPU time of a generated token with a KV cache, of the architectures of the 4M recipes over the dense one's, in turns.

    python -m benchmarks.training.generation_speed [--contexts 128 896] [--rounds 9] [--out FILE.json]

Random weights, fp32, one thread, one sequence. Each arm has its prompt in a cache; in a round every arm generates
`TOKENS` tokens greedily, in an order that rotates, and cuts its cache back to the prompt. Times are CPU times of the
process, so that what others do on the machine counts less. Reported are ratios of medians, the dense arm's over the
arm's: above 1, the arm is faster. "range" is that of the ratios of single rounds. Bytes are those of the tensors in the
cache, for each token of the prompt.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.gpu.step_time import write_record
from benchmarks.robustness.against_commit import ROOT, commit_of
from benchmarks.training.step_arms import seconds
from finetune.config.recipe import read_recipe
from finetune.models.build import model_config

# Arm -> recipe. "mha" is "dense" with a key and a value of their own for every query head.
RECIPES = {"dense": "gqa_4m", "mha": "llama_4m", "mla": "mla_4m", "moe": "qwen3_moe_4m", "mla_moe": "mla_moe_4m"}
TOKENS = 16


class Generation:
    """A model with a prompt of random tokens in its cache."""

    def __init__(self, recipe: str, context: int) -> None:
        torch.manual_seed(0)
        config = model_config(read_recipe(recipe))
        self.model: Any = AutoModelForCausalLM.from_config(config).eval()
        self.cache = DynamicCache(config=config)
        self.context = context
        self.tokens = torch.randint(config.vocab_size, (1, context))
        with torch.no_grad():
            self.first = self._next(self.tokens)

    def _next(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return torch.as_tensor(logits[:, -1:].argmax(-1))

    @torch.no_grad()
    def generate(self) -> None:
        """Generate `TOKENS` tokens behind the prompt."""
        token = self.first
        for _ in range(TOKENS):
            token = self._next(token)

    def cut(self) -> None:
        """Leave the prompt alone in the cache."""
        self.cache.crop(-TOKENS)

    def cache_bytes(self) -> float:
        """Return the bytes of the cache for each token of the prompt."""
        layers: list[Any] = list(self.cache.layers)
        assert all(layer.keys.shape[-2] == self.context for layer in layers)
        return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values)) / self.context


def measure(context: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return the bytes, the ratio and its range for each arm."""
    arms = {name: Generation(recipe, context) for name, recipe in RECIPES.items()}
    kept = {name: arm.cache_bytes() for name, arm in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for index in range(-1, rounds):  # one before that counts for nothing
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            took = seconds(arms[name].generate)
            arms[name].cut()
            if index >= 0:
                times[name].append(took)
        print(f"context {context}: round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    return {name: {"cache_bytes": kept[name], **_ratio(times["dense"], times[name])} for name in arms}


def _ratio(dense: list[float], own: list[float]) -> dict[str, Any]:
    each = [one / other for one, other in zip(dense, own, strict=True)]
    ratio = median(dense) / median(own)
    return {"speed": round(ratio, 3), "range": [round(min(each), 3), round(max(each), 3)]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", type=int, default=(128, 896), metavar="N", help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the record there (JSON)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record: dict[str, Any] = {"commit": commit_of(ROOT), "rounds": args.rounds, "tokens": TOKENS, "recipes": RECIPES}
    record["load"] = [os.getloadavg()[0]]
    record["contexts"] = {str(context): measure(context, args.rounds) for context in args.contexts}
    record["load"].append(os.getloadavg()[0])
    write_record(record, "median CPU time of a token of the dense arm over that of the arm", args.out)


if __name__ == "__main__":
    main()
