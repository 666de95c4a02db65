"""What the README shows runs, what it states is in the records, and it stays one that is read."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from muon8bit import Muon8bit

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MEMORY = (ROOT / "docs" / "guide" / "memory.md").read_text()
RECORDS = ROOT / "docs" / "records"
# The table of results: name -> bytes a parameter, loss, time of a step, peak.
RESULTS = {
    name.strip(): [cell.strip() for cell in cells.split("|")]
    for name, cells in re.findall(
        r"^\| ([^|-][^|]*) \| (.*) \|$", README.split("## Results")[1].split("\n\n")[1], re.MULTILINE
    )
}


def record(name):
    return json.loads((RECORDS / name).read_text())


def test_first_example_runs_and_steps(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len(code.splitlines()) < 10
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    before = model[0].weight.detach().clone()
    exec(code, {"model": model, "loss": model(torch.ones(2, 16)).square().sum()})
    assert not torch.equal(model[0].weight, before)
    printed = capsys.readouterr().out
    assert "hidden matrix" in printed
    assert "adamw_8bit" in printed


def bytes_per_parameter(cols, block_size):
    param = torch.nn.Parameter(torch.zeros(2, cols))
    param.grad = torch.ones_like(param)
    optimizer = Muon8bit([param], block_size=block_size)
    optimizer.step()
    return sum(t.untyped_storage().nbytes() for t in optimizer.state[param].values()) / param.numel()


@pytest.mark.parametrize("row", re.findall(r"^\| (\d+)[^|]*\| ([\d.]+) \| ([\d.]+) \|", MEMORY, re.MULTILINE))
def test_bytes_per_parameter_are_those_of_the_table(row):
    """The table is on the page about memory."""
    cols, *stated = row
    for block_size, value in zip((2048, 256), stated, strict=True):
        assert bytes_per_parameter(int(cols), block_size) == pytest.approx(float(value), abs=5.1e-4)


def test_bytes_of_the_results():
    for name in ("Muon8bit", "Muon8bit + 8-bit AdamW"):
        assert float(RESULTS[name][0]) == pytest.approx(bytes_per_parameter(4096, 2048), abs=5.1e-4)
    assert [RESULTS[name][0] for name in ("AdamW", "8-bit AdamW", "torch Muon + AdamW")] == ["8", "2.03", "4"]


def test_losses_of_the_results():
    runs = record("pretrain_llama_4m.json")["runs"]
    expected = {
        "AdamW": min(run["val_loss"] for run in runs if run["optimizer"] == "adamw"),
        "torch Muon + AdamW": next(run["val_loss"] for run in runs if run["optimizer"] == "muon"),
        "Muon8bit": next(run["val_loss"] for run in runs if run.get("codebook") == "linear"),
        "Muon8bit + 8-bit AdamW": next(
            run["val_loss"]
            for run in record("less_memory.json")
            if (run["arm"], run["seed"]) == ("fp32, 8-bit AdamW", 0)
        ),
        "8-bit AdamW": None,
    }
    shown = {name: cells[1] for name, cells in RESULTS.items() if name in expected}
    assert shown == {name: "" if loss is None else f"{loss:.3f}" for name, loss in expected.items()}


def test_step_times_of_the_results():
    ratios = [record(f"cpu_step_time_{name}.json")["geometric_mean"]["linear"] for name in ("bf16", "no_bf16")]
    shown = {name: cells[2] for name, cells in RESULTS.items() if cells[2]}
    assert shown == {
        "torch Muon + AdamW": "1",
        "Muon8bit": ", without CPU bf16 ".join(f"{1 / ratio:.2f}" for ratio in ratios),
    }


def test_peaks_of_the_results():
    names = {
        "adamw": "AdamW",
        "adamw8bit": "8-bit AdamW",
        "muon": "torch Muon + AdamW",
        "muon8bit": "Muon8bit",
        "muon8bit+adamw8bit": "Muon8bit + 8-bit AdamW",
    }
    for row in record("memory_peaks.json")["rows"]:
        if row["optimizer"] in names and (row["batch"], row["checkpointing"], row["release"]) == (1, False, False):
            assert RESULTS[names[row["optimizer"]]][3] == f"{row['measured_bytes'] / 2**20:.1f}"


def test_bullets_have_the_numbers_of_the_records():
    bullets = re.findall(r"^- \*\*(.*?)\*\*", README, re.MULTILINE)
    by_run = {}
    for run in record("finetune_smollm2_135m.json").values():
        if run["arm"] != "adamw":
            by_run.setdefault((run["mode"], run["lr"], run["seed"], run["steps"]), []).append(run["val_loss"])
    largest = max(max(losses) - min(losses) for losses in by_run.values())
    killed = record("kill_saves.json")["killed"]
    rows = record("memory_peaks.json")["rows"]
    error = max(abs(row["estimated_bytes"] / row["measured_bytes"] - 1) for row in rows)
    assert bullets[:3] == [
        f"{bytes_per_parameter(4096, 2048):.3f} bytes",
        f"{math.ceil(largest * 1e4) / 1e4:.4f} nats",
        f"{killed['resumed']} of {killed['kills']}",
    ]
    assert error <= float(bullets[3].rstrip("%")) / 100
    assert f"{len(rows)} measured" in README


def test_status_and_claim_come_first_and_all_is_short():
    """The most important fact is that no GPU has run it: to be changed with the first record of one."""
    lines = README.splitlines()
    assert "nothing has run on a GPU yet" in "\n".join(lines[:6])
    assert "1.002 bytes" in "\n".join(lines[:20])
    assert "Muon8bit(" in "\n".join(lines[:40])
    assert len(lines) <= 160
