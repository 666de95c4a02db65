"""What the README shows runs, what it states is in the records, and it stays one that is read."""

import json
import math
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from muon8bit import AdaMuon8bit, Muon8bit, NorMuon8bit

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


def bytes_per_parameter(cols, make=Muon8bit, **options):
    param = torch.nn.Parameter(torch.zeros(2, cols))
    param.grad = torch.ones_like(param)
    optimizer = make([param], lr=1e-3, **options)
    optimizer.step()
    return sum(t.untyped_storage().nbytes() for t in optimizer.state[param].values()) / param.numel()


@pytest.mark.parametrize("row", re.findall(r"^\| (\d+)[^|]*\| ([\d.]+) \| ([\d.]+) \|", MEMORY, re.MULTILINE))
def test_bytes_per_parameter_are_those_of_the_table(row):
    """The table is on the page about memory."""
    cols, *stated = row
    for block_size, value in zip((2048, 256), stated, strict=True):
        assert bytes_per_parameter(int(cols), block_size=block_size) == pytest.approx(float(value), abs=5.1e-4)


def test_bytes_of_the_results():
    made = {
        "Muon8bit": {},
        "Muon8bit + 8-bit AdamW": {},
        "Muon8bit, `bits=32`": {"bits": 32},
        "NorMuon8bit": {"make": NorMuon8bit},
        "AdaMuon8bit": {"make": AdaMuon8bit},
    }
    for name, options in made.items():
        assert float(RESULTS[name][0]) == pytest.approx(bytes_per_parameter(4096, **options), abs=5.1e-4)
    others = {name: cells[0] for name, cells in RESULTS.items() if name not in made}
    assert others == {"AdamW": "8", "8-bit AdamW": "2.03", "torch Muon + AdamW": "4"}


def losses_of(name):
    """Losses of a sweep's record by arm, rate and seed."""
    losses = {}
    for run in map(json.loads, (RECORDS / name).read_text().splitlines()):
        losses.setdefault(run["arm"], {}).setdefault(run["rate"], {})[run["seed"]] = run["metrics"]["val_loss"]
    return losses


def test_losses_of_the_results():
    """Mean and standard deviation over seeds, at the rate that is best on seed 0, which has the most seeds."""
    arms = {
        "AdamW": "adamw",
        "Muon8bit, `bits=32`": "muon32",
        "Muon8bit": "muon8",
        "NorMuon8bit": "normuon8",
        "AdaMuon8bit": "adamuon8_dynamic",
    }
    losses = losses_of("family.jsonl")
    most = {name: max(losses[arm].values(), key=len) for name, arm in arms.items()}
    expected = {name: [of[seed] for seed in sorted(of)] for name, of in most.items()}
    assert [len(of) for of in expected.values()] == [3, 8, 8, 8, 8]
    expected["Muon8bit + 8-bit AdamW"] = [
        run["val_loss"] for run in record("less_memory.json") if run["arm"] == "fp32, 8-bit AdamW"
    ]
    shown = {name: cells[1] for name, cells in RESULTS.items() if cells[1]}
    assert shown == {name: f"{mean(of):.3f} ± {stdev(of):.3f}" for name, of in expected.items()}
    pairs = zip(expected["Muon8bit"], expected["Muon8bit, `bits=32`"], strict=True)
    added = [eight - thirty_two for eight, thirty_two in pairs]
    half = 2.3646 * stdev(added) / math.sqrt(8)  # Student's t of 7 degrees of freedom
    assert f"[{mean(added):.3f} nats to 32, {mean(added) - half:.3f} to {mean(added) + half:.3f}]" in README
    wider = losses_of("evidence_4m.jsonl")["adamw32_init"]
    best = min(wider.values(), key=lambda of: of[0])
    assert sorted(best) == [0, 1, 2]
    assert f"AdamW has {mean(best.values()):.3f} from [another start]" in README


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


def costs_of(name, arm):
    """Losses of an arm over those of muon32, seed by seed, at the rate that both have on all seeds."""
    losses = losses_of(name)
    return [loss - losses["muon32"][0.01][seed] for seed, loss in losses[arm][0.01].items()]


def test_bullets_have_the_numbers_of_the_records():
    bullets = re.findall(r"^- \*\*(.*?)\*\*", README, re.MULTILINE)
    costs = costs_of("parity_2m.jsonl", "muon8_linear")
    killed = record("kill_saves.json")["killed"]
    rows = record("memory_peaks.json")["rows"]
    error = max(abs(row["estimated_bytes"] / row["measured_bytes"] - 1) for row in rows)
    assert bullets[:3] == [
        f"{bytes_per_parameter(4096):.3f} bytes",
        f"{mean(costs):.3f} nats",
        f"{killed['resumed']} of {killed['kills']}",
    ]
    half = 2.200985 * stdev(costs) / math.sqrt(12)  # of Student's t, 11 degrees of freedom
    low, high = mean(costs) - half, mean(costs) + half
    assert f"from {low:.3f} to {high:.3f}, with a 2M model over [{len(costs)} seeds]" in README
    assert f"; with 8M {mean(costs_of('parity_8m_half.jsonl', 'muon8_linear')):.3f}, but none seen with" in README
    dynamic = costs_of("parity_8m_half.jsonl", "muon8_dynamic")
    assert len(dynamic) == 16
    assert mean(dynamic) <= 0
    assert error <= float(bullets[3].rstrip("%")) / 100
    assert f"{len(rows)} measured" in README


def test_status_and_claim_come_first_and_all_is_short():
    """The most important fact is that no GPU has run it: to be changed with the first record of one."""
    lines = README.splitlines()
    assert "nothing has run on a GPU yet" in "\n".join(lines[:6])
    assert "1.002 bytes" in "\n".join(lines[:20])
    assert "Muon8bit(" in "\n".join(lines[:40])
    assert len(lines) <= 160
