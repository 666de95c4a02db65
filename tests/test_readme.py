"""What the README shows runs, and what it states about bytes is what the state takes."""

import re
from pathlib import Path

import pytest
import torch

from muon8bit import Muon8bit

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_first_example_runs_and_steps(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    before = model[0].weight.detach().clone()
    exec(code, {"model": model, "loss": model(torch.ones(2, 16)).square().sum()})
    assert not torch.equal(model[0].weight, before)
    printed = capsys.readouterr().out
    assert "hidden matrix" in printed
    assert "adamw_8bit" in printed


@pytest.mark.parametrize("row", re.findall(r"^\| (\d+)[^|]*\| ([\d.]+) \| ([\d.]+) \|", README, re.MULTILINE))
def test_bytes_per_parameter_are_those_of_the_table(row):
    cols, *stated = row
    for block_size, value in zip((2048, 256), stated, strict=True):
        param = torch.nn.Parameter(torch.zeros(2, int(cols)))
        param.grad = torch.ones_like(param)
        optimizer = Muon8bit([param], block_size=block_size)
        optimizer.step()
        measured = sum(t.untyped_storage().nbytes() for t in optimizer.state[param].values()) / param.numel()
        assert measured == pytest.approx(float(value), abs=5.1e-4)


def test_files_named_in_the_map_exist():
    block = README[README.index("muon8bit/optimizer.py  ") :].split("```")[0]
    names = re.findall(r"((?:muon8bit|kernels|finetune|tests)/[\w/.]*)", block)
    assert len(names) > 12
    assert all((ROOT / name).exists() for name in names), names


def test_headline_comes_first():
    """Claim, number and code within the first 20 lines."""
    head = "\n".join(README.splitlines()[:20])
    assert "1.002 bytes" in head
    assert "Muon8bit(" in head
