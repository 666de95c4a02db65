"""Measures of a finished run that pretraining itself does not take: loss by how frequent a token is, and FLOPs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from finetune.setup.prepare import PretrainRun
from finetune.training.run import Run

NUM_DECILES = 10


def deciles_of(counts: Any) -> Any:
    """Return the decile of each token id, 0 for the most frequent ones: int64 [vocab].

    Ids are sorted by their count, equal ones by id. An id is in the decile that the middle of its tokens falls into, so
    that each decile holds about a tenth of all tokens; one id with more than that leaves the next decile empty.

    Args:
        counts: of each id in the training text, int [vocab]; at least one above 0.
    """
    counts = np.asarray(counts, dtype=np.int64)
    order = np.argsort(-counts, kind="stable")
    sorted_counts = counts[order]
    middles = np.cumsum(sorted_counts) - sorted_counts / 2
    deciles = np.empty(len(counts), dtype=np.int64)
    deciles[order] = np.minimum(NUM_DECILES - 1, (NUM_DECILES * middles / sorted_counts.sum()).astype(np.int64))
    return deciles


@torch.no_grad()
def loss_by_decile(run: PretrainRun) -> dict[str, Any]:
    """Return the validation loss by decile of the target's frequency in the training text.

    Returns:
        `loss_by_decile`: nats per token, the most frequent first, None where a decile has no target;
        `targets_by_decile`, and `ids_by_decile`, how many ids of the vocabulary each has.
    """
    vocab = int(run.accelerator.unwrap_model(run.model).config.vocab_size)
    deciles = torch.from_numpy(deciles_of(np.bincount(run.cache.train, minlength=vocab)))
    sums = torch.zeros(NUM_DECILES, dtype=torch.float64)
    targets = torch.zeros(NUM_DECILES, dtype=torch.float64)
    run.model.eval()
    for start in range(0, len(run.validation), run.recipe.batch_size):
        indices = range(start, min(start + run.recipe.batch_size, len(run.validation)))
        batch = run.validation.batch(list(indices), run.accelerator.device)
        nats = _nats(run, batch["input_ids"], batch["targets"])
        places = deciles[batch["targets"].flatten().cpu()]
        sums.index_add_(0, places, nats.double().cpu())
        targets.index_add_(0, places, torch.ones_like(places, dtype=torch.float64))
    run.model.train()
    losses = [round(s / n, 6) if n else None for s, n in zip(sums.tolist(), targets.tolist(), strict=True)]
    return {
        "loss_by_decile": losses,
        "targets_by_decile": [int(n) for n in targets.tolist()],
        "ids_by_decile": np.bincount(deciles.numpy(), minlength=NUM_DECILES).tolist(),
    }


def _nats(run: Run, input_ids: Tensor, targets: Tensor) -> Tensor:
    logits: Tensor = run.model(input_ids=input_ids, use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")


def flops(run: Run) -> dict[str, float]:
    """Return the FLOPs of a run, a multiply-add counted as 2.

    Returns:
        `flops_per_token`: 6 for each trained parameter, attention's products of activations left out;
        `optimizer_flops_per_step`: of Newton-Schulz, 5 steps of 4 m^2 n + 2 m^3 for a matrix of m <= n. What is
        elementwise is left out.
    """
    matrices = 0
    for wrapped in run.optimizers:
        optimizer: Any = getattr(wrapped, "optimizer", wrapped)
        for group in optimizer.param_groups:
            if group.get("algorithm") == "muon" or isinstance(optimizer, torch.optim.Muon):
                for param in group["params"]:
                    rows, cols = sorted(param.shape[-2:])
                    matrices += param.numel() // (rows * cols) * (20 * rows**2 * cols + 10 * rows**3)
    trained = sum(param.numel() for param in run.model.parameters() if param.requires_grad)
    return {"flops_per_token": 6 * trained, "optimizer_flops_per_step": matrices}
