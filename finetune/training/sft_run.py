"""A fine-tuning run's additions to any run: its base, and the answers of that base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from finetune.config.sft_recipe import SftRecipe
from finetune.data.messages import Example
from finetune.data.tokenize_chat import ChatEncoding
from finetune.parallel.launch import plain_model
from finetune.storage.run_dir import write_beside
from finetune.training.generation import generate_answers
from finetune.training.run import Run


@dataclass(frozen=True)
class Sample:
    """A held-out prompt (text and token ids, generation prompt included) and the answer that the data gives."""

    prompt: str
    ids: list[int]
    reference: str


def samples_of(examples: Sequence[Example], encoding: ChatEncoding) -> list[Sample]:
    """Return the first question of each conversation, with its answer there."""
    samples = []
    for example in examples:
        first = example.answers[0]
        asked = example.messages[:first]
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in asked)
        samples.append(Sample(prompt, encoding.prompt(asked, example.tools), example.messages[first]["content"]))
    return samples


@dataclass(kw_only=True)
class SftRun(Run):
    """A fine-tuning run; `base` is what the model was loaded from, `samples` what it answers before and after."""

    unit: ClassVar[str] = "targets"
    recipe: SftRecipe
    base: str
    samples: list[Sample]

    @property
    def val_loss_before(self) -> float:
        """Validation loss of the base in nats per target."""
        return float(self.facts["val_loss_before"])

    @property
    def answers_file(self) -> Path:
        """Prompts, references and answers."""
        return self.folder.path / "answers.json"

    def describe(self, val_loss: float) -> str:
        """Describe a validation loss in nats per target, and its difference to the loss before training."""
        return f"{val_loss:.4f} nats per target, {val_loss - self.val_loss_before:+.4f} to before"

    def write_answers(self, when: str) -> None:
        """Generate answers to the samples and record them under `when`, `before` or `after`, on the main process."""
        if not (self.samples and self.accelerator.is_main_process):
            return
        known = json.loads(self.answers_file.read_text()) if self.answers_file.is_file() else []
        if len(known) != len(self.samples):
            known = [{"prompt": sample.prompt, "reference": sample.reference} for sample in self.samples]
        answers = generate_answers(
            self.accelerator,
            plain_model(self.model),
            self.tokenizer,
            [sample.ids for sample in self.samples],
            self.recipe.answer_tokens,
        )
        for record, answer in zip(known, answers, strict=True):
            record[when] = answer
        write_beside(self.answers_file, json.dumps(known, indent=1))
