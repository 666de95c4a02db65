"""Outputs of a finished fine-tuning run: the model or the adapter, the answers, the losses before and after."""

from __future__ import annotations

import json

from finetune.models.adapters import save_adapter
from finetune.models.build import parameter_hash
from finetune.models.merging import find_adapter, merge_adapter
from finetune.parallel.launch import plain_model, whole_state
from finetune.parallel.ranks import gather
from finetune.storage.outputs import save_model, summary, write_results
from finetune.training.sft_run import SftRun


def finish(run: SftRun) -> None:
    """Save model/ or adapter/ (and with --merge model/), answers.json, state_report.json, loss.png and result.json."""
    accelerator, recipe, path = run.accelerator, run.recipe, run.folder.path
    state = None if recipe.has_adapter else whole_state(accelerator, run.model)
    hashes = gather(accelerator, parameter_hash(run.model))
    if not accelerator.is_main_process:
        return
    model = plain_model(run.model)
    if recipe.has_adapter:
        save_adapter(model, path / "adapter", recipe, run.tokenizer)
    else:
        save_model(path / "model", model, state, run.tokenizer)
    if recipe.merge:
        merge_adapter(find_adapter(path / "adapter"), path / "model", None, run.say)
    run.write_answers("after")
    _show_answers(run)
    write_results(run, {"parameter_hashes": hashes, "mode": recipe.mode})
    run.say(summary(run, run.folder.metrics()[-1]["val_loss"]))


def _show_answers(run: SftRun) -> None:
    if not run.samples:
        return
    for record in json.loads(run.answers_file.read_text()):
        run.say("")
        for key in ("prompt", "reference", "before", "after"):
            text = " ".join(str(record.get(key, "")).split())
            run.say(f"{key + ':':10} {text[:200]}{' ...' if len(text) > 200 else ''}")
