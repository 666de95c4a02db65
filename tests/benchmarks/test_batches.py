"""The batch study: tokens to a loss of known curves, ratios by hand, and the whole command on planted records."""

import itertools
import json
import math

import pytest

from benchmarks.training.batches import BatchArm, main, read_arms
from benchmarks.training.tokens_to_loss import common_levels, find_crossing, lowest_loss, ratio_of
from finetune.sweep.reading import read_sweep
from finetune.sweep.records import FIELDS

BETA = 0.95
SWEEP = """
recipe = "llama_4m"
seeds = [0, 1, 2]
rates_on_seed = 0
curve_every = 1
[common]
width = 64
seq_len = 128
[arms.adamw_8]
optimizer = "adamw"
batch_size = 8
rates = [1e-3, 2e-3, 4e-3]
[arms.muon32_8]
optimizer = "muon8bit"
bits = 32
batch_size = 8
rates = [1e-3, 2e-3, 4e-3]
[arms.muon8_8]
optimizer = "muon8bit"
batch_size = 8
rates = "muon32_8"
[arms.adamw_16]
optimizer = "adamw"
batch_size = 16
rates = [1e-3, 2e-3, 4e-3]
"""


def decaying(floor, height, ratio, steps):
    """A record of losses floor + height * ratio ** step, in batches of 100 tokens, 2 s a step but for one of 1000 s."""
    losses = [[step, floor + height * ratio**step] for step in range(1, steps + 1)]
    metrics = {
        "training_curve": losses,
        "step_seconds": [[step, 2.0 * step + 998 * (step > 2)] for step, _ in losses],
        "steps": steps,
    }
    metrics |= {"tokens": 100 * steps, "val_loss": floor}
    return {"sweep": "it", "status": "finished", "metrics": metrics}


def averaged(floor, height, ratio, step):
    """The same curve's average by the sum of a geometric series."""
    total = ratio * (ratio**step - BETA**step) / (ratio - BETA)
    return floor + height * total * (1 - BETA) / (1 - BETA**step)


def crossing_step(floor, height, ratio, level):
    last = next(step for step in itertools.count(1) if averaged(floor, height, ratio, step) <= level)
    above, below = (averaged(floor, height, ratio, step) for step in (last - 1, last))
    return last - 1 + (above - level) / (above - below)


def test_tokens_to_a_loss_are_those_of_the_closed_form():
    curve = 2.0, 5.0, 0.99
    record = decaying(*curve, steps=500)
    for level in (6.0, 4.0, 2.5):
        found = find_crossing(record, level)
        assert found.step == pytest.approx(crossing_step(*curve, level), rel=1e-9)
        assert found.tokens == pytest.approx(100 * found.step)
        assert found.seconds == pytest.approx(2 * found.step)
    assert find_crossing(record, 2.0) is None
    assert find_crossing(record, 9.0).step == 1
    assert lowest_loss(record) == pytest.approx(averaged(*curve, 500))
    assert common_levels([record, decaying(2.41, 5.0, 0.9, 500)], 3, 0.2) == [2.85, 2.65, 2.45]
    diverged = decaying(*curve, steps=5)
    diverged["metrics"]["training_curve"][2][1] = None
    assert find_crossing(diverged, 6.93).step < 3
    assert find_crossing(diverged, 6.0) is None


def test_a_ratio_is_resolved_by_the_interval_of_its_seeds():
    exact = ratio_of({0: 200.0, 1: 220.0, 2: 210.0}, {1: 110.0, 0: 100.0, 3: 1.0})
    assert (exact.value, exact.seeds, exact.is_resolved) == (pytest.approx(2), 2, True)
    assert exact.ends == pytest.approx((2, 2))
    # Logs of 1, e ** .02, e ** .04: mean .02, SD .02, half-width 4.3027 * .02 / sqrt(3).
    spread = ratio_of({0: 1.0, 1: math.exp(0.02), 2: math.exp(0.04)}, {0: 1.0, 1: 1.0, 2: 1.0})
    half = 4.30265 * 0.02 / math.sqrt(3)
    assert spread.ends == pytest.approx((math.exp(0.02 - half), math.exp(0.02 + half)), rel=1e-5)
    assert spread.is_resolved  # half-width .0497 of the ratio
    wide = ratio_of({0: 1.0, 1: math.exp(0.022), 2: math.exp(0.044)}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert not wide.is_resolved
    assert ratio_of({0: 1.0}, {1: 1.0}) is None
    assert not ratio_of({0: 1.0}, {0: 1.0}).is_resolved  # one seed has no interval


def test_the_command_finds_planted_ratios_in_records_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.toml").write_text(SWEEP)
    sweep = read_sweep("it.toml")
    ratios = {"adamw_8": 0.995, "muon32_8": 0.99, "muon8_8": 0.99, "adamw_16": 0.995}
    rows = []
    for arm in sweep.arms.values():
        for seed in arm.seeds:
            for rate in (1e-3, 2e-3, 4e-3) if seed == 0 else (2e-3,):
                record = decaying(2.0 + seed / 100, 5.0, ratios[arm.name], 800)
                record["metrics"]["val_loss"] = 3.0 + (rate != 2e-3)
                run = {"arm": arm.name, "rate": rate, "seed": seed, "recipe_hash": arm.recipe_hash}
                rows.append(json.dumps({**dict.fromkeys(FIELDS), **record, **run}))
    (tmp_path / "runs" / "sweep-it").mkdir(parents=True)
    (tmp_path / "runs" / "sweep-it" / "records.jsonl").write_text("\n".join(rows) + "\n")
    assert main(["it.toml", "--losses", "3.0,4.0", "--picture", "it.png"]) == 0
    printed = capsys.readouterr().out
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    steps = [[crossing_step(2.0 + s / 100, 5.0, r, 3.0) for r in (0.995, 0.99)] for s in range(3)]
    ratio = math.exp(sum(math.log(slow / fast) for slow, fast in steps) / 3)
    (found,) = (row for row in table if row[:5] == ["adamw", "muon8bit 32", "3.00", "1,024", f"{ratio:.3f}"])
    assert found[-2:] == ["3", ""]  # and not "not resolved"
    assert any(row[:5] == ["muon8bit 32", "muon8bit 8", "4.00", "1,024", "1.000"] for row in table)
    assert any(row[:4] == ["adamw", "muon8bit 32", "3.00", "2,048"] and row[-1] == "no result" for row in table)
    tokens = 100 * sum(slow for slow, _ in steps) / 3
    # Of the 3 layers: q, k, v, o 64 x 64; gate, up, down 64 x 176; 7 norms; the tied embedding is the head.
    params = 1024 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 176) + 7 * 64
    (cost,) = (row for row in table if row[:3] == ["adamw", "1,024", "3.00"])
    assert cost[3:7] == [f"{tokens:,.0f}", f"{tokens / 100:.1f}", f"{6 * params * tokens / 1e12:.2f}", "0.00"]
    assert (tmp_path / "it.png").stat().st_size > 0
    (tmp_path / "it.md").write_text("# It\n\n<!-- begin costs -->\n\nnone\n\n<!-- end costs -->\n")
    assert main(["it.toml", "--losses", "3.0,4.0", "--page", "it.md"]) == 0
    head, *lines = (tmp_path / "it.md").read_text().splitlines()
    assert head == "# It"
    assert [line for line in lines if line.startswith("| adamw")] == [
        line for line in printed.splitlines() if line.startswith("| adamw") and "muon" not in line
    ]
    arms = {arm.arm.name: arm for arm in read_arms(sweep, {})}
    assert "not chosen" in arms["adamw_8"].obstacle
    assert main(["it.toml", "--output-dir", "nowhere"]) == 2
    assert "no arm with all seeds" in capsys.readouterr().err


def test_operations_of_newton_schulz_are_those_of_the_matrices(tmp_path, monkeypatch):
    """Square ones in the standard form, 5 times 2 m^2 n for A and for P X and 2 m^3 for A^2; others in the Gram form.

    In the Gram form X X^T and Q X are 2 m^2 n, and R^2, then Z Q, Z R, R Z of 4 steps are 17 products of 2 m^3.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.toml").write_text(SWEEP)
    arms = read_sweep("it.toml").arms
    square, wide = 5 * (4 * 64**3 + 2 * 64**3), 4 * 64**2 * 176 + 17 * 2 * 64**3
    assert BatchArm(arms["muon8_8"], {}, "").operations[1] == 3 * (4 * square + 3 * wide)
    assert BatchArm(arms["adamw_8"], {}, "").operations[1] == 0
