"""TRL's SFTTrainer, with LoRA: A and B go to Muon, B at sixteen times the lr of A (LoRA+)."""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from examples.stand_in import llama, rows, tokenizer
from muon8bit.integrations.transformers import muon8bit_for_trainer


def train(
    model: PreTrainedModel,
    dataset: Dataset,
    words: PreTrainedTokenizerBase,
    output_dir: str,
    lora: LoraConfig | None,
    **changes: Any,
) -> list[float]:
    """Take ten steps; return the loss of every one.

    `lora` None trains all weights; `changes` are further options of SFTConfig.
    """
    args = SFTConfig(
        output_dir,
        learning_rate=1e-3,
        weight_decay=0.1,
        adam_beta2=0.95,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        max_steps=10,
        logging_steps=1,
        **changes,
    )
    pair = muon8bit_for_trainer(args, loraplus_ratio=None if lora is None else 16)
    trainer = SFTTrainer(
        model, args, processing_class=words, train_dataset=dataset, peft_config=lora, optimizer_cls_and_kwargs=pair
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    adapters = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        train(llama(), rows(), tokenizer(), folder, adapters, bf16=False, report_to=[])
