"""The examples run, take the same ten steps in every loop, and are what README and docs show."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils.data import DataLoader

from examples import accelerate_loop, pytorch_loop, trainer
from examples.stand_in import llama, rows, tokenizer

ROOT = Path(__file__).parent.parent
SHOWN_IN = ("README.md", "docs/guide/integrations.md")
IN_ORDER = {"train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": [], "disable_tqdm": True}


def batches() -> DataLoader[Any]:
    return DataLoader(rows().with_format("torch"), batch_size=4)


def by_accelerate(_: Path) -> list[float]:
    return accelerate_loop.train(llama(), batches(), cpu=True)


def by_trainer(folder: Path) -> list[float]:
    return trainer.train(llama(), rows(), str(folder), **IN_ORDER)


def by_trl(folder: Path) -> list[float]:
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    from examples import trl_sft

    return trl_sft.train(llama(), rows(), tokenizer(), str(folder), None, bf16=False, **IN_ORDER)


@pytest.mark.parametrize("losses_of", [by_accelerate, by_trainer, by_trl])
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
    shown = {path for where, path, _ in BLOCKS if where == page}
    assert shown == {f"examples/{name}.py" for name in ("pytorch_loop", "accelerate_loop", "trainer", "trl_sft")}


@pytest.mark.parametrize(("page", "path", "block"), BLOCKS)
def test_block_of_a_page_is_the_code_of_the_example(page: str, path: str, block: str) -> None:
    """Each part between blank lines stands in the file, indentation of the whole aside."""
    text = (ROOT / path).read_text()
    indents = {re.match(" *", line).group() for line in text.splitlines() if line}
    for part in block.strip().split("\n\n"):
        assert any(textwrap.indent(part, indent) in text for indent in indents), f"{page}: {part}"
