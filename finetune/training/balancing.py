"""Balancing of mixtures of experts: losses that routers take beside the model's own, biases that follow the load.

The gradient of a router's loss is put in where its weights are given out, in the backward pass of the model. So it
takes the same way as all other gradients, whatever wraps the model or recomputes its activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.config.options import Training
from finetune.models.routers import BIAS, SCORES, Router, biases
from finetune.training.expert_load import ExpertLoad
from finetune.training.loss import Batch


@dataclass(frozen=True)
class CountedTokens:
    """The tokens of a micro-batch, by sequence: a block, or one conversation of a row.

    Attributes:
        sequence: number of the sequence that a token is in: int64 [tokens].
        is_counted: 1 for a token of a block or a conversation, 0 for padding: fp32 [tokens].
        num_sequences: at most so many; no sequence has a larger number.
    """

    sequence: Tensor
    is_counted: Tensor
    num_sequences: int


def counted_tokens(batch: Batch, lengths: Sequence[int]) -> CountedTokens:
    """Return which tokens of a batch count, without waiting for the device.

    Args:
        batch: of `Sequences.batch`; where rows are packed, `position_ids` restart with each conversation.
        lengths: tokens at the start of each row that are not padding.
    """
    num_rows, seq_len = batch["targets"].shape
    device = batch["targets"].device
    places = torch.arange(seq_len, device=device).expand(num_rows, seq_len)
    is_counted = places < torch.tensor(lengths, device=device)[:, None]
    starts = batch.get("position_ids", places) == 0
    most = num_rows * (seq_len if "position_ids" in batch else 1)
    return CountedTokens(starts.flatten().cumsum(0) - 1, is_counted.flatten().float(), most)


def balance_loss(logits: Tensor, tokens: CountedTokens, router: Router) -> Tensor:
    """Return the sequence-wise balance loss of one router, summed over tokens that count: fp32 scalar, 1 each if even.

    For each sequence it is the sum over experts of f P, times its tokens. f is the share of its tokens that have the
    expert among the top k by score, over k / experts; no gradient flows through it. P is the mean share that the expert
    has of a token's scores. Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20.

    Args:
        logits: of the router, [tokens, experts].
        tokens: of the micro-batch.
        router: its top k, its number of experts, and its score.
    """
    num, counted = router.num_experts, tokens.is_counted
    chosen = logits.topk(router.top_k, sorted=False).indices + tokens.sequence[:, None] * num
    chosen_by = logits.new_zeros(tokens.num_sequences * num, dtype=torch.float32)
    chosen_by.index_add_(0, chosen.flatten(), counted.repeat_interleave(router.top_k))
    sizes = torch.zeros_like(chosen_by[: tokens.num_sequences]).index_add_(0, tokens.sequence, counted)
    f = chosen_by.view(-1, num) * (num / router.top_k) / sizes.clamp_min(1)[:, None]
    scores = SCORES[router.score](logits.float())
    shares = scores / scores.sum(-1, keepdim=True)
    return ((f[tokens.sequence] * shares).sum(-1) * counted).sum()


def z_loss(logits: Tensor, tokens: CountedTokens) -> Tensor:
    """Return the squared logsumexp of logits [tokens, experts], summed over tokens that count: fp32 scalar.

    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    return (logits.float().logsumexp(-1).square() * tokens.is_counted).sum()


class _WithLoss(torch.autograd.Function):
    """The weights of a router, behind which a loss gets the gradient 1 as soon as they get theirs."""

    @staticmethod
    def forward(_ctx: Any, weights: Tensor, _loss: Tensor) -> Tensor:
        """Return a copy of the weights, which experts may change in place."""
        return weights.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of the weights, and 1."""
        return gradient, torch.ones((), device=gradient.device)


class Balancing:
    """Watches the routers of a model while it trains: adds their losses, counts their load, moves their biases.

    Nothing waits for the device. In an evaluation, and when activations are computed again, nothing is counted.

    Args:
        model: of the run, before Accelerate prepares it or an adapter is added; its routers get forward hooks.
        routers: of `find_routers`, at least one.
        recipe: its coefficients; 0 leaves what the routers give as it is, to the bit.

    Attributes:
        load: that the host has read.
        counts: tokens that each expert of each router got in the step, of all ranks: int64 [experts of all routers].
        losses: balance loss and z-loss of the step, without coefficients: fp32 [2]; this rank's until `reduce`.
    """

    def __init__(self, model: nn.Module, routers: Sequence[Router], recipe: Training) -> None:
        self.routers, self.load = list(routers), ExpertLoad(routers)
        self.aux_loss, self.z_loss = recipe.router_aux_loss, recipe.router_z_loss
        self.bias_rate: float = getattr(recipe, "router_bias_rate", 0.0)
        self._sizes = [router.num_experts for router in routers]
        self._biased = biases(model, routers) if self.bias_rate else {}
        for number, router in enumerate(routers):
            model.get_submodule(router.path).register_forward_hook(torch.compiler.disable(self._hook(number)))
        self._tokens: CountedTokens | None = None  # of the micro-batch, until its backward pass is done
        self._is_counting = False

    @property
    def has_losses(self) -> bool:
        """Whether a loss is added."""
        return self.aux_loss > 0 or self.z_loss > 0

    def begin_step(self, rows: Sequence[Sequence[int]], num_tokens: int, accelerator: Accelerator) -> None:
        """Begin one optimizer step.

        Args:
            rows: tokens that count in each row of each of this rank's micro-batches.
            num_tokens: tokens that count in the micro-batches of all ranks.
            accelerator: of the run.
        """
        self._rows = rows
        self._share = 1 / (max(num_tokens, 1) * len(self.routers))
        self._scale: int = accelerator.num_processes  # data parallelism averages gradients over ranks
        self.counts = torch.zeros(sum(self._sizes), dtype=torch.int64, device=accelerator.device)
        self._counts_of = self.counts.split(self._sizes)
        self.losses = torch.zeros(2, device=accelerator.device)

    @contextmanager
    def forward(self, number: int, batch: Batch) -> Iterator[None]:
        """Watch the forward pass of a micro-batch of the step; its backward pass follows the block."""
        self._tokens, self._is_counting = counted_tokens(batch, self._rows[number]), True
        try:
            yield
        finally:
            self._is_counting = False

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the step of all ranks, after its last backward pass: a collective call for all routers together."""
        self._tokens = None
        if accelerator.num_processes > 1:
            self.counts = accelerator.reduce(self.counts, "sum")
            self.losses = accelerator.reduce(self.losses, "sum") if self.has_losses else self.losses

    @torch.no_grad()
    def move_biases(self) -> None:
        """Add the rate to the biases of experts with less than the mean load of the step, take it from those with more.

        Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
        """
        for router, counts in zip(self.routers, self.counts.split(self._sizes), strict=True):
            if module := self._biased.get(router.path):
                bias: Any = getattr(module, BIAS)
                bias.add_(torch.sign(counts.sum() - counts * router.num_experts), alpha=self.bias_rate)

    def _hook(self, number: int) -> Callable[..., Any]:
        router = self.routers[number]

        def watch(_module: nn.Module, _args: Any, given: Any) -> Any:
            if self._tokens is None:
                return None
            logits, weights, indices, *more = given
            if self._is_counting:
                self._count(number, indices.reshape(-1, router.top_k), self._tokens)
            if not self.has_losses:
                return None
            loss = self._loss(logits.reshape(-1, router.num_experts), self._tokens, router)
            return (logits, _WithLoss.apply(weights, loss), indices, *more)  # type: ignore[no-untyped-call]

        return watch

    @torch.no_grad()
    def _count(self, number: int, indices: Tensor, tokens: CountedTokens) -> None:
        counted = tokens.is_counted.long().repeat_interleave(indices.shape[-1])
        self._counts_of[number].index_add_(0, indices.flatten(), counted)

    def _loss(self, logits: Tensor, tokens: CountedTokens, router: Router) -> Tensor:
        """Return this router's part of the losses of the whole step, times their coefficients."""
        losses = [torch.zeros((), device=logits.device)] * 2
        if self.aux_loss:
            losses[0] = balance_loss(logits, tokens, router) * self._share
        if self.z_loss:
            losses[1] = z_loss(logits, tokens) * self._share
        if self._is_counting:
            self.losses += torch.stack([loss.detach() for loss in losses])
        return self._scale * (self.aux_loss * losses[0] + self.z_loss * losses[1])
