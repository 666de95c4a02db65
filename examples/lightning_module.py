"""Lightning with automatic optimization: Trainer clips, accumulates, saves and resumes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from examples.stand_in import llama, rows
from muon8bit import Muon8bit, param_groups


class LanguageModel(lightning.LightningModule):
    """A model that returns its loss, with Muon8bit as its one optimizer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of one micro-batch."""
        loss: Tensor = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Muon8bit:
        """Return the optimizer of all parameters."""
        return Muon8bit(param_groups(self.model, lr=1e-3, weight_decay=0.1))

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, **_: Any
    ) -> None:
        """Clip the norm of all gradients together, which Trainer itself refuses under mixed precision."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # of 16-mixed
            scaler.unscale_(optimizer)
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)


def train(model: nn.Module, batches: Iterable[dict[str, Tensor]], checkpoint: Path, **options: Any) -> list[float]:
    """Train for `max_epochs`, from `checkpoint` if it exists, and write it.

    Args:
        model: Is trained in place; a batch's entries are its arguments.
        batches: Of one epoch.
        checkpoint: The file of Lightning's checkpoint.
        options: Those of `lightning.Trainer`.

    Returns:
        The loss of every micro-batch.
    """
    trainer = lightning.Trainer(**options)
    module = LanguageModel(model)
    trainer.fit(module, batches, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
    trainer.save_checkpoint(checkpoint, weights_only=False)  # the optimizer too
    return module.losses


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        loader = DataLoader(rows().with_format("torch"), batch_size=4, shuffle=True)
        quiet = {"logger": False, "enable_checkpointing": False}
        print(train(llama(), loader, Path(folder) / "last.ckpt", max_epochs=1, gradient_clip_val=1.0, **quiet))
