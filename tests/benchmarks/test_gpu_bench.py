"""The GPU benchmark: its dry run from end to end, what it counts, and how it judges."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from muon8bit_kernels import reference

from benchmarks.gpu import first, gpu_tests, predicted, products, recipes, run
from benchmarks.gpu.acceptance import verdicts
from benchmarks.gpu.first_cases import CASES, Found, compare
from benchmarks.gpu.optimizers import ARMS, LINEAR, MUON_BF16
from benchmarks.gpu.predicted import Prediction, alone, ceiling, predict
from benchmarks.gpu.rates import momentum_bytes
from benchmarks.gpu.record import DRY, Record
from benchmarks.gpu.roofline import count
from benchmarks.gpu.workloads import LORA, MODELS, MOE, workloads
from muon8bit.orthogonalize import RATES

ROOT = Path(run.__file__).parents[2]


def environment() -> dict[str, str]:
    """As on a machine where nothing of this is installed: the bare tree."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def dry(folder: Path) -> tuple[list[object], dict[str, str]]:
    return [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", folder], environment()


def dry_first(folder: Path) -> tuple[list[object], dict[str, str]]:
    return [sys.executable, "-m", "benchmarks.gpu", "--first", "--dry-run", "--out", folder], environment()


def compilations(_folder: Path) -> tuple[list[object], dict[str, str]]:
    return [sys.executable, "-m", "benchmarks.gpu.compilations"], environment()


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


@pytest.mark.background(command=dry_first)
def test_first_call_goes_through_every_check(background):
    result, folder = background(dry_first)
    assert result.returncode == 0, result.stdout + result.stderr
    (table,) = folder.glob("*.csv")
    verdicts = {row.case: row.value for row in Record(table, dry=True).find("first", "verdict")}
    assert verdicts == dict.fromkeys(first.checks(), "passed")
    assert "## Checks of the first call" in table.with_suffix(".md").read_text()


def test_a_call_runs_its_sections_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--memory", "--dry-run", "--out", str(tmp_path)])
    monkeypatch.setattr(products, "measure", lambda *_: RATES["cpu"])  # the whole dry run does it
    assert run.main() == 0
    (table,) = tmp_path.glob("*.csv")
    record = Record(table, dry=True)
    assert {row.section for row in record.rows} == {"about", "rates", "memory", "host"}
    assert {row.case for row in record.find("memory", "extra memory")} == {*MODELS, LORA, MOE}
    assert set(run.CALLS) == {"first", "tests", "rates", "steps", "memory", "recipes"}


@pytest.mark.background(command=compilations)
def test_first_call_compiles_every_kernel_and_at_most_eighty(background):
    pytest.importorskip("triton")
    result, _ = background(compilations)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("    ")]
    assert lines[-1] == f"{len(listed)} compilations"
    assert 40 <= len(listed) <= 80
    kernels = "".join(path.read_text() for path in (ROOT / "kernels/muon8bit_kernels/triton").glob("*.py"))
    assert set(listed) == set(re.findall(r"^def (\w+_kernel)\(", kernels, re.MULTILINE))
    assert all("*u1" not in line for line in lines)  # flags are fp32


def test_a_bit_that_differs_is_found_and_named():
    case = next(case for case in CASES if case.name == "momentum linear")
    ours, theirs = (case.run(reference, torch.device("cpu"), True) for _ in range(2))
    compare(ours, theirs)
    ours.exact["codes"][1, 2, 3] ^= 1
    with pytest.raises(ValueError, match="codes: 1 of"):
        compare(ours, theirs)
    for value in (torch.nan, 1.1):
        with pytest.raises(ValueError, match="sum: relative difference"):
            compare(Found(close={"sum": (torch.tensor([value]), 1e-2)}), Found(close={"sum": (torch.ones(1), 1e-2)}))


def test_a_check_without_its_package_is_skipped_and_one_that_fails_is_told(capsys):
    def lacks(*_):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    def fails(*_):
        raise ValueError("codes: 3 of 5")

    device = torch.device("cpu")
    assert first.run_check(lacks, device, True) == "skipped: needs transformers"
    assert first.run_check(fails, device, True) == "failed: ValueError: codes: 3 of 5"
    assert "Traceback" in capsys.readouterr().err


def test_checks_behind_one_that_fails_or_ends_its_process_are_run_in_another(tmp_path, monkeypatch):
    """Three processes: the first fails at b, the second dies in c, the third does the rest until the time is over."""
    told, starts = [], []
    written = iter([[("a", "passed"), ("b", "failed: X")], [], [("d", "passed")]])
    ends = iter(["ended with 1", "ended with -11", first.UNFINISHED])

    def process(self, out, log):
        starts.append(list(self.names))
        log.write_text("")
        out.write_text("".join(json.dumps({"name": n, "verdict": v, "s": 1}) + "\n" for n, v in next(written)))
        return next(ends)

    monkeypatch.setattr(first._Group, "_process", process)
    first._Group("abcde", True, tmp_path / "x", 0.0).run(lambda *row: told.append(row[:2]))
    assert starts == [list("abcde"), list("cde"), list("de")]
    assert told == [
        *(("a", "passed"), ("b", "failed: X"), ("c", "failed: its process ended with -11"), ("d", "passed")),
        ("e", "not finished in 450 s"),
    ]


def test_first_call_repeats_only_what_has_not_passed(tmp_path, monkeypatch):
    record = Record(tmp_path / "x.csv", dry=False)
    for name, verdict in (("a", "passed"), ("b", "failed: X"), ("c", "not finished in 450 s")):
        record.measured("first", name, "", "verdict", verdict, "")
    asked = []
    monkeypatch.setattr(first, "checks", lambda: dict.fromkeys("abc"))
    monkeypatch.setattr(
        first._Group, "run", lambda self, tell: [(asked.append(n), tell(n, "passed", 1)) for n in self.names]
    )
    assert first.run_all(record, num_processes=2)
    assert sorted(asked) == ["b", "c"]
    assert [row.value for row in record.find("first", "verdict")] == ["passed"] * 3


def test_a_call_goes_on_where_the_last_one_ended_and_begins_nothing_too_late(tmp_path, monkeypatch):
    clock = iter([0, 0, 100, 200, 300, 301])
    monkeypatch.setattr("benchmarks.gpu.record.time", SimpleNamespace(monotonic=lambda: next(clock)))
    record = Record(tmp_path / "x.csv", dry=False, limit_s=250)
    record.measured("steps", "done", "arm", "time", 1.0, "ms")
    record.measured("steps", "broken", "arm", "time", "failed: X", "")
    assert record.begins("steps", "broken")
    assert not record.find("steps", "time", case="broken")
    assert not record.begins("steps", "done")
    assert not record.begins("steps", "new")  # at 200, and the first took 100
    assert record.left == ["steps"]
    again = Record(tmp_path / "y.csv", dry=False, limit_s=250)
    assert again.begins("steps", "new")


def test_rates_of_an_earlier_call_choose_the_methods_of_the_steps(tmp_path, monkeypatch):
    record, kind = Record(tmp_path / "x.csv", dry=False), "cuda_sm90"
    row = replace(RATES[kind], symmetric=((1024, 1.8), (4096, 3.0)), gram=0.7)
    monkeypatch.setitem(RATES, kind, RATES[kind])
    monkeypatch.setattr(products, "device_kind", lambda _: kind)
    measured = mock.Mock(return_value=row)
    monkeypatch.setattr(products, "measure", measured)
    clock = SimpleNamespace(device=torch.device("cpu"))
    products.install(clock, record)
    assert RATES[kind] is row
    record.write()
    RATES[kind] = replace(row, gram=None)
    products.install(clock, Record(tmp_path / "x.csv", dry=False))
    assert RATES[kind] == row
    assert measured.call_count == 1


def test_outcomes_are_read_as_far_as_they_were_printed():
    log = """tests/kernels/test_a.py::test_one[a - b, 1] PASSED                 [ 25%]
tests/kernels/test_a.py::test_two SKIPPED (needs a GPU)           [ 50%]
tests/step/test_b.py::test_three FAILED                           [ 75%]
tests/step/test_b.py::test_four
"""
    assert list(gpu_tests.outcomes(log).values()) == ["passed", "skipped", "failed"]


def test_gpu_tests_are_where_they_are_looked_for_and_some_are_decisive():
    marked = [path for path in (ROOT / "tests").glob("**/*.py") if "mark.gpu" in path.read_text()]
    known = [ROOT / folder for folder in gpu_tests.TESTS]
    assert [path for path in marked if path != Path(__file__) and path.parent not in known] == []
    decisive = {path.name for path in marked if "mark.decisive" in path.read_text() and path != Path(__file__)}
    assert len(decisive) == 6


@pytest.mark.parametrize(
    ("stderr", "value"),
    [
        ("ModuleNotFoundError: No module named 'peft'", "skipped: needs peft"),
        ("ModuleNotFoundError: the scripts need peft, tqdm: pip install", "skipped: needs peft, tqdm"),
        ("InputError: --adamw-bits 8 needs bitsandbytes", "skipped: needs bitsandbytes"),
        ("Killed", "failed: its process ended with 1"),
    ],
)
def test_a_recipe_that_cannot_run_says_why(tmp_path, monkeypatch, stderr, value):
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(recipes.subprocess, "run", lambda *_, **__: done)
    record = Record(tmp_path / "x.csv", dry=False)
    recipes.recipes(record)
    assert [row.value for row in record.find("recipes", "peak")] == [value] * 3
    assert record.failed() == value.startswith("failed")


def test_a_recipe_within_what_it_may_take_is_a_pass(tmp_path, monkeypatch):
    def run_recipe(command, **_):
        row = {"recipe": "r", "optimizer": "muon8bit", "most_gib": 14.5, "estimated_gib": 13.9, "measured_gib": 14.0}
        Path(command[command.index("--out") + 1]).write_text(json.dumps({"rows": [row]}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(recipes.subprocess, "run", run_recipe)
    record = Record(tmp_path / "x.csv", dry=False)
    recipes.recipes(record)
    found = {verdict.name: (verdict.reached, verdict.verdict) for verdict in verdicts(record)}
    assert found["llama32_3b_full_16gb, peak"] == ("14 GiB", "pass")


def test_a_cache_is_placed_with_the_paths_of_its_new_folder(tmp_path):
    """Triton 3.6 looks for the files of a group at their absolute paths."""
    pytest.importorskip("triton")
    from benchmarks.gpu.compilations import place_cache

    (tmp_path / "made/KEY").mkdir(parents=True)
    (tmp_path / "made/KEY/kernel.cubin").write_bytes(b"code")
    (tmp_path / "made/KEY/__grp__kernel.json").write_text(json.dumps({"child_paths": {"kernel.cubin": "kernel.cubin"}}))
    place_cache(tmp_path / "made", tmp_path / "used")
    placed = json.loads((tmp_path / "used/KEY/__grp__kernel.json").read_text())["child_paths"]
    assert Path(placed["kernel.cubin"]) == tmp_path / "used/KEY/kernel.cubin"
    assert Path(placed["kernel.cubin"]).read_bytes() == b"code"


def test_keys_of_a_cache_do_not_depend_on_which_kernel_is_launched_first():
    """Triton computes the key of a function when it is first asked for, from what is known of those that it calls."""
    triton = pytest.importorskip("triton")
    from muon8bit_kernels.triton import kernels

    modules = [module for name, module in sys.modules.items() if name.startswith(f"{kernels.__package__}.")]
    functions = [f for module in modules for f in vars(module).values() if isinstance(f, triton.JITFunction)]
    assert len(functions) > 40
    assert all(function.hash for function in functions)


def test_committed_prediction_is_what_the_command_writes(monkeypatch, tmp_path):
    monkeypatch.setitem(RATES, "vendor", RATES["cuda"])  # which the command sets
    monkeypatch.setattr(sys, "argv", ["predicted", "--out", str(tmp_path / "predicted.md")])
    predicted.main()
    committed = ROOT / "benchmarks" / "results" / "predicted.md"
    assert (tmp_path / "predicted.md").read_text() == committed.read_text(), "run benchmarks.gpu.predicted again"
