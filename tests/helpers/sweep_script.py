"""A script for the sweep's tests: the options, folders and exit codes of pretraining, without torch and training.

The loss has its minimum at a rate of 1e-2, the seed adds a hundredth of itself, and weight decay adds itself. Where a
width is given it is a quadratic in the log2 of rate and weight decay, whose minimum moves with the width.
"""

from __future__ import annotations

import json
import math
import os
import signal

from finetune.command_line import run_script
from finetune.config.recipe import Recipe
from finetune.pretrain import build_parser, parse

__all__ = ["build_parser", "loss", "loss_at_width", "main", "parse"]

STEPS, SAVED_AT = 4, 2


def loss(rate: float, seed: int, weight_decay: float) -> float:
    """Return the loss after the last step."""
    return 2 + (math.log10(rate) + 2) ** 2 + seed / 100 + weight_decay


def loss_at_width(width: int, rate: float, seed: int, weight_decay: float) -> float:
    """Return the loss after the last step: least at a decay of .1, and a rate of .01 that falls as width ** -.1."""
    from_best = math.log2(rate / 0.01) + 0.1 * math.log2(width / 32)
    return 2 + 0.1 * from_best**2 + 0.05 * math.log2(weight_decay / 0.1) ** 2 + seed / 100


def main(argv: list[str]) -> int:
    """Write what a run of 4 steps leaves, with a checkpoint at step 2."""
    return run_script(lambda: _work(argv))


def _work(argv: list[str]) -> int:
    recipe, folder = parse(argv)
    folder.checkpoint = folder.candidates[0] if folder.candidates else None
    begun_at = folder.step
    folder.create(recipe)
    facts = {"corpus": "abc", "val_loss_before": 9.0}
    (folder.path / "run.json").write_text(json.dumps(facts))
    if recipe.clip == 13:
        raise RuntimeError("thirteen")
    if recipe.clip == 14:
        os.kill(os.getpid(), signal.SIGSEGV)
    for step in range(begun_at + 1, STEPS + 1):
        value = _loss(recipe) + (STEPS - step)
        if recipe.lr > 0.5:
            folder.diverged_file.write_text(json.dumps({"step": step, "error": f"step {step}: not finite"}))
            return 1
        record = {"step": step, "loss": value, "tokens": 10 * step, "seconds": 0.5 * step}
        folder.append_metrics({**record, "val_loss": value if step == STEPS else None})
        if step == SAVED_AT:
            (folder.path / "checkpoints" / "step-0000002").mkdir(parents=True)
            (folder.path / "checkpoints" / "step-0000002" / "progress.json").write_text('{"step": 2}')
            _wait_for_a_signal()
    facts["gpus"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    result = {**facts, "optimizer": recipe.optimizer, "step": STEPS, "val_loss": value, "state_bytes": 77}
    (folder.path / "result.json").write_text(json.dumps({**result, "begun_at": begun_at}))
    (folder.path / "model").mkdir()
    return 0


def _loss(recipe: Recipe) -> float:
    if recipe.width is None:
        return loss(recipe.lr, recipe.seed, recipe.weight_decay)
    return loss_at_width(recipe.width, recipe.lr, recipe.seed, recipe.weight_decay)


def _wait_for_a_signal() -> None:
    """Write the process id into the pipe that the environment names, and hold it open until a signal comes."""
    if pipe := os.environ.get("SWEEP_TEST_PIPE"):
        with open(pipe, "w") as file:
            file.write(f"{os.getpid()}\n")
            file.flush()
            signal.pause()
