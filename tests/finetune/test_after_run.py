"""After a run: its adapter is folded into the base, and what it trained answers."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from helpers.finetune_chat import make_base
from helpers.refusals import check_refused
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune import chat_with, merge
from finetune.models import merging as merging_module
from finetune.models.merging import LARGEST_CHANGE
from finetune.storage.outputs import summary

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.tensor([[5, 80, 33, 120, 7, 9, 250, 41]])


@pytest.fixture
def merging(command):
    return partial(command, merge.main)


@pytest.fixture
def chat(command):
    return partial(command, chat_with.main)


def adapter_products(adapter):
    """Name of a matrix of the base -> what a LoRA adapter adds to it, in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    saved = {name: value.double() for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    names = [name for name in saved if ".lora_A." in name]
    scale = config["lora_alpha"] / config["r"]
    return {
        name.removeprefix("base_model.model.").replace(".lora_A", ""): scale
        * saved[name.replace("lora_A", "lora_B")]
        @ saved[name]
        for name in names
    }


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def check_close(merged, expected, dtype):
    assert (merged - expected).norm() <= LARGEST_CHANGE[dtype] * expected.norm()


def test_merge_folds_an_adapter_into_its_base_and_both_answer_as_in_training(
    sft, merging, chat, tmp_path, chat_base, monkeypatch
):
    assert sft("--output-dir", "run", "--lr", 3e-2, "--max-steps", 30, "--answer-tokens", 12).code == 0
    run, moved = tmp_path / "run", shutil.copytree(chat_base, tmp_path / "moved")
    (asked,) = json.loads((run / "answers.json").read_text())
    assert asked["after"] != asked["before"]
    prompt = asked["prompt"].removeprefix("user: ")
    options = ["--prompt", prompt, "--max-tokens", 12]
    by_adapter = chat(run, *options)
    assert by_adapter.code == 0, by_adapter.err
    assert by_adapter.out.strip() == asked["after"]
    other = make_base(tmp_path / "other", seed=1)
    check_refused(merging(run, "--base", other), "--base", "other weights", str(other))
    record = (run / "adapter" / "base.json").read_text()
    (run / "adapter" / "base.json").write_text(json.dumps(json.loads(record) | {"buffers": "0" * 64}))
    check_refused(merging(run), "--base", "other weights", str(chat_base))
    (run / "adapter" / "base.json").write_text(record)
    outcome = merging(run / "adapter", "--base", moved, "--output", "model")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("merged in fp32, logits are within")
    check_refused(merging(run, "--output", "model"), "--output", "in use")
    half = merging(run, "--output", "half", "--dtype", "bf16")
    assert half.code == 0, half.err
    assert "then rounded to bf16" in half.out
    rounded = load_file(tmp_path / "half" / "model.safetensors")
    for name, value in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(rounded[name], value.bfloat16()), name
    base = AutoModelForCausalLM.from_pretrained(chat_base)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    added = adapter_products(run / "adapter")
    assert len(added) == 14
    for name, value in after.state_dict().items():
        expected = before[name].double() + added.get(name, 0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    check_close(logits(after), logits(PeftModel.from_pretrained(base, run / "adapter")), "fp32")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    assert chat("model", *options).out.strip() == asked["after"]
    # A complete run takes --merge later.
    late = sft("--resume", "run", "--merge")
    assert late.code == 0, late.err
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / weights).read_bytes()
    check_refused(sft("--resume", "run", "--merge"), "already at step 30")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(run)
    page = (ROOT / "docs" / "training" / "after-a-run.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet.replace("What does os.path.join do?", prompt), {})
    assert printed.getvalue().strip().startswith(asked["after"])
    # Turns, until an empty line; each sees those before.
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{prompt}\n{prompt}\n\nnot read\n"))
    talk = chat(run, "--max-tokens", 12)
    assert talk.code == 0, talk.err
    assert talk.out.count("> ") == 3
    assert asked["after"] in talk.out


def test_merge_of_an_nf4_base_folds_into_what_the_adapter_learned_on(sft, merging, tmp_path, chat_base, monkeypatch):
    outcome = sft("--mode", "qlora", "--output-dir", "run", "--lr", 3e-2, "--merge", "--num-answers", 0)
    assert outcome.code == 0, outcome.err
    assert "the base is dequantized from NF4 to bf16" in outcome.out
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(chat_base, quantization_config=config, dtype=torch.bfloat16)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    for name, added in adapter_products(tmp_path / "run" / "adapter").items():
        param = base.get_parameter(name)
        expected = dequantize_4bit(param.data, param.quant_state).double() + added
        assert merged.get_parameter(name).dtype == torch.bfloat16
        torch.testing.assert_close(merged.get_parameter(name).double(), expected, rtol=2**-8, atol=1e-6)
    assert merging("run", "--output", "more", "--dtype", "fp32").code == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "more", dtype="auto").dtype == torch.float32
    with monkeypatch.context() as patch:
        patch.setattr(merging_module, "LARGEST_CHANGE", {"bf16": 1e-6})
        refused = merging("run", "--output", "none")
    assert refused.code == 2
    assert "5e-02" not in refused.err
    assert refused.err.splitlines()[-1].endswith("1e-06 may be; use the adapter as it is")
    assert not (tmp_path / "none").exists()
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    check_close(logits(merged), logits(PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")), "bf16")


def test_merge_and_chat_refuse_what_is_no_adapter_and_a_base_that_is_not_recorded(
    sft, pretrain, merging, chat, tmp_path, chat_base, monkeypatch
):
    assert sft("--output-dir", "old", "--max-steps", 1, "--warmup-steps", 0, "--num-answers", 0).code == 0
    (tmp_path / "old" / "adapter" / "base.json").unlink()  # as release 0.1 left it
    moved = shutil.copytree(chat_base, tmp_path / "moved")
    check_refused(merging("old", "--base", moved), "--base", str(chat_base), "base_model_name_or_path")
    outcome = merging("old")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "old" / "model" / "config.json").is_file()
    assert pretrain("--output-dir", "all", "--max-steps", 1, "--warmup-steps", 0).code == 0
    check_refused(merging("all"), "RUN", "all weights")
    check_refused(merging(tmp_path / "nowhere"), "RUN", "there is no")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text("name: it\n")
    check_refused(chat("begun"), "RUN", "no checkpoint", "delete", f"{tmp_path / 'all'} is complete")
    (tmp_path / "begun" / "checkpoints" / "step-0000001").mkdir(parents=True)
    check_refused(chat("begun"), "RUN", "not complete", "--resume", f"{tmp_path / 'all'} is complete")
    check_refused(chat("all", "--system", "Be brief."), "--system", "chat template")
    check_refused(chat("all", "--prompt", "a b c d e " * 40), "--prompt", "the model takes 64")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b c d e " * 40 + "\n" + "abc\n"))
    talk = chat("all", "--max-tokens", 3)
    assert talk.code == 0
    assert "the model takes 64" in talk.err
    assert talk.out.count("> ") == 3
    goes_on = chat("all", "--prompt", "abc", "--max-tokens", 3, "--temperature", 1)
    assert goes_on.code == 0, goes_on.err
    assert goes_on.out.strip()


@pytest.mark.parametrize(("step", "words"), [(1, "muon8bit after 1 step, "), (2, "muon8bit after 2 steps, ")])
def test_a_run_of_one_step_is_told_in_the_singular(step, words):
    recipe = SimpleNamespace(optimizer="muon8bit")
    run = SimpleNamespace(recipe=recipe, step=step, tokens=9, unit="tokens", seconds=1.0, describe="{:.1f}".format)
    assert summary(run, 2.0).startswith(words)
