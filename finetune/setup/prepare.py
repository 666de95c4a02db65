"""From a checked recipe to everything that a pretraining run holds, before its first step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import Optimizer

from finetune.config.defaults import fit_seq_len
from finetune.config.recipe import SEQ_LEN, Recipe
from finetune.data.bigram import bigram_loss
from finetune.data.corpus import Corpus, open_corpus
from finetune.models.build import build_model, check_vocabulary, config_hash, model_config
from finetune.models.optimizers import build_optimizers
from finetune.models.routers import Router, find_routers, keep_biases_in_fp32
from finetune.models.tokens import TokenCache, check_size, load_tokenizer, token_cache, train_tokenizer
from finetune.models.weights import longest_of
from finetune.parallel.launch import load_device
from finetune.parallel.ranks import first_on_node, on_main
from finetune.parallel.sharding import build_once
from finetune.storage.resuming import check_same_run
from finetune.storage.run_dir import RunFolder
from finetune.training.balancing import Balancing
from finetune.training.loss import check_head
from finetune.training.peak import estimated_peak
from finetune.training.run import Run, make_accelerator, prepare_training, versions
from finetune.training.train_step import Blocks

SAME_RUN = {
    "model_config": ("--model-config", "model"),
    "corpus": ("--dataset", "corpus"),
    "tokenizer": ("--tokenizer", "tokenizer"),
}


@dataclass(kw_only=True)
class PretrainRun(Run):
    """A pretraining run; `bigram` is the validation loss of the interpolated bigram model, nats per token."""

    cache: TokenCache
    bigram: float = float("nan")

    @property
    def reference(self) -> tuple[str, float]:
        """Name and height, in nats per token, of the line to compare losses with."""
        return "interpolated bigram", self.bigram

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Convert nats per token to bits per UTF-8 byte of text, which compare across tokenizers."""
        return nats_per_token / math.log(2) / self.cache.bytes_per_token

    def describe(self, val_loss: float) -> str:
        """Describe a validation loss in nats per token and bits per byte."""
        return f"{val_loss:.4f} nats per token, {self.bits_per_byte(val_loss):.4f} bits per byte"


def set_up(
    recipe: Recipe, folder: RunFolder, make_optimizers: Callable[..., list[Optimizer]] = build_optimizers
) -> PretrainRun:
    """Prepare data, model, optimizers and folder of a run; the main process prints what they are.

    Args:
        recipe: checked options.
        folder: where to write; the main process's is taken on all ranks.
        make_optimizers: builds them, with the arguments of `build_optimizers`.

    Raises:
        InputError: bad input, on all ranks alike; nothing was written but the cache.
    """
    accelerator, folder = make_accelerator(recipe, folder, recipe.mixed_precision)
    set_seed(recipe.seed)
    config = model_config(recipe)
    seq_len, notes = fit_seq_len(recipe.seq_len, SEQ_LEN, longest_of(config))
    recipe = replace(recipe, seq_len=seq_len)
    tokenizer, cache, facts = first_on_node(accelerator, lambda: _prepare_data(recipe, config, accelerator))
    check_same_run(folder, facts, SAME_RUN)

    def build() -> tuple[Any, tuple[list[Router], str]]:
        model = build_model(recipe, config, tokenizer, load_device(accelerator))
        if recipe.loss_chunk:
            check_head(model)
        routers, note = find_routers(model, recipe)
        if recipe.router_bias_rate:
            keep_biases_in_fp32(model, routers)
        return model, (routers, note)

    model, (routers, note), weights = build_once(accelerator, recipe, build)
    balancing = Balancing(model, routers, recipe) if routers else None
    num_parameters = sum(p.numel() for p in model.parameters())
    prepared, optimizers, schedulers = prepare_training(
        accelerator, recipe, model, weights, make_optimizers=make_optimizers
    )
    run = PretrainRun(
        accelerator=accelerator,
        recipe=recipe,
        folder=folder,
        facts=facts,
        tokenizer=tokenizer,
        model=prepared,
        optimizers=optimizers,
        schedulers=schedulers,
        train=Blocks(cache.train, recipe.seq_len, recipe.seed),
        validation=Blocks(cache.validation, recipe.seq_len),
        cache=cache,
        balancing=balancing,
    )

    def begin() -> None:
        folder.create(recipe)
        run.bigram, weight = bigram_loss(cache.train, cache.validation, len(tokenizer))
        facts.update(bigram_val_loss=run.bigram, bigram_weight=weight)
        _introduce(run, num_parameters)
        for line in filter(None, (estimated_peak(run), *notes, note)):
            run.say(line)

    on_main(accelerator, begin)
    if recipe.tracker:
        accelerator.init_trackers(recipe.name)
    return run


def _introduce(run: PretrainRun, num_parameters: int) -> None:
    accelerator, cache = run.accelerator, run.cache
    run.say(
        f"world size {accelerator.num_processes} on {accelerator.device}, {torch.get_num_threads()} threads, "
        f"mixed precision {accelerator.mixed_precision}\n"
        f"corpus {run.facts['corpus'][:12]}: {len(cache.train):,} training tokens, "
        f"{len(cache.validation):,} for validation, {cache.bytes_per_token:.2f} bytes per token\n"
        f"model {num_parameters:,} parameters, optimizer {run.recipe.optimizer}, "
        f"interpolated bigram {run.bigram:.4f} nats per token"
    )


def _prepare_data(recipe: Recipe, config: Any, accelerator: Accelerator) -> tuple[Any, TokenCache, dict[str, Any]]:
    """Prepare tokenizer and token cache, and the facts that the records of the run carry."""
    corpus = open_corpus(recipe)
    if accelerator.is_main_process:
        print(f"text: {corpus.label}, corpus {corpus.hash[:12]}; tokenizing what is not in the cache", flush=True)
    tokenizer, cache = tokens_of(corpus, recipe, config, accelerator.num_processes)
    facts = {"corpus": corpus.hash, "tokenizer": cache.meta["tokenizer"], "model_config": config_hash(config)}
    return tokenizer, cache, facts | versions(accelerator)


def tokens_of(corpus: Corpus, recipe: Recipe, config: Any, num_processes: int = 1) -> tuple[Any, TokenCache]:
    """Return the tokenizer of a recipe, and the tokens of a corpus, of one without an end as many as the run takes.

    Raises:
        InputError: a tokenizer that the model is too small for, or too little text.
    """
    name = recipe.tokenizer or recipe.init_from or str(train_tokenizer(corpus, config.vocab_size))
    tokenizer = load_tokenizer(name)
    check_vocabulary(config, tokenizer, "--tokenizer")
    sequences = recipe.max_steps * recipe.batch_size * recipe.gradient_accumulation * num_processes
    cache = token_cache(corpus, tokenizer, sequences * recipe.seq_len if corpus.endless else None)
    check_size(cache, recipe.seq_len)
    return tokenizer, cache
