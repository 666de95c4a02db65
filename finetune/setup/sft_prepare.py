"""From a checked recipe to everything that a fine-tuning run holds, before its first step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from finetune.config.errors import InputError
from finetune.config.options import FAMILY
from finetune.config.sft_recipe import SftRecipe, resolve
from finetune.data.packing import check_isolation
from finetune.models.adapters import add_adapter, checkpoint_trainable_only, linears_left_out
from finetune.models.build import check_vocabulary, config_hash
from finetune.models.pretrained import (
    base_config,
    buffer_fingerprint,
    compute_precision,
    find_base,
    fingerprint,
    lacks_embeddings,
    load_base,
    pretrained_with,
    resized_base,
    weight_dtype,
)
from finetune.models.routers import Router, find_routers
from finetune.models.tokens import load_tokenizer
from finetune.models.weights import beside_text
from finetune.parallel.launch import is_sharded, load_device
from finetune.parallel.ranks import first_on_node, gather, on_main
from finetune.parallel.sharding import build_once
from finetune.setup.sft_data import SftData, fit_to_model, prepare_data, rows_of, tokenizer_hash
from finetune.storage.resuming import check_same_run
from finetune.storage.run_dir import RunFolder
from finetune.training.balancing import Balancing
from finetune.training.loss import check_head
from finetune.training.peak import estimated_peak
from finetune.training.run import make_accelerator, prepare_training, versions
from finetune.training.sft_run import SftRun, samples_of
from finetune.training.train_step import evaluate

# `buffers` is recorded of a model that has some, and by no run of release 0.1.
SAME_RUN = {
    "model": ("--model", "model"),
    "buffers": ("--model", "model"),
    "corpus": ("--dataset", "dataset"),
    "tokenizer": ("--model", "tokenizer"),
}


def set_up(recipe: SftRecipe, folder: RunFolder) -> SftRun:
    """Prepare data, model, optimizers and folder of a run; the main process prints what they are and what was chosen.

    Args:
        recipe: checked options.
        folder: where to write; the main process's is taken on all ranks.

    Raises:
        InputError: bad input, on all ranks alike; nothing was written but the cache.
    """
    accelerator, folder = make_accelerator(recipe, folder, compute_precision(recipe))
    if is_sharded(accelerator) and recipe.has_adapter:
        raise InputError(
            "--mode", f"{recipe.mode} under FSDP is not supported; launch with ddp.yaml, or give --mode full"
        )
    set_seed(recipe.seed)
    given = first_on_node(accelerator, lambda: find_base(recipe.model))
    config = base_config(given)
    tokenizer = load_tokenizer(given, "--model")
    base = given
    if recipe.resize_embeddings and lacks_embeddings(config, tokenizer):
        base = _resized(accelerator, given, tokenizer)
        config = base_config(base)
    check_vocabulary(config, tokenizer, "--model")
    recipe, seq_notes = fit_to_model(recipe, config)
    data = prepare_data(recipe, tokenizer)
    train, validation = rows_of(recipe, data.train, tokenizer), rows_of(recipe, data.validation, tokenizer)
    recipe, notes = resolve(recipe, len(train), accelerator.num_processes)
    notes = seq_notes + notes

    def build() -> tuple[Any, tuple[str, str | None, list[Router], str]]:
        model = load_base(base, recipe, load_device(accelerator))
        if recipe.packing:
            check_isolation(model, num_rows=recipe.batch_size)
        if recipe.loss_chunk:
            check_head(model)
        return model, (fingerprint(model), buffer_fingerprint(model), *find_routers(model, recipe))

    model, (digest, buffers, routers, note), weights = build_once(accelerator, recipe, build)
    balancing = Balancing(model, routers, recipe) if routers else None
    notes += filter(None, [note])
    facts = {
        "model": hashlib.sha256((config_hash(config) + digest).encode()).hexdigest(),
        "corpus": data.parts.hash,
        "tokenizer": tokenizer_hash(tokenizer),
        **({"buffers": buffers} if buffers else {}),
        **versions(accelerator),
    }
    check_same_run(folder, facts, SAME_RUN)
    if recipe.skip_bad_rows:
        facts["num_bad_rows"] = data.num_bad_rows
    notes += _warnings(recipe, given, base, config)
    if aside := beside_text(model):
        notes.append(
            f"note: the text part alone is trained; {', '.join(aside)} are saved as they were. The files of an image "
            "processor are the base's: copy them where images are to be taken"
        )
    num_answers = recipe.num_answers
    if is_sharded(accelerator) and num_answers:
        notes.append("note: no answers are generated, since the model is sharded")
        num_answers = 0
    if recipe.has_adapter:
        model = add_adapter(model, recipe, base)
        notes += _left_out(linears_left_out(model, recipe))
        checkpoint_trainable_only(accelerator)
    ratio = None if recipe.loraplus_ratio == 1 else recipe.loraplus_ratio
    prepared, optimizers, schedulers = prepare_training(accelerator, recipe, model, weights, ratio)
    run = SftRun(
        accelerator=accelerator,
        recipe=recipe,
        folder=folder,
        facts=facts,
        tokenizer=tokenizer,
        model=prepared,
        optimizers=optimizers,
        schedulers=schedulers,
        train=train,
        validation=validation,
        base=base,
        samples=samples_of(data.parts.validation[:num_answers], data.encoding),
        balancing=balancing,
    )
    on_main(accelerator, lambda: folder.create(recipe))
    _introduce(run, data, notes)
    if recipe.tracker:
        accelerator.init_trackers(recipe.name)
    _look_before(run)
    return run


def _resized(accelerator: Accelerator, given: str, tokenizer: Any) -> str:
    """Run `resized_base` on one process of every node, since it loads the weights."""
    is_first = accelerator.is_local_main_process
    own = first_on_node(accelerator, lambda: resized_base(given, tokenizer) if is_first else "")
    return next(filter(None, [own, *gather(accelerator, own)]))


def _warnings(recipe: SftRecipe, given: str, base: str, config: Any) -> list[str]:
    """Return warnings about this combination of base, mode and optimizer that a practitioner should know."""
    notes = []
    was = pretrained_with(given, config)
    if recipe.mode == "full" and "muon" in recipe.optimizer and was is not None and was.startswith("adam"):
        notes.append(
            "note: most bases were pretrained with Adam; tuning all weights of such a model, Muon usually trails AdamW "
            "(arXiv 2605.10468, 2502.16982): keep a run with --optimizer adamw beside it"
        )
    if recipe.mode == "full" and weight_dtype(recipe) == torch.bfloat16:
        is_stochastic = recipe.optimizer in FAMILY and recipe.param_rounding != "nearest"
        how = "stochastically" if is_stochastic else "to nearest, which loses small updates"
        notes.append(f"note: bf16 weights are trained; {recipe.optimizer} rounds them {how}")
    if base != given and recipe.has_adapter:
        notes.append(
            "note: the embeddings that --resize-embeddings added are the mean of the others, and an adapter does not "
            "train them; give --mode full where the data uses their tokens"
        )
    if recipe.resize_embeddings and base == given:
        notes.append("note: --resize-embeddings adds nothing, since every token has an embedding")
    if recipe.mode == "qlora" and recipe.merge:
        notes.append("note: --merge folds the adapter into the NF4 weights that it learns on, dequantized")
    return notes


def _left_out(names: Sequence[str]) -> list[str]:
    """Return what is told of the linear layers that were to have an adapter and have none."""
    if not names:
        return []
    return [
        f"note: {len(names)} linear layers have no adapter and stay as they are, such as {names[0]}: in this model's "
        "class peft takes their names for those of stacked experts; give --mode full to train them"
    ]


def _introduce(run: SftRun, data: SftData, notes: Sequence[str]) -> None:
    accelerator, recipe = run.accelerator, run.recipe
    params = list(run.model.parameters())
    trained = sum(p.numel() for p in params if p.requires_grad)
    adapter = "" if not recipe.has_adapter else ", DoRA" if recipe.dora else ", LoRA"
    run.say(
        f"world size {accelerator.num_processes} on {accelerator.device}, {torch.get_num_threads()} threads, "
        f"mixed precision {accelerator.mixed_precision}, base in {str(weight_dtype(recipe)).removeprefix('torch.')}"
        f"{' and NF4' if recipe.mode == 'qlora' else ''}\n"
        f"data: {data.parts.label}, {data.parts.hash[:12]}\n"
        f"  training: {data.train}; {len(run.train):,} rows\n"
        f"  validation: {data.validation}; {len(run.validation):,} rows\n"
        f"model {run.base}: {trained:,} parameters are trained{adapter}, optimizer {recipe.optimizer}"
    )
    if accelerator.is_main_process:
        run.say(estimated_peak(run))
    for note in (*data.notes, *notes):
        run.say(note)


def _look_before(run: SftRun) -> None:
    """Evaluate the base: validation loss and answers. A resumed run keeps those of its start."""
    if run.folder.checkpoint:
        run.facts["val_loss_before"] = run.folder.progress()["facts"]["val_loss_before"]
        return
    recipe = run.recipe
    answers = f"; then answers to {len(run.samples)} prompts" if run.samples else ""
    run.say(f"validating the base model: {len(run.validation):,} rows{answers}")
    val_loss = evaluate(run.accelerator, run.model, run.validation, recipe.batch_size, recipe.loss_chunk)
    run.facts["val_loss_before"] = val_loss
    run.say(f"before: validation {run.val_loss_before:.4f} nats per target")
    on_main(run.accelerator, lambda: run.write_answers("before"))
