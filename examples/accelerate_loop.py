"""The same loop with Accelerate: several processes, mixed precision, gradient accumulation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.stand_in import llama, rows
from muon8bit import Muon8bit, param_groups


def train(model: nn.Module, batches: Iterable[dict[str, Tensor]], **options: Any) -> list[float]:
    """Make one pass over `batches`; return the loss of every micro-batch.

    `options` are Accelerator's.
    """
    accelerator = Accelerator(**options)
    optimizer = Muon8bit(param_groups(model, lr=1e-3, weight_decay=0.1))
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train(llama(), DataLoader(rows().with_format("torch"), batch_size=4, shuffle=True)))
