"""Load of experts: tokens of steps by expert of a mixture, as the host reads them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import islice
from typing import Any

from finetune.models.routers import Router

# Keys of metrics.jsonl and result.json; `dead_experts` only where the step is evaluated.
LOAD_KEYS = ("expert_load_cv", "expert_share_min", "expert_share_max", "aux_loss", "z_loss", "dead_experts")


class ExpertLoad:
    """Tokens of all ranks that each expert got.

    Args:
        routers: of the model.

    Attributes:
        since: step of the last evaluation.
        tokens: that each expert of each router got since then.
    """

    def __init__(self, routers: Sequence[Router]) -> None:
        self._routers = routers
        self.since, self.tokens = 0, [0] * sum(router.num_experts for router in routers)

    def add(self, counts: Sequence[int]) -> dict[str, float]:
        """Count one step; return how it spread over the experts.

        Args:
            counts: tokens that each expert of each router got.

        Returns:
            Coefficient of variation of a layer's experts, their mean over layers (0 is even), and the least and the
            greatest share that an expert of any layer has of the layer's tokens times k.
        """
        self.tokens = [had + got for had, got in zip(self.tokens, counts, strict=True)]
        layers = self._by_router(counts)
        shares = [[count / max(sum(layer), 1) for count in layer] for layer in layers]
        variations = [statistics.pstdev(layer) * len(layer) for layer in shares]  # the mean share is 1 / experts
        return {
            "expert_load_cv": statistics.mean(variations),
            "expert_share_min": min(map(min, shares)),
            "expert_share_max": max(map(max, shares)),
        }

    def take_dead(self, step: int) -> dict[str, list[int]]:
        """Return number of a layer -> its experts without a token since the last evaluation, and count anew from here.

        Args:
            step: of this evaluation.
        """
        dead: dict[str, list[int]] = {}
        for router, tokens in zip(self._routers, self._by_router(self.tokens), strict=True):
            if none := [expert for expert, count in enumerate(tokens) if count == 0]:
                dead.setdefault(str(router.layer), []).extend(none)
        self.since, self.tokens = step, [0] * len(self.tokens)
        return dead

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        return {"since": self.since, "tokens": self.tokens}

    def restore(self, state: dict[str, Any] | None, step: int) -> None:
        """Take the state of a checkpoint; one of a release that kept none begins at its step.

        Args:
            state: of `state`, or None.
            step: of the checkpoint.
        """
        self.since, self.tokens = step, [0] * len(self.tokens)
        if state is not None:
            self.since, self.tokens = state["since"], state["tokens"]

    def _by_router(self, counts: Sequence[int]) -> list[list[int]]:
        left = iter(counts)
        return [list(islice(left, router.num_experts)) for router in self._routers]


def describe_dead(dead: dict[str, list[int]], since: int) -> str:
    """Return one line that names dead experts by layer and number, counted from 0.

    Args:
        dead: of `ExpertLoad.take_dead`, not empty.
        since: step of the evaluation before.
    """
    named = "; ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in dead.items())
    num = sum(map(len, dead.values()))
    return f"{num} dead {'expert' if num == 1 else 'experts'}, without a token since step {since}: {named}"
