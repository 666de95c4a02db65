"""A plain PyTorch loop, saved and resumed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.stand_in import llama, rows
from muon8bit import Muon8bit, param_groups


def train(model: nn.Module, batches: Iterable[dict[str, Tensor]], checkpoint: Path | None = None) -> list[float]:
    """Make one pass over `batches`; return the loss of every step.

    Resumes from `checkpoint` if it exists, and writes it.
    """
    optimizer = Muon8bit(param_groups(model, lr=1e-3, weight_decay=0.1))
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if checkpoint is not None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    return losses


if __name__ == "__main__":
    print(train(llama(), DataLoader(rows().with_format("torch"), batch_size=4, shuffle=True)))
