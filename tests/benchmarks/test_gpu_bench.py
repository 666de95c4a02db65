"""The GPU benchmark: its dry run from end to end, what it counts, and how it judges."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import run
from benchmarks.gpu.acceptance import verdicts
from benchmarks.gpu.optimizers import ARMS, LINEAR, MUON_BF16
from benchmarks.gpu.predicted import Prediction, alone, ceiling, predict
from benchmarks.gpu.rates import momentum_bytes
from benchmarks.gpu.record import DRY, Record
from benchmarks.gpu.roofline import count
from benchmarks.gpu.workloads import LORA, MODELS, MOE, workloads

ROOT = Path(run.__file__).parents[2]


def dry(folder: Path) -> tuple[list[object], dict[str, str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", folder]
    return command, environment


@pytest.fixture(scope="module")
def dry_run(background) -> tuple[list[dict[str, str]], str]:
    """Rows of the CSV and the text of the Markdown file that the command leaves."""
    result, folder = background(dry)
    assert result.returncode == 0, result.stdout + result.stderr
    (table,) = folder.glob("*.csv")
    with table.open(newline="") as file:
        return list(csv.DictReader(file)), table.with_suffix(".md").read_text()


@pytest.mark.background(command=dry)
def test_dry_run_goes_through_every_section_arm_and_workload(dry_run):
    rows, _ = dry_run
    assert {row["section"] for row in rows} == {"about", "ceilings", "rates", *run.SECTIONS}
    for metric in ("time", "host time", "extra memory", "ratio", "over floor"):
        found = {(r["case"], r["arm"]) for r in rows if (r["section"], r["metric"]) == ("steps", metric)}
        assert found - {(case, "floor") for case in (*MODELS, LORA, MOE)} == {
            (case, arm) for case in (*MODELS, LORA, MOE) for arm in ARMS
        }
    assert {r["case"] for r in rows if (r["arm"], r["metric"]) == ("floor", "time")} == {*MODELS, LORA, MOE}
    for codebook in ("linear", "dynamic"):
        cases = {row["case"] for row in rows if row["section"] == "momentum" and row["case"].startswith(codebook)}
        assert cases == {f"{codebook}, blocks of {size}" for size in (64, 128, 256, 512, 1024, 2048, 4096)}


@pytest.mark.background(command=dry)
def test_dry_run_claims_no_figure_and_no_arm_failed(dry_run):
    rows, report = dry_run
    counted = {"operations", "bytes", "FLOP ceiling"}
    measured = [row for row in rows if row["section"] != "about" and row["metric"] not in counted]
    installed = [row for row in measured if row["value"] != "not installed"]
    assert len(installed) > 300
    assert {row["value"] for row in installed} == {DRY}
    assert report.startswith("# Dry run on a CPU: nothing here is a measurement")
    assert all(line.endswith(f"| {DRY} |") for line in report.splitlines() if "at least" in line or "at most" in line)


@pytest.mark.background(command=dry)
def test_report_lists_the_acceptance_targets(dry_run):
    _, report = dry_run
    for target in (
        "Llama-3.2-3B, over torch Muon",
        "Llama-3.1-8B, over torch Muon",
        "squares alone",
        "every shape class",
    ):
        assert target in report
    for asked in (
        "at least 1.639x",
        "at least 1.761x",
        "at least 1.25x",
        "at least 20x",
        "at most 512 MiB",
        "0.75 of copy",
    ):
        assert asked in report


def test_workloads_have_the_models_hidden_parameters():
    """By hand: layers * (2 h^2 + 2 h kv + 3 h f); LoRA: layers * r * the sum of (in + out); experts."""
    by_name = {workload.name: workload.num_elements for workload in workloads()}
    assert by_name == {
        "Llama-3.2-1B": 16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192),
        "Llama-3.2-3B": 28 * (2 * 3072**2 + 2 * 3072 * 1024 + 3 * 3072 * 8192),
        "Llama-3.1-8B": 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
        LORA: 28 * 16 * (2 * (3072 + 3072) + 2 * (3072 + 1024) + 3 * (3072 + 8192)),
        MOE: 3 * 64 * 1024 * 2048,
    }


def test_flop_ceilings_equal_the_hand_count():
    """Over the whole step at equal rate per operation, the published 2.14, 1.93 and 2.07; bytes of phases: 9, 4, 6."""
    counts = {workload.name: count(workload, "cuda_sm90") for workload in workloads()}
    assert [round(counts[name].ceiling, 2) for name in MODELS] == [2.14, 1.93, 2.07]
    elements = {workload.name: workload.num_elements for workload in workloads()}
    for name, found in counts.items():
        assert found.ns_bytes + found.update_bytes == 10 * elements[name]
    # One matrix (m, n) = (1024, 2048): 20 m^2 n + 10 m^3 against 6 m^2 n + 14 m^3.
    m, n = 1024, 2048
    experts = counts[MOE]
    assert experts.torch_flops == 192 * (20 * m * m * n + 10 * m**3)
    assert experts.least == 192 * (6 * m * m * n + 14 * m**3)


def test_momentum_bytes_are_nine_an_element_and_four_a_scale():
    """[2, 4096] in blocks of 256: scales read twice and written, sums written: 16 bytes a block."""
    found = momentum_bytes(2 * 4096, 4096, 256, "linear")
    assert found["stats"] + found["apply"] == 9 * 2 * 4096 + 16 * 2 * 16
    found = momentum_bytes(2 * 4096, 4096, 2048, None)  # 4-byte momentum read twice and written; no scales, sums
    assert found["stats"] + found["apply"] == (3 * 4 + 6) * 2 * 4096 + 4 * 2 * 2


def test_verdict_is_the_worst_row_and_a_missing_figure_is_no_pass(tmp_path):
    record = Record(tmp_path / "x.csv", dry=False)
    for case, ratio in (("2 x (64, 64)", 1.3), ("1 x (8, 64)", 0.9), ("4 x (32, 32)", 1.2)):
        record.measured("shapes", case, MUON_BF16, "ratio", ratio, "times")
    record.measured("steps", LORA, MUON_BF16, "ratio", 20.5, "times")
    record.measured("steps", "Llama-3.1-8B", LINEAR, "extra memory", "out of memory", "")
    found = {verdict.name: verdict for verdict in verdicts(record)}
    assert found["every shape class alone"].verdict == "miss"
    assert found["every shape class alone"].reached.startswith("0.9x (1 x (8, 64)")
    assert found["LoRA, over torch Muon"].verdict == "pass"
    assert found["memory beside the state"].verdict == "miss"
    assert found["tests marked gpu"].verdict == "not run"
    record.measured("shapes", "3 x (8, 8)", MUON_BF16, "ratio", "failed: RuntimeError", "times")
    assert {v.name: v.verdict for v in verdicts(record)}["every shape class alone"] == "miss"
    assert record.failed()


def test_a_second_call_keeps_other_sections_and_refuses_another_machine(tmp_path):
    first = Record(tmp_path / "x.csv", dry=False)
    first.about({"GPU": "A", "torch": "1"}, "one")
    first.measured("steps", "case", "arm", "time", 1.0, "ms")
    first.measured("shapes", "case", "arm", "time", 2.0, "ms")
    first.write()
    second = Record(tmp_path / "x.csv", dry=False)
    second.about({"GPU": "A", "torch": "1"}, "two")
    second.restart("steps")
    assert [row.section for row in second.rows if row.section != "about"] == ["shapes"]
    assert [row.value for row in second.rows if row.metric == "command"] == ["one", "two"]
    with pytest.raises(ValueError, match="another --out"):
        Record(tmp_path / "x.csv", dry=False).about({"GPU": "B", "torch": "1"}, "two")


def test_default_table_of_sm90_predicts_its_targets():
    """Time over torch.optim.Muon; operations stay under the ceiling. No shape is slower, in its class or alone."""
    for (name, least), most in zip(
        {"Llama-3.2-1B": 1.40, "Llama-3.2-3B": 1.30, "Llama-3.1-8B": 1.45}.items(), (2.14, 1.93, 2.07), strict=True
    ):
        matrices = next(workload for workload in workloads() if workload.name == name).matrices()
        parts = {shape: predict(*shape, number, "cuda_sm90")[1] for shape, number in matrices.items()}
        whole = sum(parts.values(), Prediction())
        assert whole.time_ratio >= least
        assert 1.9 < whole.flop_ratio <= ceiling(matrices) == pytest.approx(most, abs=0.006)
        assert min(part.time_ratio for part in parts.values()) >= 1
        assert min(alone(*shape, "cuda_sm90") for shape in matrices) >= 1
