"""A run on biographies: set up, measured by first-token accuracy, and finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM

from finetune.config.errors import InputError
from finetune.evidence.biographies import QUESTIONS, Biographies, make_biographies
from finetune.evidence.controls import build_control
from finetune.evidence.measures import flops
from finetune.evidence.options import RareRecipe
from finetune.models.build import config_hash, model_config
from finetune.parallel.ranks import on_main
from finetune.storage.outputs import write_results
from finetune.storage.resuming import check_same_run
from finetune.storage.run_dir import RunFolder
from finetune.training.loss import IGNORED, Batch
from finetune.training.run import Run, make_accelerator, prepare_training, versions
from finetune.training.train_step import Sequences

# Every so many of a pass's samples the validation takes one: no divisor of the number of questions.
VALIDATED_EVERY = 11
SAME_RUN = {"model_config": ("--model-config", "model"), "corpus": ("--groups", "set of biographies")}


class BiographySamples(Sequences):
    """Questions with their answers, of which the answer's tokens are targets.

    Args:
        data: the biographies.
        picks: row of each sample, int64 [n].
        seed: of the permutations.
    """

    def __init__(self, data: Biographies, picks: Any, seed: int = 0) -> None:
        super().__init__(seed)
        self.picks, self.rows = picks, torch.from_numpy(data.rows)
        positions = torch.arange(1, self.rows.shape[1])
        is_answer = (positions >= torch.from_numpy(data.answer_at)[:, None]) & (self.rows[:, 1:] != 0)
        self.targets = torch.where(is_answer, self.rows[:, 1:], IGNORED)
        self._num_targets = is_answer.sum(1).tolist()

    def __len__(self) -> int:
        return len(self.picks)

    def count_targets(self, index: int) -> int:
        """Return the tokens of an answer, 0 for index -1."""
        return int(self._num_targets[self.picks[index]]) if index >= 0 else 0

    def count_tokens(self, index: int) -> int:
        """Return the tokens of a question and its answer, 0 for index -1."""
        return int((self.rows[self.picks[index]] != 0).sum()) if index >= 0 else 0

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """Return samples as {input_ids, targets}, each [len(indices), length - 1] int64."""
        rows = torch.from_numpy(self.picks[np.maximum(indices, 0)])
        targets = self.targets[rows]
        targets[torch.tensor(indices) < 0] = IGNORED
        return {"input_ids": self.rows[rows, :-1].to(device), "targets": targets.to(device)}


@dataclass(kw_only=True)
class RareRun(Run):
    """A run on biographies."""

    unit: ClassVar[str] = "targets"
    data: Biographies
    recipe: RareRecipe

    def describe(self, val_loss: float) -> str:
        """Describe a validation loss in nats per token of an answer."""
        return f"{val_loss:.4f} nats per target"

    @torch.no_grad()
    def measure_more(self) -> dict[str, Any]:
        """Return `first_token_correct`: by group a string, of each measured class the number of its right answers."""
        self.model.eval()
        device, data, counts = self.accelerator.device, self.data, []
        for classes in data.measured_classes(self.recipe.measured_classes):
            rows = (classes[:, None] * len(QUESTIONS) + np.arange(len(QUESTIONS))).flatten()
            ids, places = torch.from_numpy(data.rows[rows]).to(device), torch.from_numpy(data.answer_at[rows])
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
            here = torch.arange(len(rows))
            is_right = logits[here, places - 1].argmax(-1) == ids[here, places]
            by_class = is_right.view(len(classes), len(QUESTIONS)).sum(1)
            counts.append("".join(map(str, by_class.tolist())))
        self.model.train()
        return {"first_token_correct": counts}


def set_up(recipe: RareRecipe, folder: RunFolder) -> RareRun:
    """Make the data, the model and its optimizers, and the folder of a run.

    Raises:
        InputError: the model's vocabulary is too small, or bad input.
    """
    accelerator, folder = make_accelerator(recipe, folder, recipe.mixed_precision)
    set_seed(recipe.seed)
    data, config = make_biographies(recipe.groups), model_config(recipe)
    if config.vocab_size < len(data.vocabulary):
        raise InputError(
            "--model-config",
            f"its vocab_size is {config.vocab_size}, and the biographies have {len(data.vocabulary)} words; give a "
            "larger vocabulary, or a smaller --groups",
        )
    facts = {"corpus": data.hash, "model_config": config_hash(config), **versions(accelerator)}
    check_same_run(folder, facts, SAME_RUN)
    causal: Any = AutoModelForCausalLM
    model = causal.from_config(config, dtype=torch.float32)
    model.train()
    prepared, optimizers, schedulers = prepare_training(accelerator, recipe, model, None, make_optimizers=build_control)
    run = RareRun(
        accelerator=accelerator,
        recipe=recipe,
        folder=folder,
        facts=facts,
        tokenizer=None,
        model=prepared,
        optimizers=optimizers,
        schedulers=schedulers,
        train=BiographySamples(data, data.samples, recipe.seed),
        validation=BiographySamples(data, data.samples[::VALIDATED_EVERY]),
        data=data,
    )
    on_main(accelerator, lambda: folder.create(recipe))
    run.say(
        f"{len(data.groups):,} classes, {len(run.train):,} samples a pass, {len(data.vocabulary):,} words\n"
        f"model {sum(p.numel() for p in model.parameters()):,} parameters, optimizer {recipe.optimizer}"
    )
    return run


def finish(run: RareRun) -> None:
    """Write the results of a complete run: its validations by class, and what a guess would give."""
    if run.accelerator.is_main_process:
        measured = [m for m in run.folder.metrics() if "first_token_correct" in m]
        curve = [[m["step"], m["first_token_correct"]] for m in measured]
        write_results(run, {"first_token_correct": curve, "chance": run.data.chance(), **flops(run)})
