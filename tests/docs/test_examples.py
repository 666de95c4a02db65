"""The examples run, take the same ten steps in every loop, and are what README and docs show."""

from __future__ import annotations

import importlib
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from torch.utils.data import DataLoader

from examples import accelerate_loop, pytorch_loop, trainer
from examples.stand_in import llama, rows, tokenizer
from muon8bit import Muon8bit, param_groups

ROOT = Path(__file__).parents[2]
SHOWN_IN = ("README.md", "docs/guide/integrations.md")
IN_ORDER = {"train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": [], "disable_tqdm": True}
LIGHTNING = {
    "gradient_clip_val": 1.0,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def batches() -> DataLoader[Any]:
    return DataLoader(rows().with_format("torch"), batch_size=4)


def by_accelerate(_: Path) -> list[float]:
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision of another test's
    return accelerate_loop.train(llama(), batches(), cpu=True)


def by_trainer(folder: Path) -> list[float]:
    return trainer.train(llama(), rows(), str(folder), **IN_ORDER)


def by_trl(folder: Path) -> list[float]:
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    from examples import trl_sft

    return trl_sft.train(llama(), rows(), tokenizer(), str(folder), None, bf16=False, **IN_ORDER)


def by_lightning(folder: Path) -> list[float]:
    return lightning_module().train(llama(), batches(), folder / "last.ckpt", max_epochs=1, **LIGHTNING)


def lightning_module() -> ModuleType:
    pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")
    return importlib.import_module("examples.lightning_module")


@pytest.mark.parametrize("losses_of", [by_accelerate, by_trainer, by_trl, by_lightning])
def test_losses_agree_with_the_plain_loop(losses_of: Callable[[Path], list[float]], tmp_path: Path) -> None:
    """In fp32; they differ by the order of the sums in the loss, a few units in the last place of 4."""
    plain = pytorch_loop.train(llama(), batches())
    assert len(set(plain)) == 10
    assert losses_of(tmp_path) == pytest.approx(plain, rel=0, abs=1e-5)


def test_plain_loop_resumes_bitwise(tmp_path: Path) -> None:
    whole, parts = llama(), llama()
    losses = pytorch_loop.train(whole, batches())
    all_batches = list(batches())
    first = pytorch_loop.train(parts, all_batches[:4], tmp_path / "checkpoint.pt")
    resumed = llama()
    assert first + pytorch_loop.train(resumed, all_batches[4:], tmp_path / "checkpoint.pt") == losses
    for (name, param), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(param, other), name


def test_lightning_resumes_bitwise(tmp_path: Path) -> None:
    train, whole, parts, resumed = lightning_module().train, llama(), llama(), llama()
    losses = train(whole, batches(), tmp_path / "whole.ckpt", max_epochs=2, **LIGHTNING)
    first = train(parts, batches(), tmp_path / "parts.ckpt", max_epochs=1, **LIGHTNING)
    assert first + train(resumed, batches(), tmp_path / "parts.ckpt", max_epochs=2, **LIGHTNING) == losses
    assert len(losses) == 20
    for (name, param), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(param, other), name


def test_lightning_accumulates_as_a_larger_batch(tmp_path: Path) -> None:
    """Rows of one length have losses of equal weight, so two micro-batches are one batch of both, but for rounding."""
    train, once, twice = lightning_module().train, llama(), llama()
    large = DataLoader(rows().with_format("torch"), batch_size=8)
    train(once, large, tmp_path / "once.ckpt", max_epochs=1, **LIGHTNING)
    train(twice, batches(), tmp_path / "twice.ckpt", max_epochs=1, accumulate_grad_batches=2, **LIGHTNING)
    for (name, param), other in zip(once.named_parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=1e-4, msg=name)


def test_lightning_clips_unscaled_gradients_in_fp16(tmp_path: Path) -> None:
    """Trainer would refuse to clip for an optimizer to which GradScaler gives its scale."""
    train = lightning_module().train
    plugin = importlib.import_module("lightning.pytorch.plugins.precision").MixedPrecision
    fp16 = plugin("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    losses = train(
        llama(),
        batches(),
        tmp_path / "last.ckpt",
        max_epochs=1,
        plugins=fp16,
        **{**LIGHTNING, "gradient_clip_val": 0.1},
    )
    model, scaler, expected = llama(), torch.amp.GradScaler("cpu"), []
    optimizer = Muon8bit(param_groups(model, lr=1e-3, weight_decay=0.1))
    for batch in batches():
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1  # clipping has a part in it
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == expected


def test_trl_with_lora_and_loraplus_trains_the_adapters_alone(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    from examples import trl_sft

    model = llama()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    losses = trl_sft.train(model, rows(), tokenizer(), str(tmp_path), config, bf16=False, **IN_ORDER)
    after = {name.replace(".base_layer", ""): param for name, param in model.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    added = {name: param for name, param in after.items() if name not in before}
    assert len(added) == 28
    assert all(param.any() for param in added.values())  # B starts at zero
    assert len(set(losses)) == 10


BLOCKS = [
    (page, *block)
    for page in SHOWN_IN
    for block in re.findall(r"```python\n# (examples/\w+\.py)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
]


@pytest.mark.parametrize("page", SHOWN_IN)
def test_page_shows_every_example(page: str) -> None:
    names = ["pytorch_loop", "accelerate_loop", "trainer", "trl_sft", "lightning_module"]
    shown = {path for where, path, _ in BLOCKS if where == page}
    assert shown == {f"examples/{name}.py" for name in names}


@pytest.mark.parametrize(("page", "path", "block"), BLOCKS)
def test_block_of_a_page_is_the_code_of_the_example(page: str, path: str, block: str) -> None:
    """Each part between blank lines stands in the file, indentation of the whole aside."""
    text = (ROOT / path).read_text()
    indents = {re.match(" *", line).group() for line in text.splitlines() if line}
    for part in block.strip().split("\n\n"):
        assert any(textwrap.indent(part, indent) in text for indent in indents), f"{page}: {part}"
