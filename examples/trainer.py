"""Hugging Face's Trainer: lr, weight decay, betas and eps of TrainingArguments reach Muon8bit."""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from examples.stand_in import llama, rows
from muon8bit.integrations.transformers import muon8bit_for_trainer


def train(model: nn.Module, dataset: Dataset, output_dir: str, **changes: Any) -> list[float]:
    """Take ten steps; return the loss of every one.

    `changes` are further TrainingArguments.
    """
    args = TrainingArguments(
        output_dir,
        learning_rate=1e-3,  # an AdamW rate
        weight_decay=0.1,
        adam_beta2=0.95,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        max_steps=10,
        logging_steps=1,
        **changes,
    )
    trainer = Trainer(model, args, train_dataset=dataset, optimizer_cls_and_kwargs=muon8bit_for_trainer(args))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train(llama(), rows(), folder, report_to=[])
