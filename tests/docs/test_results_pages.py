"""Figures on the pages of results are those of the committed records."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from benchmarks.peers.tables import write_tables
from benchmarks.robustness import health_thresholds
from benchmarks.training import architectures, batches
from finetune.evidence.arms import read_arms

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs" / "records"


def record(name: str) -> Any:
    return json.loads((RECORDS / name).read_text())


def page(name: str) -> str:
    return (ROOT / "docs" / "results" / f"{name}.md").read_text()


def table(text: str, header: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of the table whose header begins so."""
    lines = text[text.index(f"| {header}") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {first: rest for first, *rest in rows}


def test_pretraining_losses_and_state():
    runs = record("pretrain_llama_4m.json")["runs"]
    best = min((run for run in runs if run["optimizer"] == "adamw"), key=lambda run: run["val_loss"])
    expected = [*(run for run in runs if run["optimizer"] != "adamw"), best]
    shown = list(table(page("quality"), "optimizer | `make pretrain").values())
    assert [row[1] for row in shown] == [f"{run['val_loss']:.3f}" for run in expected]
    assert [row[2] for row in shown] == [f"{run['state_bytes'] / 1e6:.1f} MB" for run in expected]
    assert f"--lr {best['lr']:.0e}".replace("e-0", "e-") in shown[-1][0]
    assert f"{record('pretrain_llama_4m.json')['bigram_val_loss']:.3f}" in page("quality")


def test_losses_with_less_memory():
    arms: dict[str, list[float]] = {}
    for run in record("less_memory.json"):
        arms.setdefault(run["arm"], []).append(run["val_loss"])
    fp32 = mean(arms["fp32"])
    names = ["fp32", "bf16 stochastic", "bf16 nearest", "fp32, 8-bit AdamW", "bf16 stochastic, 8-bit AdamW"]
    shown = list(table(page("quality"), "weights | ").values())
    assert [row[1] for row in shown] == [", ".join(f"{loss:.3f}" for loss in arms[name]) for name in names]
    assert [row[2] for row in shown[1:]] == [f"{mean(arms[name]) - fp32:+.4f}" for name in names[1:]]
    assert f"Rounding to nearest costs {mean(arms['bf16 nearest']) - fp32:.3f};" in page("quality")


def test_fine_tuning_losses():
    runs = list(record("finetune_smollm2_135m.json").values())
    shown = table(page("quality"), "optimizer | LoRA")
    names = {"adamw": "AdamW", "muon": "Muon, fp32 state", "muon8bit linear": "Muon8bit, linear"}
    for arm, name in {**names, "muon8bit dynamic": "Muon8bit, dynamic"}.items():
        lora = [run for run in runs if run["arm"] == arm and run["mode"] == "lora" and run["steps"] == 40]
        full = min((run for run in runs if run["arm"] == arm and run["mode"] == "full"), key=_loss, default=None)
        losses = [run["val_loss"] for run in lora]
        cells = [cell.replace("*", "").split(" ")[0] for cell in shown[name]]
        assert cells[0] == f"{mean(losses):.3f}"
        assert float(cells[1]) == pytest.approx(max(losses) - min(losses), abs=6e-4)
        assert cells[2] == ("-" if full is None else f"{full['val_loss']:.3f}")
        state = f"{lora[0]['state_bytes'] / 1e6:.1f}" + ("" if full is None else f" / {full['state_bytes'] / 1e6:.0f}")
        assert shown[name][3] == f"{state} MB"
    assert all(f"{run['val_loss_before']:.3f}" in page("quality") for run in runs)
    assert len(runs) == 24


def _loss(run: dict[str, Any]) -> float:
    return float(run["val_loss"])


def test_the_three_muons_differ_seed_by_seed_by_what_is_said():
    by_seed: dict[tuple[Any, ...], list[float]] = {}
    for run in record("finetune_smollm2_135m.json").values():
        if run["arm"] != "adamw":
            by_seed.setdefault((run["mode"], run["lr"], run["seed"], run["steps"]), []).append(run["val_loss"])
    largest = max(max(losses) - min(losses) for losses in by_seed.values())
    assert f"differ by {math.ceil(largest * 1e4) / 1e4:.4f} at most" in page("quality")
    assert f"**{math.ceil(largest * 1e4) / 1e4:.4f} nats**" in (ROOT / "docs" / "index.md").read_text()


def test_memory_peaks():
    rows = record("memory_peaks.json")["rows"]
    names = {
        "adamw": "AdamW",
        "adamw8bit": "8-bit AdamW",
        "muon": "Muon, fp32 state",
        "muon_bf16": "Muon, bf16 state and weights",
        "muon8bit": "Muon8bit",
        "muon8bit+adamw8bit": "Muon8bit + 8-bit AdamW",
    }
    columns = [(1, 64, False, False), (1, 64, True, True), (4, 256, False, False), (4, 256, True, False)]
    shown = table(page("memory"), "optimizer | batch 1")
    assert {row["optimizer"] for row in rows} == set(names)
    for arm, name in names.items():
        for column, cell in zip(columns, shown[name], strict=True):
            (row,) = (
                row
                for row in rows
                if row["optimizer"] == arm
                and (row["batch"], row["seq"], row["checkpointing"], row["release"]) == column
            )
            both = (row["measured_bytes"], row["estimated_bytes"])
            assert cell == " / ".join(f"{value / 2**20:.1f}" for value in both)
    assert len(rows) == 48
    assert max(abs(row["estimated_bytes"] / row["measured_bytes"] - 1) for row in rows) < 0.001


def test_step_times_on_a_cpu():
    files = [record(f"cpu_step_time_{name}.json") for name in ("bf16", "no_bf16")]
    shown = table(page("speed"), "shape | linear")
    for name, cells in shown.items():
        for file, (linear, dynamic) in zip(files, (cells[:2], cells[2:]), strict=True):
            key = {"geometric mean": "geometric_mean", "64 LoRA matrices": "lora_64_matrices"}.get(name)
            ratios = file[key] if key else file["ratios"][name.replace(" ", "")]
            for cell, kind in ((linear, "linear"), (dynamic, "dynamic")):
                assert float(cell.strip("*")) == pytest.approx(ratios[kind], abs=5.1e-3), (name, kind)
    assert len(shown) == 7


def test_step_times_of_llamas_on_a_cpu():
    sizes = record("cpu_llama_step_348c66a.json")["sizes"]
    shown = table(page("speed"), "Llama, width x layers")
    assert {name.replace(" ", "") for name in shown} == set(sizes)
    for name, cells in shown.items():
        assert cells == [f"{ratio:.2f}" for ratio in sizes[name.replace(" ", "")]["whole"].values()]


def test_step_time_of_the_family():
    shown = table(page("speed"), "Llama, width x layers | NorMuon")
    for size, arms in record("family_step_time.json")["sizes"].items():
        assert shown[size.replace("x", " x ")] == [f"{arms[name]['ratio']:.2f}" for name in list(arms)[1:]]
    assert len(shown) == 2


def test_comparisons_with_another_commit():
    found = record("against_cc65b8b.json")
    text = (ROOT / "docs" / "stability.md").read_text().replace("\n", " ")
    assert {case["case"] for case in found["differences"]} == {"muon8bit estimate"}
    assert f"commits {found['old']} and {found['new']}" in text
    assert f"{found['different']} of {found['comparisons']} comparisons differs" in text


def test_cost_of_gradient_release():
    text = page("speed")
    for row in record("release_time.json")["rows"]:
        assert re.search(rf"{row['ratio']:.3g}\d? at (width )?{row['hidden']}", text), row


def test_traffic_and_failures():
    text = page("scaling")
    for result in record("traffic_llama_1b_layer.json")["results"]:
        assert f"| {result['fraction']} |" in text
    rows = re.findall(r"^\| \d ranks,[^|]*\| (\w+)", (RECORDS / "fault_injection.md").read_text(), re.MULTILINE)
    assert f"{len(rows)} failures" in text
    assert f"{rows.count('impossible')} of them impossible" in text


def test_planned_steps():
    rows = record("scale_simulation.json")["rows"]
    shown = table(page("scaling"), "model, GPUs (FSDP)")
    assert len(shown) == 4
    for name, cells in shown.items():
        model, gpus = name.split(", ")
        (row,) = (r for r in rows if (r["model"], r["num_gpus"], r["num_shards"]) == (model, int(gpus), int(gpus)))
        most = max(row["most_sent_bytes"], row["most_received_bytes"])
        expected = [
            row["balance"],
            row["busiest"],
            (row["mean_bytes"] / 1e9, most / 1e9),
            row["gathered_fp32_bytes"] / 1e9,
            (row["moonlight_mean_bytes"] / 1e9, row["moonlight_most_bytes"] / 1e9),
            row["state_bytes"] / 1e9,
            (row["arithmetic_ms"], row["transfer_ms"]),
        ]
        for cell, value in zip(cells, expected, strict=True):
            for text, number in zip(cell.split(" / "), value if isinstance(value, tuple) else (value,), strict=True):
                digits = len(text.partition(".")[2])
                assert float(text) == pytest.approx(number, abs=0.51 * 10**-digits, rel=5e-3 if digits == 0 else 0)


def test_kills_while_saving():
    killed = record("kill_saves.json")["killed"]
    assert f"{killed['resumed']} of {killed['kills']} kills" in (ROOT / "docs" / "index.md").read_text()


# The columns of a record of `benchmarks.robustness.sign_flips`.
SIGN_COLUMNS = ("flips", "flips_nesterov", "lost", "ns", "ns_nesterov", "muon", "update", "update_v8")


@cache
def sign_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECORDS / "sign_flips.jsonl").read_text().splitlines()]


def of_signs(form: str, column: str, **where: str) -> list[float]:
    """Values of a format; in short rows a long block is one of the row's length."""
    book, _, block = form.rpartition(" ")
    found = []
    for row in sign_rows():
        if all(row[key] == value for key, value in where.items()):
            name = f"{book} {min(int(block), row['cols'])}" if block.isdecimal() and book[:2] != "V " else form
            found.append(row["values"].get(name, [None] * 8)[SIGN_COLUMNS.index(column)])
    return [value for value in found if value is not None]


def test_adamuon_momentum_by_format():
    shown = table(page("adamuon"), "momentum |")
    for form, cells in shown.items():
        book, _, block = form.rpartition(" ")
        bits = 9 if "9" in book or "+" in book else 8
        assert float(cells[0]) == pytest.approx(bits / 8 + 4 / int(block) if book else 2, abs=5.1e-4)
        means = [mean(of_signs(form, column)) for column in ("flips", "flips_nesterov", "lost", "ns", "muon")]
        most = max(of_signs(form, "flips"))
        expected = [
            f"{means[0]:.2%}",
            f"{most:.1%}",
            *(f"{m:.2%}" for m in means[1:3]),
            *(f"{m:.0%}" for m in means[3:]),
        ]
        assert cells[1:] == expected, form
    assert len(shown) == 13
    text = page("adamuon").replace("\n", " ")
    for form in ("linear 2048", "dynamic 2048"):
        assert f"{max(of_signs(form, 'flips')):.1%}" in text.partition("## How")[0]
    assert f"{mean(of_signs('step before', 'flips')):.1%} change" in text
    fewer, less = (1 - mean(of_signs("square 2048", c)) / mean(of_signs("dynamic 2048", c)) for c in ("flips", "muon"))
    assert f"{fewer:.0%} fewer flips" in text
    assert f"{less:.0%} less error" in text


def test_adamuon_by_matrix_and_second_moment():
    text = page("adamuon")
    header, *_ = (line for line in text.splitlines() if line.startswith("| matrix |"))
    forms = [cell.strip() for cell in header.strip("|").split("|")][1:-1]
    kinds = {row["kind"] for row in sign_rows()}
    shown = table(text, "matrix |")
    assert set(shown) == kinds
    for kind, cells in shown.items():
        pairs = [(mean(of_signs(f, "flips", kind=kind)), mean(of_signs(f, "ns", kind=kind))) for f in forms]
        before = mean(of_signs("step before", "flips", kind=kind))
        assert cells == [*(f"{flips:.2%}, {ns:.0%}" for flips, ns in pairs), f"{before:.2%}"]
    names = {"root": "V root", "V itself": "V plain"}
    for stored, cells in table(text, "V in 8 bits").items():
        values = of_signs(f"{names[stored.split(', ')[0]]} {stored.split(', ')[1]}", "update")
        assert cells == [f"{mean(values):.2%}", f"{max(values):.1%}"]
    for form in ("linear 256", "dynamic 256"):
        (flips,) = of_signs(form, "flips", model="wide", kind="MLP out", phase="end")
        assert f"{flips:.1%}" in text


def test_the_tables_of_architectures_are_what_records_and_shapes_make(tmp_path):
    """By hand, of the bytes: codes, a scale a row, and of the AdamW part two moments and a count in fp32."""
    text = page("architectures")
    assert architectures.filled(text) == text
    d, heads, layers = 320, 10, 3
    matrices = layers * [(320, d), (64, d), (64, d), (d, 320), (1040, d), (1040, d), (d, 1040)]
    rest = [1024 * d, *(2 * layers + 1) * [d]]
    costs = architectures.costs_of("dense")
    adamw = sum(8 * size + 4 for size in rest)
    assert costs["muon8"] == sum(rows * cols + 4 * rows for rows, cols in matrices) + adamw
    assert costs["muon32"] == sum(4 * rows * cols for rows, cols in matrices) + adamw
    assert costs["adamw"] == sum(8 * rows * cols + 4 for rows, cols in matrices) + adamw
    assert costs["cache"] == layers * 2 * 2 * (d // heads) * 4
    unmeasured = architectures.filled(text, tmp_path)
    for command in (architectures.SWEEP, architectures.SPEED):
        assert f"not measured yet: `{command}`" in unmeasured.replace("Not", "not")
    runs = {"dense_muon32": (2.0, costs["muon32"]), "dense_adamw": (2.5, costs["adamw"])}
    runs["dense_init_adamw"] = (2.25, costs["adamw"])
    runs["mla_moe_muon8"] = (1.5, architectures.costs_of("mla_moe")["muon8"])
    with (tmp_path / "architectures.jsonl").open("w") as file:
        for arm, (loss, state) in runs.items():
            record = {"arm": arm, "rate": 1e-3, "seed": 0, "status": "finished"}
            file.write(json.dumps(record | {"metrics": {"val_loss": loss, "state_bytes": state}}) + "\n")
    losses = table(architectures.loss_table(tmp_path) + "\n\n", "architecture | AdamW")
    assert losses["dense, GQA (the control)"] == ["2.5000 (lr 0.001)", "2.0000 (lr 0.001)", "-", "+0.5000", "-"]
    assert losses["experts, MLA (DeepSeek-V3)"] == ["-", "-", "1.5000 (lr 0.001)", "-", "-"]
    assert losses["dense, GQA, weights begin at 0.056"] == ["2.2500 (lr 0.001)", *"----"]
    (axes,) = architectures.losses_figure(read_arms(tmp_path / "architectures.jsonl")).axes
    assert "nats per token" in axes.get_ylabel()
    assert [list(line.get_ydata()) for line in axes.lines] == [[2.5, 2.25], [2.0], [1.5]]
    assert len({line.get_marker() for line in axes.lines}) == 3
    text = (tmp_path / "architectures.jsonl").read_text().replace(f": {costs['muon32']}", ": 1")
    (tmp_path / "architectures.jsonl").write_text(text)
    with pytest.raises(ValueError, match="state of dense_muon32 has"):
        architectures.loss_table(tmp_path)


def test_the_tables_of_the_batch_study_are_what_its_records_make(tmp_path):
    (tmp_path / "page.md").write_text(page("batch-size"))
    sweep = ROOT / "benchmarks" / "sweeps" / "batches.toml"
    assert batches.main([str(sweep), "--page", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text() == page("batch-size")


def test_the_coordinate_check_has_the_best_rate_of_its_model():
    losses: dict[float, list[float]] = {}
    for line in (RECORDS / "width_check.jsonl").read_text().splitlines():
        run = json.loads(line)
        losses.setdefault(run["rate"], []).append(run["metrics"]["val_loss"])
    assert {len(of) for of in losses.values()} == {3}
    best = min(losses, key=lambda rate: mean(losses[rate]))
    assert min(losses) < best < max(losses)
    assert {run["settings"]["lr"] for run in record("coordinate_check.json")["runs"]} == {best}


def test_the_guides_slopes_are_those_of_the_evidence():
    shown = table((ROOT / "docs" / "guide" / "width-transfer.md").read_text(), "| slope of log2")
    slopes = table(page("evidence"), "series | slope")
    assert len(shown) == len(slopes) == 3
    for (series, (slope, _, interval, cost)), cells in zip(slopes.items(), shown.values(), strict=True):
        low, high = map(float, interval.split(" to "))
        assert cells == [f"{float(slope):+.2f} ({low:+.2f} to {high:+.2f})", f"{float(cost):.3f} nats"], series


HEALTH_GROUPS = {"q, k": "qk", "v, o": "vo", "gate, up": ("gate", "up"), "down": ("down",)}


def test_health_of_the_default_recipe():
    columns = ("descent", "update_cosine", "momentum_error", "sign_flips", "zero_codes")
    expected = {}
    for optimizer, run in record("health_llama_4m.json")["runs"].items():
        assert list(run["steps"]) == ["20", "40", "60"]
        for group, kinds in HEALTH_GROUPS.items():
            wanted = {f"{kind}_proj" for kind in kinds}
            found = [of for step in run["steps"].values() for name, of in step.items() if name.split(".")[-2] in wanted]
            worst = [min(of[key] for of in found) for key in columns[:2]]
            most = [max(of[key] for of in found) for key in columns[2:]]
            expected[f"{optimizer}: {group}"] = [f"{v:.3f}" for v in worst] + [f"{v:.1%}" for v in most]
    assert table(page("health"), "optimizer: matrices") == expected


def test_other_optimizers_under_the_same_checks():
    content, text = record("peers.json"), page("peers")
    tables = write_tables(content["classes"], content["not_run"])
    assert (RECORDS / "peers.md").read_text() == tables
    assert text.endswith(tables.split("\n", 2)[2])
    found = {entry["package"]: entry["results"] for entry in content["classes"]}
    for entry in content["classes"]:
        assert not entry["is_ours"] or all(result["passed"] for result in entry["results"].values()), entry["name"]
    adv, gefen, sdnq = found["adv-optm"], found["gefen"], found["sdnq"]
    assert {f"{adv[name]['cosine']:.2f}" for name in adv if name.startswith("resume")} == {"-0.32"}
    assert f"(cosine {gefen['resume by names']['cosine']:.4f})" in text.replace("\n  ", " ")
    assert f"{gefen['sharding']['cosine']:.2f}" == "0.92"
    assert f"(cosine {sdnq['scale']['cosine']:.2f})" in text
    assert sdnq["routing"]["kinds"]["embed_tokens"] == "orthogonalized"
    assert f"{sdnq['bytes']['bytes_per_parameter']:.2f} bytes" in text
    assert "weights_only" in found["bantamtrain"]["resume fp32"]["notes"][0]
    assert all("error" in found[name]["rule"] for name in ("muonium", "dtensor-muon"))


def test_health_of_right_and_wrong_codebooks():
    lines = (RECORDS / "health_thresholds.jsonl").read_text().splitlines()
    assert health_thresholds.table([json.loads(line) for line in lines]) in page("health")
