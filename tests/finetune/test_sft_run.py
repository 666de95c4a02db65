"""Whole fine-tuning runs: what they leave behind, who can load it, and that a stopped run continues to the bit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.data.chat import load_parts
from muon8bit import Muon8bit, param_groups

ROOT = Path(__file__).resolve().parents[2]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def weights(folder):
    file = folder / "adapter" / "adapter_model.safetensors"
    return load_file(file if file.is_file() else folder / "model" / "model.safetensors")


@torch.no_grad()
def held_out_loss(model, tokenizer, chats):
    """Nats per token of the held-out answers with their end of turn, one at a time, from the text alone."""
    nats, count = 0.0, 0
    for example in load_parts(str(chats), validation_fraction=0.2).validation:
        text = tokenizer.apply_chat_template(list(example.messages[:1]), tokenize=False, add_generation_prompt=True)
        asked = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text + example.messages[1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        assert whole[: len(asked)] == asked
        logits = model(input_ids=torch.tensor([whole])).logits[0, len(asked) - 1 : -1]
        nats += float(cross_entropy(logits, torch.tensor(whole[len(asked) :]), reduction="sum"))
        count += len(whole) - len(asked)
    return nats / count


def test_an_adapter_loads_in_plain_peft_and_gives_the_recorded_loss(sft, tmp_path, chat_base, chats):
    outcome = sft("--output-dir", "run", "--merge", "--dora")
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run"
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    base = AutoModelForCausalLM.from_pretrained(chat_base)
    before = held_out_loss(base, tokenizer, chats)
    adapted = held_out_loss(PeftModel.from_pretrained(base, run / "adapter"), tokenizer, chats)
    merged = held_out_loss(AutoModelForCausalLM.from_pretrained(run / "model"), tokenizer, chats)
    assert before == pytest.approx(result(run)["val_loss_before"], rel=1e-5)
    assert adapted == pytest.approx(result(run)["val_loss"], rel=1e-5)
    assert merged == pytest.approx(adapted, rel=1e-5)
    assert adapted < before - 0.01
    assert metrics(run)[-1]["val_loss"] == result(run)["val_loss"]


def test_a_full_run_leaves_everything_it_promises(sft, tmp_path, chats):
    outcome = sft("--mode", "full", "--tracker", "tensorboard", "--num-answers", 2)
    assert outcome.code == 0, outcome.err
    folder = (tmp_path / "runs" / "latest").resolve()
    assert folder.name.startswith("base-full-")
    lines = outcome.out.strip().splitlines()
    assert lines[0] == lines[-1] == f"run folder: {folder}"
    records = metrics(folder)
    assert [m["step"] for m in records] == list(range(1, 7))
    for record in records:
        assert {"step", "loss", "lr", "val_loss", "tokens", "seconds", "grad_norm"} == set(record)
        assert (record["val_loss"] is None) == (record["step"] % 3 != 0)
    answers = json.loads((folder / "answers.json").read_text())
    assert [set(a) for a in answers] == [{"prompt", "reference", "before", "after"}] * 2
    held_out = load_parts(str(chats), validation_fraction=0.2).validation
    assert [a["reference"] for a in answers] == [e.messages[1]["content"] for e in held_out[:2]]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any(folder.rglob("events.out.tfevents*"))
    report = json.loads((folder / "state_report.json").read_text())
    assert str(report["total_bytes"]) in outcome.out.replace(",", "")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    loss = held_out_loss(AutoModelForCausalLM.from_pretrained(folder / "model"), tokenizer, chats)
    assert loss == pytest.approx(result(folder)["val_loss"], rel=1e-5)
    assert loss < result(folder)["val_loss_before"] - 0.1


@pytest.mark.parametrize(
    ("rounding", "how"), [("stochastic", "stochastically"), ("nearest", "to nearest, which loses small updates")]
)
def test_the_log_tells_how_bf16_weights_are_rounded(sft, rounding, how):
    options = ("--mode", "full", "--dtype", "bf16", "--param-rounding", rounding, "--num-answers", 0)
    outcome = sft(*options, "--max-steps", 1, "--warmup-steps", 0)
    assert outcome.code == 0, outcome.err
    assert f"note: bf16 weights are trained; muon8bit rounds them {how}\n" in outcome.out


# All that makes memory less, together.
SMALLEST = ["--release-gradients", "--clip", "0", "--loss-chunk", "24", "--adamw-bits", "8", "--state-device", "cpu"]
SMALLEST += ["--packing", "--activation-checkpointing"]


@pytest.mark.parametrize(
    "options",
    [
        ["--mode", "full"],
        ["--mode", "full", "--dtype", "bf16"],
        ["--mode", "full", "--dtype", "bf16", *SMALLEST],
        ["--lora-dropout", "0.2", "--codebook", "dynamic", "--release-gradients", "--clip", "0"],
        ["--optimizer", "muon", "--dora", "--packing", "--activation-checkpointing"],
        ["--mode", "qlora", "--optimizer", "adamw", "--loraplus-ratio", "4", "--loss-chunk", "24", "--packing"],
    ],
    ids=" ".join,
)
def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(sft, tmp_path, options):
    for name in ("whole", "crashed"):
        outcome = sft(*options, "--output-dir", name, "--num-answers", 0)
        assert outcome.code == 0, outcome.err
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    last = crashed / "checkpoints" / "step-0000006"
    last.rename(crashed / "lost")
    resumed = sft("--resume", "crashed")
    assert resumed.code == 0, resumed.err
    assert "at step 3" in resumed.out
    for one, other in zip(metrics(whole), metrics(crashed), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    expected = weights(whole)
    for name, value in weights(crashed).items():
        assert torch.equal(value, expected[name]), name
    kept = result(whole)
    assert kept["parameter_hashes"] == result(crashed)["parameter_hashes"]
    assert kept["val_loss_before"] == result(crashed)["val_loss_before"]


def test_a_checkpoint_of_an_adapter_holds_no_base(sft, tmp_path):
    assert sft("--output-dir", "run", "--max-steps", 3).code == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000003"
    saved = load_file(checkpoint / "trainable.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)
    assert not list(checkpoint.glob("model*"))


def test_what_a_compiled_run_leaves_of_its_adapter_has_the_names_of_the_model_inside(sft, tmp_path, compiling):
    assert sft("--output-dir", "plain", "--max-steps", 3).code == 0
    compiling(False)
    outcome = sft("--output-dir", "compiled", "--max-steps", 3)
    assert outcome.code == 0, outcome.err
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-0000003/trainable.safetensors", "answers.json"):
        assert (tmp_path / "compiled" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    assert result(tmp_path / "compiled")["parameter_hashes"] == result(tmp_path / "plain")["parameter_hashes"]


def test_an_adapter_is_trained_further(sft, tmp_path):
    assert sft("--output-dir", "first").code == 0
    outcome = sft("--adapter", tmp_path / "first" / "adapter", "--output-dir", "second")
    assert outcome.code == 0, outcome.err
    first, second = result(tmp_path / "first"), result(tmp_path / "second")
    assert second["val_loss_before"] == pytest.approx(first["val_loss"], rel=1e-6)
    assert second["val_loss"] < first["val_loss"]


def test_qlora_lowers_the_loss_in_20_steps_and_leaves_the_nf4_weights_to_the_bit(sft, tmp_path, monkeypatch):
    import finetune.training.trainer as job

    seen = []

    def watch(run):
        model = run.accelerator.unwrap_model(run.model)
        frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        seen.append({n: (p.dtype, p.detach().cpu().clone()) for n, p in frozen.items()})
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
        seen.append({n: layer.weight.quant_state.absmax.clone() for n, layer in layers.items()})

    train = job._train

    def watched(run):
        watch(run)
        code = train(run)
        watch(run)
        return code

    monkeypatch.setattr(job, "_train", watched)
    outcome = sft("--mode", "qlora", "--max-steps", 20, "--eval-every", 5, "--output-dir", "run", "--lr", 1e-2)
    assert outcome.code == 0, outcome.err
    before, scales_before, after, scales_after = seen
    assert before.keys() == after.keys()
    for name, (dtype, value) in before.items():
        expected = torch.uint8 if "proj" in name else torch.float32 if "norm" in name else torch.bfloat16
        assert dtype == expected, name
        assert torch.equal(value, after[name][1]), name
    assert len(scales_before) == 14
    assert all(torch.equal(value, scales_after[name]) for name, value in scales_before.items())
    losses = [m["val_loss"] for m in metrics(tmp_path / "run") if m["val_loss"] is not None]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < result(tmp_path / "run")["val_loss_before"] - 0.1


def test_the_loss_does_not_depend_on_how_a_step_is_cut_up(sft, tmp_path, sft_options):
    """8 rows as one micro-batch, as 4 micro-batches of 2, and on 2 ranks by torchrun."""
    cuts = {"whole": (8, 1), "cut": (2, 4)}
    for name, (size, num) in cuts.items():
        outcome = sft("--batch-size", size, "--gradient-accumulation", num, "--output-dir", name)
        assert outcome.code == 0, outcome.err
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "CUDA_VISIBLE_DEVICES": ""}
    options = [str(x) for pair in {**sft_options, "--batch-size": 4, "--output-dir": "ranks"}.items() for x in pair]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "finetune" / "sft.py"), *options],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    ranks = result(tmp_path / "ranks")
    assert ranks["world_size"] == 2
    assert len(ranks["parameter_hashes"]) == 2
    assert len(set(ranks["parameter_hashes"])) == 1
    whole = metrics(tmp_path / "whole")
    for name in ("cut", "ranks"):
        other = metrics(tmp_path / name)
        assert [m["tokens"] for m in other] == [m["tokens"] for m in whole]
        # fp32 sums in another order; a mean of means is off by per cent where the numbers of targets differ.
        assert other[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
        assert other[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)
        assert [m["loss"] for m in other] == pytest.approx([m["loss"] for m in whole], rel=1e-3)
        before = result(tmp_path / name)["val_loss_before"]
        assert before == pytest.approx(result(tmp_path / "whole")["val_loss_before"], rel=1e-5)
        assert other[-1]["val_loss"] == pytest.approx(whole[-1]["val_loss"], rel=1e-3)


def test_steps_follow_from_epochs_and_the_log_says_what_was_chosen(sft, sft_options, tmp_path):
    for option in ("--lr", "--max-steps", "--warmup-steps"):
        del sft_options[option]
    outcome = sft("--mode", "full", "--epochs", 0.5, "--output-dir", "run")
    assert outcome.code == 0, outcome.err
    for words in (
        "lr 2e-05, the default of full with muon8bit: arXiv 2605.10468",
        "6 steps of 4 rows",
        "warm-up 0 steps, 3% of 6",
    ):
        assert words in outcome.out
    assert "note: most bases were pretrained with Adam" in outcome.out  # this one has random weights
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(1, 7))
    assert metrics(tmp_path / "run")[0]["lr"] == 2e-5  # the first step learns
    lines = outcome.out.splitlines()
    before = next(i for i, line in enumerate(lines) if line.startswith("before: validation"))
    num_rows = re.search(r"validation: .*; (\d+) rows", outcome.out)[1]
    assert lines[before - 1] == f"validating the base model: {num_rows} rows; then answers to 1 prompts"


def test_ten_steps_are_those_of_a_plain_loop_with_the_models_own_loss(sft, tmp_path, chat_base, chats):
    """Muon8bit on the model, with padding, an attention mask, labels, and torch's clipping: 1e-5 in fp32."""
    options = ["--mode", "full", "--max-steps", 10, "--schedule", "constant_with_warmup", "--eval-every", 10]
    outcome = sft(*options, "--output-dir", "run", "--num-answers", 0)
    assert outcome.code == 0, outcome.err
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    examples = load_parts(str(chats), validation_fraction=0.2).train
    order = [i for epoch in range(2) for i in np.random.default_rng((0, epoch)).permutation(len(examples))]
    model = AutoModelForCausalLM.from_pretrained(chat_base)
    optimizer = Muon8bit(param_groups(model, lr=3e-3, weight_decay=0.0))
    for step, record in enumerate(metrics(tmp_path / "run")):
        texts, labels = [], []
        for i in order[4 * step : 4 * step + 4]:
            turns = list(examples[i].messages)
            asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
            texts.append(asked + turns[1]["content"] + "<|im_end|>\n")
            labels.append(len(tokenizer(asked, add_special_tokens=False)["input_ids"]))
        batch = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
        batch["labels"] = batch["input_ids"].clone()
        for row, (asked, mask) in enumerate(zip(labels, batch["attention_mask"], strict=True)):
            batch["labels"][row, :asked] = -100
            batch["labels"][row, int(mask.sum()) - 1 :] = -100  # the line end behind the answer, and padding
        loss = model(**batch).loss
        assert record["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if step == 0 else 3e-3
        optimizer.step()
        optimizer.zero_grad()
